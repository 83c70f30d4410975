"""Listening sockets."""

import errno
import logging
import os
import socket
import stat
from contextlib import suppress

from vfsd.errors import ConfigError

log = logging.getLogger("vfsd")

BACKLOG = 128


class Listener:
    """A listening socket whose file, if it made one, goes with it.

    sock: listens already. path: None where the file is not this daemon's to remove.
    """

    def __init__(self, sock: socket.socket, path: str | None = None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._path = path
        self._inode = None if path is None else os.lstat(path).st_ino

    def close(self) -> None:
        """Idempotent."""
        if self._path is not None:
            self._unlink(self._path)
            self._path = None
        self.sock.close()

    def _unlink(self, path: str) -> None:
        # Another daemon may have taken the path after this socket was unlinked by hand.
        try:
            if os.lstat(path).st_ino == self._inode:
                os.unlink(path)
        except FileNotFoundError:
            pass
        except PermissionError:
            # Root of a user namespace, who is not the user that made it.
            log.warning("%s stays: its directory is not this daemon's", path)


def listen(path: str) -> Listener:
    """On a socket at that path; a stale one there is replaced, a live or foreign file is not. ConfigError."""
    remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o077)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as problem:
        sock.close()
        raise ConfigError(
            "--socket", f"can't listen on {path} ({problem.strerror}); choose another path"
        ) from problem
    finally:
        os.umask(mask)
    return Listener(sock, path)


def remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError("--socket", f"{path} is no socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A daemon whose backlog is full is alive too.
        probe.setblocking(False)
        problem = probe.connect_ex(path)
    if problem != errno.ECONNREFUSED:
        raise ConfigError("--socket", f"a daemon listens on {path}; stop it or choose another path")
    with suppress(FileNotFoundError):
        os.unlink(path)
