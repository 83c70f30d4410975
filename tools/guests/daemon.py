"""Starts a virtio-fs daemon as a process of its own, waits for it, and ends it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

QEMU_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
# Not in the share, which a server has for its root: guest memory, and what a process has open.
ELSEWHERE = re.compile(rf"{os.devnull}|/memfd:.*|(/[0-9]+/fd)")


class DaemonError(Exception):
    """The daemon did not start, or did not end as it should."""


def vfsd_command(
    socket: Path, shared: Path, *, tag: str | None, cache: str, options: Sequence[str] = ()
) -> list[str]:
    """`vfsd serve`, by the interpreter that runs this."""
    return [
        *(sys.executable, "-m", "vfsd", "serve"),
        *("--socket", str(socket), "--shared-dir", str(shared)),
        *(("--tag", tag) if tag else ()),
        *("--cache", cache, *options),
    ]


def qemu_virtiofsd_command(socket: Path, shared: Path, *, cache: str) -> list[str]:
    """The daemon of QEMU 7.2, in C: a peer to compare with. Only for QEMU: it has no tag.

    Without what is preloaded for a sanitizer build of our own, which it does not run under.
    """
    cache = {"never": "none"}.get(cache, cache)
    return [
        *("env", "-u", "LD_PRELOAD", QEMU_VIRTIOFSD, "-f", f"--socket-path={socket}"),
        *("-o", f"source={shared}", "-o", "sandbox=chroot", "-o", f"cache={cache}"),
    ]


def children_of(pid: int) -> list[int]:
    """In the order they were made."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


class StartDaemon(Protocol):
    """Starts a daemon on a directory: what the test fixtures give."""

    def __call__(
        self, shared: Path, *, tag: str | None = ..., cache: str = ..., options: Sequence[str] = ...
    ) -> Daemon: ...


class Daemon:
    """A running daemon; a context manager.

    Standard error is read all the time and kept, so that the daemon never waits for us.
    """

    def __init__(
        self,
        shared: Path,
        *,
        tag: str | None = "myfs",
        cache: str = "auto",
        options: Sequence[str] = (),
        command: str = "vfsd",
        before: Sequence[str] = (),
        owner: int = -1,
        ready: float = 20,
    ) -> None:
        """Start, and return when the daemon listens.

        Args:
            shared: the directory to share.
            tag: name of the share; None for QEMU, which names it itself and whose versions 7.1 to
                8.0 crash on a daemon that has a tag.
            cache: never, auto, metadata or always.
            options: further arguments of `vfsd serve`.
            command: vfsd, or qemu-virtiofsd for QEMU's own daemon.
            before: a command that runs the one at its end, which is the daemon.
            owner: whose the socket's directory is; -1 for one's own.
            ready: seconds it may take until it listens.
        """
        self.shared = shared
        self.tag = tag
        # A socket's path is at most 107 bytes long, which a test's directory can exceed.
        self._directory = Path(tempfile.mkdtemp(prefix="vfsd-"))
        os.chown(self._directory, owner, -1)
        self.socket = self._directory / "socket"
        self.leaves_with_guest = command == "qemu-virtiofsd"
        if command == "vfsd":
            argv = vfsd_command(self.socket, shared, tag=tag, cache=cache, options=options)
            ready_text = "READY"
        elif command == "qemu-virtiofsd":
            argv = qemu_virtiofsd_command(self.socket, shared, cache=cache)
            ready_text = "Waiting for vhost-user socket connection"
        else:
            raise ValueError(f"unknown daemon {command!r}")
        self.argv = argv = [*before, *argv]
        self._lines: list[str] = []
        self._listens = threading.Event()
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(ready_text,), daemon=True)
        self._reader.start()
        self._listens.wait(ready)
        if not any(ready_text in line for line in self._lines):
            self.kill()
            raise DaemonError(f"did not start within {ready:g} s: {argv}\n{self.log}")

    @property
    def pid(self) -> int:
        """Process id of the daemon; of `vfsd serve`, which forks a server for each guest, its own."""
        return self._process.pid

    def children(self) -> list[int]:
        """Process ids of its children, one for each guest, in the order they were made."""
        return children_of(self.pid)

    def servers(self) -> list[int]:
        """Process ids of what serves guests: its children, or where these are keepers, theirs."""
        found = []
        for pid in self.children():
            with contextlib.suppress(FileNotFoundError):
                name = Path(f"/proc/{pid}/comm").read_text().rstrip()
                found += {"vfsd-keeper": children_of(pid), "vfsd-server": [pid]}.get(name, [])
        return found

    @property
    def server(self) -> int:
        """Process id of what serves the only guest there is."""
        (pid,) = self.servers()
        return pid

    @property
    def log(self) -> str:
        """What the daemon has written to standard error."""
        return "".join(self._lines)

    def processes(self) -> list[int]:
        """Process ids of all of it."""
        return [self.pid, *self.children(), *self.servers()]

    def signal_all(self, number: int) -> None:
        """To all its processes."""
        os.killpg(self.pid, number)

    def descriptors(self, *pids: int) -> list[str]:
        """What the open descriptors of those of its processes, or all, are: link targets without inode
        numbers, sorted. A keeper and its server have the same ones.
        """
        found = []
        for pid in pids or [self.pid, *self.children()]:
            with contextlib.suppress(FileNotFoundError):
                apart = os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
                for entry in os.scandir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(FileNotFoundError):
                        target = os.readlink(entry.path).partition(":[")[0]
                        elsewhere = ELSEWHERE.fullmatch(target)
                        if elsewhere:
                            target = "/proc" if elsewhere[1] else target
                        elif apart and target.startswith("/"):
                            target = f"{self.shared}{target}".rstrip("/")  # it has the share for its root
                        found.append(target)
        return sorted(found)

    def resident(self) -> dict[str, int]:
        """Resident memory of all its processes, in KiB by kind: Anon, File and Shmem (guest memory is Shmem).

        What two of them share counts twice.
        """
        found: Counter[str] = Counter()
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("Rss"):
                        found[line.split(":")[0].removeprefix("Rss")] += int(line.split()[1])
        return dict(found)

    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def stop(self, timeout: float = 20) -> None:
        """End with SIGTERM.

        Raises:
            DaemonError: it did not end in time, not with status 0, left its socket behind, or wrote
                a traceback at any time.
        """
        problems = []
        if not self.leaves_with_guest and not self.running():
            problems.append(f"had ended before it was told to, status {self._process.returncode}")
        else:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            problems.append(f"still ran {timeout:g} s after SIGTERM")
        else:
            if status != 0 and not self.leaves_with_guest:
                problems.append(f"ended with status {status}")
            if self.socket.exists() and not self.leaves_with_guest:
                problems.append("left its socket behind")
        self.kill()
        if "Traceback" in self.log:
            problems.append("wrote a traceback")
        if problems:
            raise DaemonError(f"the daemon {', '.join(problems)}\n{self.log[-8000:]}")

    def kill(self) -> None:
        """End at once; nothing is checked."""
        if self.running():
            self._process.kill()
        self._process.wait()
        self._reader.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.kill()

    def _read(self, ready_text: str) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self._lines.append(line)
                if ready_text in line:
                    self._listens.set()
        self._listens.set()


def eventually(condition: Callable[[], bool], timeout: float = 10) -> bool:
    """Whether `condition` becomes true within `timeout` seconds: for what no event announces."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.01)
    return True
