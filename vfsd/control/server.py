"""The daemon's end of the control socket. Nobody who connects can make the supervisor wait or grow."""

import logging
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from vfsd.control import methods, rpc

log = logging.getLogger("vfsd.control")

CLIENTS_MAX: Final = 16
SILENT_S: Final = 30.0  # for the next request, or for a reply to be taken
UNREAD_MAX: Final = 1 << 20  # bytes of replies that a client has not taken
PAUSE_S: Final = 1.0  # where descriptors are short
READ_BYTES: Final = 16 << 10  # at a time: then others have their turn
UCRED: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Listener(Protocol):
    """A listening socket. close(): idempotent, and its file goes too."""

    @property
    def sock(self) -> socket.socket: ...
    def close(self) -> None: ...


class Loop(Protocol):
    """Of the supervisor, which waits for descriptors."""

    def watch(self, fd: int, source: Callable[[], None], events: int = select.EPOLLIN) -> None: ...
    def unwatch(self, fd: int) -> None: ...


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.unsent = bytearray()
        self.until = time.monotonic() + SILENT_S
        self.closed = False
        self.asks = False  # its request has no result yet
        self.last = False  # it is told why, and no more

    def is_over(self) -> bool:
        return self.last and not self.unsent


class ControlSocket:
    """Accepts clients of the daemon's own user and of root, and answers their requests."""

    def __init__(self, listener: Listener, daemon: methods.Daemon, loop: Loop) -> None:
        self._listener = listener
        self._daemon = daemon
        self._loop = loop
        self._clients: dict[int, Client] = {}  # by descriptor, oldest first
        self._paused_until: float | None = None
        loop.watch(listener.sock.fileno(), self._accept)

    def deadline(self) -> float | None:
        """When to look() (time.monotonic())."""
        deadlines = [client.until for client in self._clients.values()]
        if self._paused_until is not None:
            deadlines.append(self._paused_until)
        return min(deadlines, default=None)

    def look(self, now: float) -> None:
        """At who is silent, and whether more can be taken again."""
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
            self._loop.watch(self._listener.sock.fileno(), self._accept)
        for client in [client for client in self._clients.values() if now >= client.until]:
            self._drop(client)

    def close_in_server(self) -> None:
        """In a forked process: the descriptors alone."""
        self._listener.sock.close()
        for client in self._clients.values():
            client.sock.close()

    def close(self) -> None:
        """Idempotent."""
        for client in list(self._clients.values()):
            self._drop(client)
        if self._listener.sock.fileno() >= 0:
            self._loop.unwatch(self._listener.sock.fileno())
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.sock.accept()
        except BlockingIOError:
            return
        except OSError as problem:
            log.error("the control socket takes nobody now: %s", problem.strerror)
            self._loop.unwatch(self._listener.sock.fileno())
            self._paused_until = time.monotonic() + PAUSE_S
            return
        sock.setblocking(False)
        uid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))[1]
        if uid not in (0, os.geteuid()):
            log.warning("the user %d may not use the control socket", uid)
            sock.close()
            return
        if len(self._clients) >= CLIENTS_MAX:
            self._drop(next(iter(self._clients.values())))
        client = self._clients[sock.fileno()] = Client(sock)
        self._loop.watch(sock.fileno(), lambda: self._serve(client))

    def _drop(self, client: Client) -> None:
        if client.closed:
            return
        client.closed = True
        del self._clients[client.sock.fileno()]
        self._loop.unwatch(client.sock.fileno())
        client.sock.close()

    def _serve(self, client: Client) -> None:
        if client.unsent:
            self._send(client)
            return
        try:
            received = client.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._drop(client)
            return
        client.received += received
        self._answer_lines(client)

    def _answer_lines(self, client: Client) -> None:
        """Those that have come, one after the other: none before the last has its result."""
        while not client.closed and not client.last and not client.asks:
            line, newline, rest = client.received.partition(b"\n")
            if len(line) >= rpc.LINE_MAX:
                too_long = rpc.RpcError(rpc.INVALID_REQUEST, f"a request has at most {rpc.LINE_MAX} bytes")
                self._reply(client, rpc.error(None, too_long), last=True)
                return
            if not newline:
                break
            client.received = rest
            client.until = time.monotonic() + SILENT_S
            self._answer(client, bytes(line))
        self._wait_for(client)

    def _answer(self, client: Client, line: bytes) -> None:
        try:
            request = rpc.parse(line)
        except rpc.RpcError as problem:
            self._reply(client, rpc.error(None, problem))
            return

        at_once = True

        def done(value: Any) -> None:
            client.asks = False
            if request.id is not None:
                self._reply(client, rpc.result(request.id, value))
            if not at_once:
                self._answer_lines(client)

        client.asks = True
        try:
            methods.call(self._daemon, request, done)
            at_once = False
        except rpc.RpcError as problem:
            client.asks = False
            if request.id is not None:
                self._reply(client, rpc.error(request.id, problem))

    def _reply(self, client: Client, message: bytes, last: bool = False) -> None:
        """last: the connection ends when it has been taken."""
        if client.closed:
            return
        client.last = last
        client.unsent += message
        if len(client.unsent) > UNREAD_MAX:
            self._drop(client)
            return
        self._send(client)

    def _send(self, client: Client) -> None:
        try:
            sent = client.sock.send(client.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(client)
            return
        del client.unsent[:sent]
        if client.is_over():
            self._drop(client)
        else:
            self._wait_for(client)

    def _wait_for(self, client: Client) -> None:
        """Nothing more is read from who does not take replies, or has no result yet."""
        if client.closed:
            return
        events = select.EPOLLOUT if client.unsent else 0 if client.asks else select.EPOLLIN
        self._loop.unwatch(client.sock.fileno())
        self._loop.watch(client.sock.fileno(), lambda: self._serve(client), events)
