from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from vfsd.guest.buffer import Buffer
from vfsd.memory._regions import GuestMemory

__all__ = ("RingPlace", "Transport")

class RingPlace(NamedTuple):
    """Where one queue lies and how it is kicked. desc, avail, used: user addresses."""

    num: int
    desc: int
    avail: int
    used: int
    indirect: int | None  # guest physical address of the indirect tables
    kick_fd: int
    kick_message: bytes
    call_fd: int

@final
class Transport:
    """The queues of one device. Index 0 is hiprio, 1 and up are request queues."""

    def __new__(
        cls,
        memory: GuestMemory,
        rings: Sequence[RingPlace],
        arena_gpa: int,
        slots: int,
        max_pages: int,
        event_idx: bool = True,
        scramble: int = 0,
        poll: bool = False,
    ) -> Transport: ...
    on_broken: Callable[[str], None] | None  # a queue is given up: called with the reason in its thread
    @property
    def names(self) -> list[str]: ...
    @property
    def max_pages(self) -> int: ...
    @staticmethod
    def arena_bytes(slots: int, max_pages: int, hiprio_num: int) -> int:
        """How much guest memory that many slots take."""
    def start(self) -> None:
        """Start the completion threads and the worker."""
    def call(
        self,
        opcode: int,
        nodeid: int,
        args: bytes = b"",
        *,
        out: int = 0,
        argvar: bool = False,
        data: Buffer | None = None,
        into: Buffer | None = None,
        uid: int = 0,
        gid: int = 0,
        pid: int = 0,
        extlen: int = 0,
        queue: int | None = None,
    ) -> tuple[bytes, int]:
        """Send one request and wait: (out arguments, bytes written to `into`).

        args: all in arguments that are no data, concatenated. out: bytes of out arguments.
        argvar: the last of them, or `into`, may come shorter. data: goes out in pages. into:
        filled from pages. queue: a request queue; None takes this thread's.
        OSError: the reply's errno, or ENOTCONN, EIO (a reply that is none), E2BIG (longer than the
        ring or than max_pages allows), ENOMEM."""
    def submit(
        self,
        done: Callable[[int, bytes, bytes], None],
        opcode: int,
        nodeid: int,
        args: bytes = b"",
        *,
        out: int = 0,
        argvar: bool = False,
        data: Buffer | None = None,
        into: int = 0,
        uid: int = 0,
        gid: int = 0,
        pid: int = 0,
        extlen: int = 0,
        queue: int | None = None,
        may_block: bool = False,
    ) -> None:
        """The same without waiting: done(errno or 0, out arguments, data of `into` bytes at most),
        in another thread; in one of its own with may_block."""
    def forget(self, nodeid: int, nlookup: int) -> None:
        """One FORGET on hiprio, no reply."""
    def drain(self) -> None:
        """Wait until nothing is in flight on any queue. A device that never answers is waited for."""
    def drain_queue(self, queue: int) -> None: ...
    def disconnect(self, queue: int | None = None) -> None:
        """New requests on that queue, or all, end with ENOTCONN; new forgets are dropped."""
    def connect(self) -> None:
        """Undo disconnect()."""
    def restart_unique(self) -> None:
        """unique starts at 2 again (a new mount)."""
    def abort(self, error: int) -> None:
        """The device is gone: everything in flight ends with that errno, new requests with ENOTCONN."""
    def close(self) -> None:
        """abort(ENOTCONN) and end the threads. Idempotent."""
    @property
    def in_flight(self) -> int: ...
    def counters(self) -> dict[str, dict[str, int]]:
        """By queue name: requests, kicks, calls, in_flight, queued, retries; "opcodes": requests by name."""
