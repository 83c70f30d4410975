"""SOCKET.pid, as virtiofsd makes it: of mode 0600, with the process's id, locked while it lives."""

from __future__ import annotations

import fcntl
import os

from vfsd.errors import HostError


class PidFile:
    """The locked file beside a socket. HostError: another daemon has it, or it can't be made."""

    def __init__(self, option: str, socket_path: str) -> None:
        self.path = f"{socket_path}.pid"
        try:
            self._fd = lock(self.path)
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            raise HostError(
                option,
                f"{self.path} is locked: a daemon serves {socket_path}; stop it or choose another path",
            ) from None
        except OSError as problem:
            raise HostError(
                option, f"{self.path} can't be written ({problem.strerror}); choose another path"
            ) from problem

    def close(self) -> None:
        """Remove it, where that is allowed."""
        try:
            if is_at(self._fd, self.path):
                os.unlink(self.path)
        except OSError:
            os.ftruncate(self._fd, 0)  # nobody shall signal a process that has this id later
        os.close(self._fd)


def lock(path: str) -> int:
    """A descriptor of the file, locked. BlockingIOError: somebody else has the lock."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # whoever had the lock has just removed it


def is_at(fd: int, path: str) -> bool:
    """Whether the path still names this file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
