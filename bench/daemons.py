"""The daemons under test: which there are, how each is started, and what a running one uses."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vfsd.errors import ConfigError

from .harness import harness
from .model import Failed, NotOffered, Setting

C_DAEMON = "/usr/lib/qemu/virtiofsd"
RUST_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd")
RUST_VARIABLE = "VFSD_PEER_RUST"
LISTENING = "00010000"  # __SO_ACCEPTCON, the flags column of /proc/net/unix
SAID_MAX = 65536  # bytes of standard error that are kept
END_S = 5.0
HELP_S = 20.0
UML_EXACT = (6, 2)  # from here on it sends a SET_MEM_TABLE of the length it means
DAX_WINDOW = "1G"
MODES = ("never", "none", "auto", "always", "metadata")
SPELLINGS = {"none": MODES[:2]}  # of modes with more than one
POOL = 64  # threads, where a pool is measured
TAG = "bench"  # of the share, for front ends that ask the daemon for it
TAGGED = ("uml", "qemu-dax")  # guests with such a front end


@functools.cache
def said(words: tuple[str, ...]) -> str:
    """What a command says; nothing if it can't be run, or fails."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=HELP_S, stdin=subprocess.DEVNULL, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout or done.stderr) if done.returncode == 0 else ""


def expect_offered(words: Sequence[str], option: str, what: str) -> None:
    """NotOffered: a command's --help does not have that word."""
    if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", said((*words, "--help"))):
        raise NotOffered(f"has no {what}")


def lists_mode(words: Sequence[str], mode: str) -> bool:
    """Whether it is in the list of cache modes that a command's --help has."""
    listed = rf"(?:[|(]|, ){mode}(?:[|),]|\s)|\b{mode}[|]"
    return re.search(listed, said((*words, "--help"))) is not None


def own_mode(words: Sequence[str], mode: str) -> str:
    """How a command spells a cache mode: by its --help, as it is if that lists none.

    NotOffered: that lists others.
    """
    for name in SPELLINGS.get(mode, (mode,)):
        if lists_mode(words, name):
            return name
    if any(lists_mode(words, name) for name in MODES):
        raise NotOffered(f"has no cache mode {mode}")
    return mode


VFSD = (sys.executable, "-m", "vfsd", "serve")


def vfsd_command(setting: Setting) -> list[str]:
    """`vfsd serve`, by the interpreter that runs this."""
    mode = own_mode(VFSD, setting.cache)
    words = [*VFSD, "--socket", "{socket}", "--shared-dir", "{dir}", "--cache", mode]
    for on, option, more in (
        (setting.xattr, "--xattr", ()),
        (setting.writeback, "--writeback", ()),
        (setting.locks, "--posix-lock", ()),
        (setting.dax, "--dax-window", (DAX_WINDOW,)),
        (setting.guest in TAGGED, "--tag", ("{tag}",)),
    ):
        if on:
            expect_offered(VFSD, option, option)
            words += [option, *more]
    return words


def c_command(setting: Setting) -> list[str]:
    """The C virtiofsd of QEMU up to 7.2. Of its two sandboxes chroot is the lighter one."""
    if setting.cache == "metadata":
        raise NotOffered("has no cache mode metadata")
    if setting.dax:
        raise NotOffered("has no DAX window")
    if setting.guest == "uml":
        raise NotOffered("has no tag, which user-mode Linux asks for; --guest qemu does without")
    flags = {"xattr": setting.xattr, "writeback": setting.writeback, "posix_lock": setting.locks}
    options = [f"cache={setting.cache}", *(name if on else f"no_{name}" for name, on in flags.items())]
    return [
        *(C_DAEMON, "-f", "--socket-path={socket}", "-o", "source={dir}", "-o", "sandbox=chroot"),
        *(word for option in options for word in ("-o", option)),
    ]


def uml_version() -> tuple[int, ...]:
    """Of the user-mode Linux that is booted."""
    return version_numbers(said((*harness().uml_command(), "--version")))


def rust_command(program: Sequence[str], handles: str | None, setting: Setting) -> list[str]:
    """The Rust virtiofsd. handles: --inode-file-handles, whose default changed with 1.14."""
    mode = own_mode(program, setting.cache)
    if setting.guest == "uml" and uml_version() < UML_EXACT:
        raise NotOffered("refuses the memory table of user-mode Linux 6.1, which is longer than it says;"
                         " bench/get-peers fetches a newer one")  # fmt: skip
    for on, option in (
        (setting.writeback, "--writeback"), (setting.locks, "--posix-lock"), (setting.dax, "--dax-window"),
        (setting.guest in TAGGED, "--tag"), (setting.xattr, "--xattr"),
    ):  # fmt: skip
        if on:
            expect_offered(program, option, option)
    return [
        *(*program, "--socket-path", "{socket}", "--shared-dir", "{dir}"),
        *("--sandbox", "none", "--seccomp", "none", "--cache", mode),
        *([f"--inode-file-handles={handles}"] if handles else []),
        *(["--xattr"] if setting.xattr else []),
        *(["--writeback"] if setting.writeback else []),
        *(["--posix-lock"] if setting.locks else []),
        *(["--dax-window", DAX_WINDOW] if setting.dax else []),
        *(["--tag", "{tag}"] if setting.guest in TAGGED else []),
    ]


