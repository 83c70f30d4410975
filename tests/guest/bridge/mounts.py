"""A daemon's directory mounted by `vfsd mount`, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guests import QEMU_VIRTIOFSD, Daemon

from vfsd.guest.bridge.mounting import MNT_DETACH, MNT_FORCE, mount_table, unmount

WORKLOADS = Path(__file__).resolve().parent / "workloads"


def missing() -> str | None:
    """What is missing to mount anything at all."""
    if os.geteuid() != 0:
        return "only root may mount"
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    return None


def peer_missing(peer: str) -> str | None:
    """What is missing to start this daemon."""
    if peer == "qemu-virtiofsd" and not os.path.exists(QEMU_VIRTIOFSD):
        return f"there is no {QEMU_VIRTIOFSD}"
    return None


def is_mounted(directory: Path) -> bool:
    """Whether anything is mounted there; asks no file system."""
    return any(entry.point == str(directory) for entry in mount_table())


def force_unmount(directory: Path) -> None:
    """End what is mounted there, whatever state it is in: who waits for it gets an error."""
    while is_mounted(directory):
        with contextlib.suppress(OSError):
            unmount(str(directory), MNT_FORCE | MNT_DETACH)


class MountCommand:
    """A running `vfsd mount`. Standard error is read all the time and kept."""

    def __init__(self, socket: Path, directory: Path, *options: str, ready: float = 20) -> None:
        self.directory = directory
        self._lines: list[str] = []
        self._known = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vfsd", "mount", "--socket", str(socket), str(directory), *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._known.wait(ready)
        if "READY" not in self.log:
            self.kill()
            raise AssertionError(f"vfsd mount did not become ready:\n{self.log}")

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self._lines.append(line)
                if "READY" in line:
                    self._known.set()
        self._known.set()

    def end(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Send a signal and wait: the exit status."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 20) -> int:
        """The exit status, once it ends by itself."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def kill(self) -> None:
        """End at once, the mount too; nothing is checked."""
        force_unmount(self.directory)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()


@dataclass
class Mounted:
    """`share` on the host is mounted at `root`. serve, options: arguments of the commands."""

    peer: str
    share: Path
    root: Path
    daemon: Daemon
    command: MountCommand

    def run(self, *argv: object, timeout: float = 60) -> str:
        """Run a program, in `root`: what it prints. One that hangs is given an error to end with."""
        process = subprocess.Popen(
            [str(word) for word in argv], cwd=self.root, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            force_unmount(self.root)
            process.kill()
            printed, _ = process.communicate()
            raise AssertionError(f"{argv} still ran after {timeout:g} s:\n{printed[-4000:]}") from None
        assert process.returncode == 0, f"{argv} ended with {process.returncode}:\n{printed[-4000:]}"
        return printed

    def workload(self, name: str, *argv: object, timeout: float = 60) -> str:
        """Run one of the programs in workloads/."""
        return self.run(sys.executable, WORKLOADS / name, *argv, timeout=timeout)


@contextlib.contextmanager
def mounting(
    directory: Path, peer: str, serve: tuple[str, ...] = (), options: tuple[str, ...] = ()
) -> Iterator[Mounted]:
    """Start the daemon and mount it, with the share and the mount point below `directory`."""
    share, root = directory / "share", directory / "mnt"
    share.mkdir(exist_ok=True)
    root.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, share, ignore_errors=True)
        daemon = Daemon(share, command=peer, options=serve)
        stack.callback(daemon.kill)
        command = MountCommand(daemon.socket, root, *options)
        stack.callback(command.kill)
        yield Mounted(peer, share, root, daemon, command)
        if command.process.poll() is None:
            assert command.end() == 0, command.log
        assert "Traceback" not in command.log, command.log
        assert not is_mounted(root)
        if daemon.running() or not daemon.leaves_with_guest:
            daemon.stop()


def readable(fd: int, timeout: float) -> bool:
    """Whether there is something to read within that time."""
    return bool(select.select([fd], [], [], timeout)[0])
