"""A booted guest that runs shell commands: what user-mode Linux and QEMU have in common."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

HERE = Path(__file__).resolve().parent


# A serial line holds 4096 bytes that nobody has read yet; a longer command belongs in a file.
COMMAND_BYTES = 2800

# Tmpfs: user-mode Linux maps its memory from a file there, and that file has to be shareable.
SHARED_MEMORY = Path("/dev/shm")


class GuestError(Exception):
    """The guest could not be started, or went away."""


class GuestTimeout(GuestError):
    """A command or the boot did not end in time; the guest has been killed."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest did."""

    status: int
    """Exit status as the guest's shell has it: 128 + n for signal n."""
    output: str
    """Standard output and standard error, undecodable bytes as surrogates."""
    seconds: float


class Guest(ABC):
    """A guest kernel with a command channel.

    Sub-classes name the process to start. The guest runs in a session of its own, so that `kill`
    also ends the helper processes user-mode Linux makes. Console output goes to a file, whose end
    is part of every error.
    """

    kind: str
    share = "/mnt/share"
    files = "/mnt/files"
    boot_seconds: float = 60

    def __init__(
        self,
        socket_path: Path | None,
        *,
        tag: str = "myfs",
        memory: int = 512,
        files: Path | None = None,
    ) -> None:
        """Describe a guest; `start` boots it.

        Args:
            socket_path: where the daemon listens; None boots without a virtio-fs device.
            tag: what the daemon, or for QEMU the device, calls the share.
            memory: guest memory in MiB.
            files: a directory of the host that the guest sees, read-only, as ``/mnt/files``.
        """
        self.socket_path = socket_path
        self.tag = tag
        self.memory = memory
        self.host_files = files.resolve() if files else None
        self._nonce = secrets.token_hex(8)
        self._steps = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._pending = b""
        self._work: Path | None = None

    @abstractmethod
    def _arguments(self, channel: int, work: Path) -> list[str]:
        """Command line of the guest's process; `channel` is the descriptor of the serial line."""

    @property
    def python(self) -> str:
        """The interpreter that exists in the guest: the one the virtual environment is made of."""
        return os.path.realpath(getattr(sys, "_base_executable", sys.executable))

    @property
    def pid(self) -> int:
        """Process id of the guest on the host."""
        if self._process is None:
            raise GuestError("the guest is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether commands can be run."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Boot, and return when commands can be run."""
        if self._process is not None:
            raise GuestError("the guest is running already")
        self._work = Path(tempfile.mkdtemp(prefix="guest-", dir=SHARED_MEMORY))
        ours, theirs = socket.socketpair()
        try:
            with theirs, (self._work / "console").open("wb") as console:
                self._process = subprocess.Popen(
                    self._arguments(theirs.fileno(), self._work),
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"TMPDIR": str(self._work), "HOME": str(self._work)},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            self._channel = ours
            self._read_until_marker(0, time.monotonic() + self.boot_seconds, "boot")
        except BaseException:
            ours.close()
            self.kill()
            raise
        return self

    def mount(self, options: str = "") -> None:
        """Mount the share on `share`."""
        flags = f"-o {shlex.quote(options)} " if options else ""
        self.check(f"mount -t virtiofs {flags}{shlex.quote(self.tag)} {self.share}")

    def run(self, command: str, timeout: float = 60) -> Result:
        """Run a shell command; its standard input is empty, its directory /tmp.

        Raises:
            GuestTimeout: after `timeout` seconds; the guest is dead then.
            GuestError: the guest went away.
        """
        if self._channel is None:
            raise GuestError("the guest is not running")
        if len(command.encode()) > COMMAND_BYTES:
            raise ValueError(f"command over {COMMAND_BYTES} bytes: put it into a file")
        self._steps += 1
        encoded = base64.b64encode(command.encode()).decode()
        started = time.monotonic()
        self._send(f"{self._steps} {encoded}\n")
        status, output = self._read_until_marker(self._steps, started + timeout, command)
        seconds = time.monotonic() - started
        return Result(status, os.fsdecode(output), seconds)

    def check(self, command: str, timeout: float = 60) -> str:
        """Output of a shell command that must succeed."""
        result = self.run(command, timeout)
        if result.status != 0:
            raise AssertionError(
                f"in the guest, exit status {result.status}: {command}\n{result.output}"
            )
        return result.output

    def workload(self, name: str, *arguments: str, timeout: float = 60) -> str:
        """Output of the Python script `name` below `files`, which must succeed."""
        words: Sequence[str] = (self.python, "-S", f"{self.files}/{name}", *arguments)
        return self.check(shlex.join(words), timeout)

    def poweroff(self, timeout: float = 30) -> None:
        """Unmount the share, power off, and wait for the guest's process to end with status 0."""
        if self._process is None:
            return
        try:
            self.run(f"sync; umount {self.share}", timeout)
            self._send("poweroff\n")
            try:
                status = self._process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                raise GuestTimeout(self._describe("did not power off")) from error
            if status != 0:
                raise GuestError(self._describe(f"ended with status {status}"))
        finally:
            self.kill()

    def kill(self) -> None:
        """End every process of the guest at once, and forget it."""
        process, self._process = self._process, None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._pending = b""
        if process is not None:
            # Also after an orderly end: helper processes are in the same session. The first one goes
            # first: while it lives it can make more of them.
            process.kill()
            process.wait()
            while members := _session_members(process.pid):
                for member in members:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(member, signal.SIGKILL)
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work = None

    def console(self) -> str:
        """What the guest's kernel has printed."""
        if self._work is None:
            return ""
        return (self._work / "console").read_bytes().decode(errors="replace")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.poweroff()
        else:
            self.kill()

    def _send(self, line: str) -> None:
        assert self._channel is not None
        try:
            self._channel.sendall(line.encode())
        except OSError as error:
            raise self._lost("went away") from error

    def _read_until_marker(self, step: int, deadline: float, what: str) -> tuple[int, bytes]:
        """Collect output up to the line with our nonce; the nonce is not known to the commands."""
        assert self._channel is not None
        marker = f"{self._nonce} {step} ".encode()
        while True:
            before, found, after = self._pending.partition(marker)
            line, newline, rest = after.partition(b"\n")
            if found and newline:
                self._pending = rest
                return int(line), before.removesuffix(b"\n")
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._channel], [], [], left)[0]:
                raise self._lost(f"had no answer in time to: {what}", GuestTimeout)
            try:
                data = self._channel.recv(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                raise self._lost(f"went away during: {what}")
            self._pending += data

    def _lost(self, problem: str, kind: type[GuestError] = GuestError) -> GuestError:
        """The error to raise; the guest is killed: its process may live on for a moment without its line."""
        error = kind(self._describe(problem))
        self.kill()
        return error

    def _describe(self, problem: str) -> str:
        """One error text: what happened, unread output, and the end of the console."""
        tail = "\n".join(self.console().splitlines()[-25:])
        unread = self._pending[-2000:].decode(errors="replace")
        return f"the {self.kind} guest {problem}\n--- output\n{unread}\n--- console\n{tail}"


def _session_members(session: int) -> list[int]:
    """Live processes of a session, from /proc; a member that is a zombie does not count."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The command's name, in brackets, may hold spaces; then state, parent, group, session.
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.name))
    return members
