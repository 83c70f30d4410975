"""Notices that a daemon answers nothing, though it has been asked."""

from __future__ import annotations

import time

from vfsd.guest.driver._transport import Transport

from ..model import Failed


class Stall:
    """patience: seconds without an answer. look() is called now and then."""

    def __init__(self, transport: Transport, patience: float) -> None:
        self._transport = transport
        self._patience = patience
        self._seen: tuple[int, int] | None = None
        self._since = time.monotonic()

    def look(self) -> None:
        """Failed: something is under way, and nothing has moved for so long."""
        queues = [found for name, found in self._transport.counters().items() if name != "opcodes"]
        seen = (sum(q["requests"] for q in queues), sum(q["in_flight"] for q in queues))
        now = time.monotonic()
        if seen != self._seen or not seen[1]:
            self._seen, self._since = seen, now
        elif now - self._since > self._patience:
            raise Failed(f"did not answer for {self._patience:g} s")
