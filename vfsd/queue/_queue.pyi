from typing import final

from vfsd.fuse.dispatch import Dispatch
from vfsd.memory._regions import GuestMemory
from vfsd.queue._pool import Pool

__all__ = ("Queue",)

@final
class Queue:
    """One virtqueue of one connection and the thread that serves it, or two that take turns."""

    index: int
    name: str
    num: int
    def __new__(
        cls,
        index: int,
        name: str,
        dispatch: Dispatch,
        pool: Pool,
        poll_us: int = 0,
        lingers: bool = False,
    ) -> Queue: ...
    def start(
        self, memory: GuestMemory, num: int, desc: int, avail: int, used: int, base: int, event_idx: bool
    ) -> None:
        """Set the ring up (user addresses) and start the thread; it looks at the ring at once.

        ValueError: a size that is no power of two, or a part of the ring outside memory."""
    def stop(self) -> int:
        """Finish what is in flight, end the thread, give the next avail index. Not started: 0."""
    @property
    def started(self) -> bool: ...
    @property
    def broken(self) -> int:
        """0, or the ring code (negative) that stopped this queue until it is started anew."""
    def set_kick(self, fd: int) -> None:
        """Own fd (a duplicate is not made); -1: no fd, kick() or polling by the caller."""
    def set_call(self, fd: int, message: bytes = ...) -> None:
        """Own fd; `message` is what is written to call the guest: 8 bytes counter by default, or a
        whole VRING_CALL message where fd is (a duplicate of) the back-end channel. -1: no calls."""
    def set_err(self, fd: int) -> None: ...
    def kick(self) -> None: ...
    def pause(self, jobs: bool = True) -> None:
        """Return when no request of this queue is being worked on; none is begun until resume()."""
    def resume(self) -> None: ...
    def close(self) -> None:
        """stop() and close every descriptor. Idempotent."""
    def counters(self) -> dict[str, dict[str, int]]:
        """By opcode name: requests, errors, bytes_in, bytes_out; and "ring": codes by text."""
