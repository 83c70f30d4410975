from typing import final

__all__ = ("Segment",)

@final
class Segment:
    """The memory that the servers of a share have in common, to the supervisor. OSError.

    Its pages are taken as they are used: two, and one or more for each server."""

    def __new__(cls) -> Segment: ...
    def reserve(self) -> int:
        """A partition for a server to be forked; -1 when there are too many servers."""
    def release(self, index: int) -> None:
        """The server of a partition has ended, or was not made: what it held can be had."""
