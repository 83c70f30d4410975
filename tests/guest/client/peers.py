"""The daemons that the guest's tests run against: vfsd, QEMU's in C, and the Rust one where given.

The Rust one is the installed one, or VFSD_PEER_RUST is its command: with {socket} and {dir} to be
filled in, or without arguments, as `bench/get-peers` prints it. Where there is none its cases are skipped.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Self

from guests import QEMU_VIRTIOFSD, eventually, qemu_virtiofsd_command, vfsd_command

RUST_VIRTIOFSD = "/usr/libexec/virtiofsd"
RUST = os.environ.get("VFSD_PEER_RUST", "")
if not RUST and os.access(RUST_VIRTIOFSD, os.X_OK):
    RUST = RUST_VIRTIOFSD
if RUST and "{socket}" not in RUST:  # as bench/get-peers prints it
    RUST += " --shared-dir {dir} --socket-path {socket} --sandbox none --seccomp none --cache auto"
PEERS = ("vfsd", "qemu-virtiofsd", "rust-virtiofsd")
READY = {
    "vfsd": "READY",
    "qemu-virtiofsd": "Waiting for vhost-user socket connection",
    "rust-virtiofsd": "Waiting for vhost-user socket connection",
}


def missing(kind: str) -> str | None:
    """Why that daemon can't be run here."""
    if kind == "qemu-virtiofsd":
        if not os.access(QEMU_VIRTIOFSD, os.X_OK):
            return f"there is no {QEMU_VIRTIOFSD}"
        if os.geteuid() != 0:
            return "QEMU's virtiofsd needs root"
    if kind == "rust-virtiofsd" and not RUST:
        return f"there is no {RUST_VIRTIOFSD}, and VFSD_PEER_RUST is not set"
    return None


def command(kind: str, socket: Path, shared: Path, cache: str, options: tuple[str, ...]) -> list[str]:
    """options: xattr, or what only that daemon knows."""
    if kind == "vfsd":
        words = [f"--{option}" for option in options]
        return vfsd_command(socket, shared, tag=None, cache=cache, options=words)
    if kind == "qemu-virtiofsd":
        argv = qemu_virtiofsd_command(socket, shared, cache=cache)
        return argv + [word for option in options for word in ("-o", option)]
    return [*shlex.split(RUST.format(socket=socket, dir=shared)), *(f"--{option}" for option in options)]


class Peer:
    """A running daemon; a context manager. `log` is what it has said."""

    def __init__(self, kind: str, shared: Path, *, cache: str, options: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self._directory = Path(tempfile.mkdtemp(prefix="vfsd-"))
        self.socket = self._directory / "socket"
        self._lines: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            command(kind, self.socket, shared, cache, options), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(20)
        if not self.socket.exists():
            self.end()
            raise RuntimeError(f"{kind} did not start:\n{self.log}")

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self._lines.append(line)
                if READY[self.kind] in line:
                    self._ready.set()
        self._ready.set()

    def descriptors(self) -> int:
        """Of all its processes."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.processes())

    def processes(self) -> list[int]:
        """It, and the servers it has forked."""
        pid = self.process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def stop(self) -> None:
        """Hold it, so that it answers nothing."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        # Its threads go on for a moment.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        tasks = [task for pid in self.processes() for task in Path(f"/proc/{pid}/task").iterdir()]

        def stopped() -> bool:
            return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)

        assert eventually(stopped)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reader.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
        assert "Traceback" not in self.log, self.log
