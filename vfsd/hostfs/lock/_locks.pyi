from typing import final

__all__ = ("Locks",)

@final
class Locks:
    """The locks of one share's guests, and the thread that wakes those who wait."""

    def __new__(cls) -> Locks: ...
    def start(self) -> None:
        """Start the thread, unless it runs."""
    def close(self) -> None:
        """End the thread. No guest may hold or wait for anything. Idempotent."""
    def counts(self) -> dict[str, int]:
        """Now: waiters; holds, each one owner's locks on one file."""
