"""A lock that many may share or one may have alone (the i_rwsem of a directory)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Whoever wants it alone keeps later sharers out. Not reentrant."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._sharers = 0
        self._owned = False
        self._wanted = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            while self._owned or self._wanted:
                self._changed.wait()
            self._sharers += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharers -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._wanted += 1
            while self._owned or self._sharers:
                self._changed.wait()
            self._wanted -= 1
            self._owned = True
        try:
            yield
        finally:
            with self._changed:
                self._owned = False
                self._changed.notify_all()