@dataclass(frozen=True)
class Target:
    """A daemon to measure. kind: vfsd, c, rust, or given, with the operator's `words`.

    handles: see rust_command. pool: threads for requests; 0, as it is by default.
    """

    name: str
    kind: str
    words: tuple[str, ...] = ()
    handles: str | None = None
    pool: int = 0

    def with_pool(self) -> Target:
        """The same daemon with POOL threads."""
        return replace(self, name=f"{self.name}-pool", pool=POOL)

    def command(self, setting: Setting, socket: Path, directory: Path) -> list[str]:
        """What to run. NotOffered: it has no such setting."""
        if self.kind in ("c", "rust") and setting.queues > 1:
            raise NotOffered("has one request queue")
        if self.kind == "vfsd":
            words = vfsd_command(setting)
        elif self.kind == "c":
            words = c_command(setting)
        elif self.kind == "rust":
            words = rust_command(self.words, self.handles, setting)
        else:
            words = self.given(setting)
        words += [f"--thread-pool-size={self.pool}"] if self.pool else []
        for name, value in (("{socket}", str(socket)), ("{dir}", str(directory)), ("{tag}", TAG)):
            words = [word.replace(name, value) for word in words]
        return words

    def given(self, setting: Setting) -> list[str]:
        text = " ".join(self.words)
        if setting.cache != "auto" and "{cache}" not in text:
            raise NotOffered("its command has no {cache}: measured as it is given, in the tables of auto")
        for on in setting.on:
            if on != "xattr":
                raise NotOffered(f"its command is as it is given: not measured with {on}")
        if setting.guest == "uml" and "{tag}" not in text:
            raise NotOffered("its command has no {tag}, which user-mode Linux asks for")
        if "{cache}" not in text:
            return list(self.words)
        mode = own_mode(self.program(), setting.cache)
        return [word.replace("{cache}", mode) for word in self.words]

    def version(self) -> str:
        """The first line that --version says."""
        if self.kind == "vfsd":
            words = [sys.executable, "-m", "vfsd"]
        elif self.kind == "c":
            words = [C_DAEMON]
        else:
            words = self.program()
        lines = said((*words, "--version")).strip().splitlines()
        return lines[0][:120] if lines else "unknown"

    def program(self) -> list[str]:
        """The words before the first option that has a placeholder: what answers --help."""
        words = list(itertools.takewhile(lambda word: "{" not in word, self.words))
        if len(words) > 1 and words[-1].startswith("-"):
            words.pop()
        return words or list(self.words[:1])


def parse_target(text: str) -> Target:
    """NAME=COMMAND. ConfigError."""
    name, _, command = text.partition("=")
    words = shlex.split(command)
    if not name or not words:
        raise ConfigError(
            "--daemon", f"{text!r} is not NAME=COMMAND; write for instance x='xd {{socket}} {{dir}}'"
        )
    for part in ("{socket}", "{dir}"):
        if part not in command:
            raise ConfigError("--daemon", f"the command of {name} has no {part}; put it where the path goes")
    if name == "floor" or not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
        raise ConfigError("--daemon", f"{name!r} can't be a name; use letters, digits, '-', '_' and '.'")
    return Target(name, "given", tuple(words))


def found_targets() -> list[Target]:
    """vfsd, and the peers that are installed."""
    found = [Target("vfsd", "vfsd")]
    if os.access(C_DAEMON, os.X_OK) and os.geteuid() == 0:  # it wants to be root
        found.append(Target("c", "c"))
    given = os.environ.get(RUST_VARIABLE)
    paths = [shutil.which("virtiofsd"), *(path for path in RUST_PLACES if os.access(path, os.X_OK))]
    installed = [path for path in paths if path]
    words = tuple(shlex.split(given)) if given else tuple(installed[:1])
    if words:
        rust = Target("rust", "rust", words)
        found.append(rust)
        # From 1.14 on the default opens every inode by handle, which is slower and holds fewer
        # descriptors: both ways are shown.
        if version_numbers(rust.version()) >= (1, 14):
            found.append(Target("rust-nohandles", "rust", words, "never"))
    return found


def version_numbers(text: str) -> tuple[int, ...]:
    for word in text.split():
        parts = word.split(".")
        if len(parts) > 1 and all(part.isdigit() for part in parts):
            return tuple(int(part) for part in parts)
    return ()


