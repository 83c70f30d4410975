"""The page cache of one inode: pages of 4096 bytes, some of them dirty (mm/filemap.c)."""

import threading
from collections import OrderedDict
from collections.abc import Iterator

from vfsd.fuse.abi import PAGE_SIZE
from vfsd.guest.buffer import Buffer

Page = memoryview  # of PAGE_SIZE bytes; read-only if it came so

PAGES_MAX = 1 << 16  # 256 MiB
ZERO_PAGE = memoryview(bytes(PAGE_SIZE))


class Pages:
    """Pages that hold what the file holds; a dirty one is newer than the file.

    `version` changes with every change from outside a read, so that a READ that was overtaken by
    a write puts nothing old in.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pages: dict[int, Page] = {}
        self._dirty: set[int] = set()
        self.version = 0

    def __len__(self) -> int:
        return len(self._pages)

    def missing(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Runs (first, end) of pages that are not here, of first..last."""
        with self._lock:
            lacking = [index for index in range(first, last + 1) if index not in self._pages]
        start = None
        for index in lacking:
            if start is None:
                start = end = index
            elif index == end + 1:
                end = index
            else:
                yield start, end + 1
                start = end = index
        if start is not None:
            yield start, end + 1

    def fill(self, first: int, data: Buffer, version: int) -> None:
        """What READ brought, from that page on; the end of the last page is zero."""
        view = memoryview(data).cast("B")
        with self._lock:
            if self.version != version:
                return
            for index in range((len(view) + PAGE_SIZE - 1) // PAGE_SIZE):
                page = view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
                if len(page) < PAGE_SIZE:
                    page = memoryview(bytearray(bytes(page).ljust(PAGE_SIZE, b"\0")))
                self._pages.setdefault(first + index, page)

    def read(self, position: int, into: memoryview) -> int:
        """Copy what is here without a gap; how many bytes that are."""
        done = 0
        with self._lock:
            while done < len(into):
                index, start = divmod(position + done, PAGE_SIZE)
                page = self._pages.get(index)
                if page is None:
                    break
                part = page[start : start + len(into) - done]
                into[done : done + len(part)] = part
                done += len(part)
        return done

    def write(self, position: int, data: memoryview, *, dirty: bool) -> None:
        """Put data where a page is here or is replaced whole; a piece of one that is not here is left out."""
        done = 0
        with self._lock:
            self.version += 1
            while done < len(data):
                index, start = divmod(position + done, PAGE_SIZE)
                part = data[done : done + PAGE_SIZE - start]
                page = self._pages.get(index)
                if page is not None and page.readonly:
                    page = self._pages[index] = memoryview(bytearray(page))
                if page is not None:
                    page[start : start + len(part)] = part
                elif len(part) == PAGE_SIZE:
                    self._pages[index] = memoryview(bytearray(part))
                if dirty:
                    self._dirty.add(index)
                done += len(part)

    def add_zero(self, index: int) -> None:
        """A page past the end of the file that will be written to."""
        with self._lock:
            self._pages.setdefault(index, ZERO_PAGE)

    def has(self, index: int) -> bool:
        return index in self._pages

    @property
    def dirty(self) -> int:
        return len(self._dirty)

    def take_dirty(self, pages_max: int) -> Iterator[tuple[int, bytes]]:
        """Runs of dirty pages, clean from now on: (first, data)."""
        with self._lock:
            indexes = sorted(self._dirty)
            self._dirty.clear()
            while indexes:
                count = 1
                while count < min(len(indexes), pages_max) and indexes[count] == indexes[0] + count:
                    count += 1
                run, indexes = indexes[:count], indexes[count:]
                yield run[0], b"".join(self._pages[index] for index in run)

    def truncate(self, size: int) -> None:
        """truncate_pagecache: nothing past the size stays, the rest of its page is zero."""
        index, start = divmod(size, PAGE_SIZE)
        with self._lock:
            self.version += 1
            for gone in [at for at in self._pages if at > index or (at == index and start == 0)]:
                del self._pages[gone]
                self._dirty.discard(gone)
            page = self._pages.get(index)
            if page is not None:
                if page.readonly:
                    page = self._pages[index] = memoryview(bytearray(page))
                page[start:] = bytes(PAGE_SIZE - start)

    def clear(self) -> None:
        """invalidate_inode_pages2: all that is clean is dropped."""
        with self._lock:
            self.version += 1
            self._pages = {at: page for at, page in self._pages.items() if at in self._dirty}

    def trim(self, keep: int) -> None:
        """Drop the clean pages that have been here longest."""
        with self._lock:
            for index in [at for at in self._pages if at not in self._dirty][: max(0, len(self) - keep)]:
                del self._pages[index]

    def drop_range(self, first: int, last: int) -> None:
        """What direct I/O has made old."""
        with self._lock:
            self.version += 1
            for index in [at for at in self._pages if first <= at <= last and at not in self._dirty]:
                del self._pages[index]


class PagePool:
    """Bounds what a connection keeps: the file that was filled longest ago gives its pages back first."""

    def __init__(self, pages_max: int = PAGES_MAX) -> None:
        self._lock = threading.Lock()
        self._max = pages_max
        self._sizes: OrderedDict[Pages, int] = OrderedDict()  # at their last filling
        self._total = 0

    def filled(self, pages: Pages) -> None:
        with self._lock:
            self._account(pages)
            while self._total > self._max and len(self._sizes) > 1:
                oldest = next(iter(self._sizes))
                oldest.clear()
                self._total -= self._sizes.pop(oldest)
            if self._total > self._max:
                pages.trim(self._max // 2)
                self._account(pages)

    def _account(self, pages: Pages) -> None:
        self._total += len(pages) - self._sizes.pop(pages, 0)
        self._sizes[pages] = len(pages)

    def gone(self, pages: Pages) -> None:
        with self._lock:
            self._total -= self._sizes.pop(pages, 0)
