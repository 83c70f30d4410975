"""How many objects of each kind are alive, for tests that nothing leaks.

An object is counted from its birth until the code that tears it down says so; the garbage collector
has no say.
"""

import threading
from collections import Counter

KINDS = ("connections", "mounts", "superblocks", "mount points", "inodes", "dentries", "open files")

_lock = threading.Lock()
_alive: Counter[str] = Counter(dict.fromkeys(KINDS, 0))


def born(kind: str) -> None:
    with _lock:
        _alive[kind] += 1


def gone(kind: str) -> None:
    with _lock:
        _alive[kind] -= 1
        if _alive[kind] < 0:
            raise AssertionError(f"more {kind} torn down than made")


def alive() -> dict[str, int]:
    """By kind, how many there are in this process."""
    with _lock:
        return dict(_alive)