@dataclass(frozen=True)
class Pinning:
    """CPUs for the daemons and for what drives them; empty when there is only one."""

    daemon: frozenset[int]
    front: frozenset[int]

    @classmethod
    def here(cls) -> Pinning:
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            return cls(frozenset(), frozenset())
        half = len(cpus) // 2
        return cls(frozenset(cpus[:half]), frozenset(cpus[half:]))

    @contextlib.contextmanager
    def use(self, cpus: frozenset[int]) -> Iterator[None]:
        """This thread, and what it starts, on these CPUs only."""
        before = os.sched_getaffinity(0)
        if cpus:
            os.sched_setaffinity(0, cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


class Running:
    """A daemon's process. argv: exactly what runs. socket: where it listens.

    Raises Failed when it does not come to listen.
    """

    def __init__(
        self, target: Target, setting: Setting, directory: Path, pinning: Pinning, ready: float
    ) -> None:
        # Not below the served directory, whose path may be long: a socket's has at most 107 bytes.
        self._place = Path(tempfile.mkdtemp(prefix="vfsd-bench-"))
        self.socket = self._place / "socket"
        self.target = target
        self._said = bytearray()
        self._threads: dict[int, str] = {}
        try:
            self.argv = target.command(setting, self.socket, directory)
        except NotOffered:
            shutil.rmtree(self._place)
            raise
        began = time.perf_counter()
        try:
            with pinning.use(pinning.daemon):
                self._process = subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as problem:
            shutil.rmtree(self._place)
            raise Failed(f"can't be run: {problem.strerror}") from problem
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.listening = self._wait(began, ready)
        except BaseException:
            self.end()
            raise

    def _read(self) -> None:
        """Always, so that it never waits for us."""
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while data := os.read(stream.fileno(), 4096):
                self._said += data
                del self._said[:-SAID_MAX]

    def _wait(self, began: float, ready: float) -> float:
        """Seconds from exec until it listens, to a millisecond. Nobody connects meanwhile.

        It may have bound the socket by another name, and given it this one when it listened.
        """
        own = f"{self._place}/"
        while True:
            for line in Path("/proc/net/unix").read_text().splitlines() if self.socket.exists() else ():
                words = line.split(None, 7)
                if len(words) == 8 and words[7].startswith(own) and words[3] == LISTENING:
                    return time.perf_counter() - began
            self.expect_alive("before it listened")
            if time.perf_counter() - began > ready:
                raise Failed(f"did not listen within {ready:g} s{self.last_words()}")
            time.sleep(0.001)

    def last_words(self) -> str:
        """The last line it said, for a message."""
        lines = self._said.decode(errors="replace").strip().splitlines()
        return f": {lines[-1][-160:]}" if lines else ""

    def expect_alive(self, when: str) -> None:
        """Failed: it has ended."""
        status = self._process.poll()
        if status is None:
            return
        self._reader.join(1)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise Failed(f"{how} {when}{self.last_words()}")

    def processes(self) -> list[int]:
        """The daemon and its descendants."""
        found, todo = [], [self._process.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            for task in tasks(pid):
                with contextlib.suppress(OSError):
                    todo += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        return found

    def threads(self) -> dict[int, str]:
        """Thread ids and names, of all its processes."""
        found = {}
        for pid in self.processes():
            for task in tasks(pid):
                with contextlib.suppress(OSError):
                    found[task] = Path(f"/proc/{pid}/task/{task}/comm").read_text().strip()
        return found

    def expect_threads(self, when: str) -> None:
        """The first time: note which there are. Later: Failed when one of them, or the daemon, has died.

        Threads of vfsd come as requests are slow, and go: of it each process has to live.
        """
        now = self.threads()
        if self.target.kind == "vfsd":
            now = {task: name for task, name in now.items() if task in self.processes()}
        if not self._threads:
            self._threads = now
        lost = sorted({name for task, name in self._threads.items() if task not in now})
        if lost:
            # The threads of a process that ends are gone before it can be waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self.expect_alive(when)
            raise Failed(f"its threads {', '.join(lost)} died")

    def cpu(self) -> float:
        """Seconds of CPU its threads that live have used, of all its processes."""
        total = 0
        for pid in self.processes():
            for task in tasks(pid):
                with contextlib.suppress(OSError):
                    total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
        return total / 1e9

    def resident(self) -> int:
        """Bytes of resident memory of all its processes, without shared memory: the guest's is."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith(("RssAnon", "RssFile")):
                        total += int(line.split()[1]) * 1024
        return total

    def kill(self) -> None:
        """At once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """SIGTERM, and SIGKILL to what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self.kill()
        self._reader.join(1)
        shutil.rmtree(self._place, ignore_errors=True)


def tasks(pid: int) -> list[int]:
    """The thread ids of a process; none when it has gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []
