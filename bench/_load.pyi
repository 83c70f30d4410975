from typing import final

from vfsd.guest.driver._transport import Transport

from .steps import Program

__all__ = ("Load",)

@final
class Load:
    """A program on a transport. One start() at a time; its results can be read when wait_fd is ready."""

    def __new__(cls, transport: Transport, program: Program, depth: int, queues: int) -> Load:
        """depth: operations under way. queues: the request queues, from the first, to spread them over."""
    @property
    def program(self) -> Program: ...
    @property
    def wait_fd(self) -> int: ...
    def start(self, seconds: float, ops_min: int = 0, whole: bool = False, seed: int = 0) -> None:
        """Begin, and count from zero.

        No operation begins after `seconds`, once each queue has done ops_min. whole: compare all
        that is read. seed: of what is written or read, if not 0.
        """
    def stop(self) -> None:
        """No operation begins any more; those under way are ended."""
    def finish(self) -> None:
        """Give the slots back, after wait_fd could be read."""
    @property
    def progress(self) -> int:
        """Requests answered so far; at any time."""
    @property
    def failure(self) -> tuple[int, int, int, int] | None:
        """None, or (step, code of Wrong, got, wanted), of the first reply that was wrong."""
    def totals(self) -> tuple[int, int, int, int, int]:
        """(operations, requests, bytes of data, entries, ns when the last ended by the monotonic clock)."""
    def begun(self) -> list[int]:
        """By queue: operations begun, whose items are number * queues + queue."""
    def histogram(self, queue: int, which: int) -> tuple[int, int, int, int, bytes]:
        """As _measure.count: of operations (0) or a step (1 and up)."""
