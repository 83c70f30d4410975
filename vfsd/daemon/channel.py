"""What a server tells its supervisor, which believes none of it, and the other way: a packet for each thing.

A server that a guest has taken over can send anything; it can't make the supervisor wait or grow.
"""

import socket
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from typing import Final

PACKET_MAX: Final = 2048  # bytes
PACKETS_PER_CALL: Final = 16  # then the supervisor looks at others


class Kind(StrEnum):
    SERVED = "served"  # the front end's first message has been answered
    ENDING = "ending"  # why the connection ends; what follows may take its time
    FAULT = "fault"  # the same, when it is something to look into
    ENDED = "ended"  # what it did, in numbers
    REFUSED = "refused"  # the number of a system call that its sandbox does not allow
    REPORT = "report"  # what it has done so far, when the supervisor has asked with the same
    LOG_LEVEL = "log-level"  # of the supervisor: what to log from now on


KINDS: Final = {str(kind): kind for kind in Kind}


class Channel:
    """One end of it. Its owner closes it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    def fileno(self) -> int:
        return self.sock.fileno()

    def tell(self, kind: Kind, text: str = "") -> None:
        """To one that may have ended, or is behind."""
        with suppress(OSError):
            self.sock.send(f"{kind} {text}".encode(errors="backslashreplace")[:PACKET_MAX])

    def told(self) -> Iterator[tuple[Kind, str]]:
        """What has come. EOFError when the other end is closed."""
        for _ in range(PACKETS_PER_CALL):
            try:
                packet = self.sock.recv(PACKET_MAX)
            except BlockingIOError:
                return
            except OSError as problem:
                raise EOFError from problem
            if not packet:
                raise EOFError
            kind, _, text = packet.decode(errors="replace").partition(" ")
            if kind in KINDS:
                yield KINDS[kind], "".join(c if c.isprintable() else "?" for c in text)

    def close(self) -> None:
        self.sock.close()


def pair() -> tuple[Channel, Channel]:
    """OSError when there are no descriptors for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), Channel(theirs)
