"""File locks that the guest keeps for itself, when the daemon does not want them (fs/locks.c)."""

import fcntl
import os
import threading
from collections.abc import Hashable
from errno import EWOULDBLOCK
from typing import NamedTuple

OFFSET_MAX = 2**63 - 1


class Range(NamedTuple):
    """A lock of lockf: bytes start to end inclusive, F_RDLCK or F_WRLCK."""

    start: int
    end: int
    kind: int
    owner: Hashable


class LocalLocks:
    """The locks of one inode: whole-file ones by open file, ranges by owner."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._flocks: dict[Hashable, int] = {}  # LOCK_SH or LOCK_EX
        self._ranges: list[Range] = []

    def flock(self, owner: Hashable, operation: int) -> None:
        kind = operation & ~fcntl.LOCK_NB
        with self._changed:
            self._flocks.pop(owner, None)  # a change of kind is not atomic, see flock(2)
            self._changed.notify_all()
            if kind == fcntl.LOCK_UN:
                return
            while any(fcntl.LOCK_EX in (kind, held) for held in self._flocks.values()):
                self._wait(operation & fcntl.LOCK_NB)
            self._flocks[owner] = kind

    def lock(self, wanted: Range, wait: bool) -> None:
        with self._changed:
            while self.conflict(wanted) is not None:
                self._wait(not wait)
            self._cut(wanted)
            if wanted.kind != fcntl.F_UNLCK:
                self._ranges.append(wanted)
            self._changed.notify_all()

    def conflict(self, wanted: Range) -> Range | None:
        """Another owner's lock that stands against it (F_GETLK)."""
        if wanted.kind == fcntl.F_UNLCK:
            return None
        for held in self._ranges:
            overlap = held.start <= wanted.end and wanted.start <= held.end
            if overlap and held.owner != wanted.owner and fcntl.F_WRLCK in (held.kind, wanted.kind):
                return held
        return None

    def _cut(self, wanted: Range) -> None:
        kept: list[Range] = []
        for held in self._ranges:
            if held.owner != wanted.owner or held.end < wanted.start or wanted.end < held.start:
                kept.append(held)
                continue
            if held.start < wanted.start:
                kept.append(held._replace(end=wanted.start - 1))
            if wanted.end < held.end:
                kept.append(held._replace(start=wanted.end + 1))
        self._ranges = kept

    def _wait(self, refused: int | bool) -> None:
        if refused:
            raise BlockingIOError(EWOULDBLOCK, os.strerror(EWOULDBLOCK))
        self._changed.wait()

    def release(self, file: Hashable, owner: Hashable) -> None:
        """close(2): its flock, and all ranges of its process."""
        with self._changed:
            self._flocks.pop(file, None)
            self._ranges = [held for held in self._ranges if held.owner != owner]
            self._changed.notify_all()
