"""The sockets that front ends come by: made at a path, or handed over by who started the daemon.

They are there before the rest of the daemon is imported, so this uses what lies below Python's socket.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat

from vfsd.errors import ConfigError, HostError
from vfsd.options.checks import SOCKET_PATH_BYTES, socket_place

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from socket import socket

    from vfsd.options.table import ServeOptions

BACKLOG = 128
OWNER_ONLY, GROUP_TOO = 0o077, 0o007  # umask


class Listener:
    """A listening socket whose file, if it made one, goes with it; or a connected one.

    path: None where the file is not this daemon's to remove.
    """

    def __init__(self, opened: _socket.socket, path: str | None = None) -> None:
        self.connected = not opened.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)
        opened.setblocking(False)
        self._opened = opened
        self._sock: socket | None = None
        self.path = opened.getsockname() if path is None else path
        self._path = path
        self._inode = None if path is None else os.lstat(path).st_ino

    @property
    def sock(self) -> socket:
        if self._sock is None:
            from socket import socket

            self._sock = socket(fileno=self._opened.detach())
        return self._sock

    def has_file(self) -> bool:
        """Whether its socket is still what its path names."""
        try:
            return self._path is not None and os.lstat(self._path).st_ino == self._inode
        except OSError:
            return False

    def stop(self) -> None:
        """Nobody can connect any more; the file stays."""
        self.sock.close()

    def close(self) -> None:
        """Idempotent."""
        if self._path is not None:
            self._unlink(self._path)
            self._path = None
        self._opened.close()
        if self._sock is not None:
            self._sock.close()

    def _unlink(self, path: str) -> None:
        # Another daemon may have taken the path after this socket was unlinked by hand.
        try:
            if os.lstat(path).st_ino == self._inode:
                os.unlink(path)
        except FileNotFoundError:
            pass
        except PermissionError:
            from logging import getLogger

            # Root of a user namespace, who is not the user that made it.
            getLogger("vfsd").warning("%s stays: its directory is not this daemon's", path)


def open_socket(
    options: ServeOptions, replaced: Listener | None = None, handed: Mapping[str, int] | None = None
) -> Listener:
    """Of --socket or --fd. ConfigError.

    replaced: this daemon's own of the same path. handed: descriptors of sockets that others listen on for it,
    by socket_place(); they stay open, as a share may come back.
    """
    if options.fd is not None:
        return Listener(adopt(options.fd))
    assert options.socket is not None
    fd = (handed or {}).get(socket_place(options.socket))
    if fd is not None:
        if options.socket_group is not None:
            raise ConfigError("--socket-group", "systemd made the socket; use SocketGroup= of its unit")
        return Listener(adopt(os.dup(fd)))
    return listen(options.socket, options.socket_group, replaced)


def open_control(options: ServeOptions) -> Listener | None:
    """Of --control-socket. ConfigError."""
    if options.control_socket is None:
        return None
    return listen(options.control_socket, option="--control-socket")


def check_all_used(handed: Mapping[str, int], served: Iterable[ServeOptions]) -> None:
    """ConfigError: a socket was handed over that nobody would answer at."""
    used = {socket_place(options.socket) for options in served if options.socket is not None}
    for path in handed.keys() - used:
        raise ConfigError("LISTEN_FDS", f"{path} is no share's socket; give it to a share, or end its unit")


def listen(
    path: str, group: int | None = None, replaced: Listener | None = None, option: str = "--socket"
) -> Listener:
    """On a socket at that path, for the daemon's user or for that group too.

    A stale one there is replaced, a live or foreign file is not. HostError.
    """
    if replaced is None or not replaced.has_file():
        remove_stale(path, option)
    # Who sees the path can connect: it gets its name once it listens.
    staged = f"{path}.{os.getpid()}"
    if len(os.fsencode(staged)) > SOCKET_PATH_BYTES:
        staged = path
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    mask = os.umask(OWNER_ONLY if group is None else GROUP_TOO)
    try:
        sock.bind(staged)
        if group is not None:
            option = "--socket-group"
            os.chown(staged, -1, group)
        sock.listen(BACKLOG)
        os.rename(staged, path)
    except OSError as problem:
        if sock.getsockname():
            os.unlink(staged)
        sock.close()
        advice = "name a group of yours" if option == "--socket-group" else "choose another path"
        raise HostError(option, f"can't listen on {path} ({problem.strerror}); {advice}") from problem
    finally:
        os.umask(mask)
    return Listener(sock, path)


def adopt(fd: int) -> _socket.socket:
    """What was handed over as that descriptor, which listens or is connected. HostError."""
    try:
        sock = _socket.socket(fileno=fd)
    except OSError as problem:
        raise HostError(
            "--fd", f"descriptor {fd} is no socket ({problem.strerror}); hand a listening one over"
        ) from problem
    if sock.family != _socket.AF_UNIX or sock.type != _socket.SOCK_STREAM:
        sock.detach()
        raise HostError("--fd", f"descriptor {fd} is no stream socket of AF_UNIX; hand one over")
    listens = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)
    if not listens and not is_connected(sock):
        sock.detach()
        raise HostError("--fd", f"descriptor {fd} neither listens nor is connected; make it do so first")
    os.set_inheritable(fd, False)
    return sock


def is_connected(sock: _socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def remove_stale(path: str, option: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise HostError(option, f"{path} is no socket; remove it or choose another path")
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    # A daemon whose backlog is full is alive too.
    probe.setblocking(False)
    problem = probe.connect_ex(path)
    probe.close()
    if problem != errno.ECONNREFUSED:
        raise HostError(option, f"a daemon listens on {path}; stop it or choose another path")
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
