from typing import final

from vfsd.hostfs.lock._published import Segment

__all__ = ("Locks",)

@final
class Locks:
    """The locks of one share's guests, and the thread that wakes those who wait."""

    segment: Segment  # what the servers of the share have in common
    def __new__(cls) -> Locks: ...
    def join(self, partition: int) -> None:
        """In a server, before there are guests: share with those of the other partitions. OSError.

        -1: it is alone with its guest, as far as waiting is concerned."""
    def recover(self) -> None:
        """After the death of a server: nothing of what it has told others is so any more."""
    def start(self) -> None:
        """Start the thread, unless it runs."""
    def close(self) -> None:
        """End the thread. No guest may hold or wait for anything. Idempotent."""
    def counts(self) -> dict[str, int]:
        """Now: waiters; holds, each one owner's locks on one file."""
