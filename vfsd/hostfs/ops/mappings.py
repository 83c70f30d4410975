"""SETUPMAPPING and REMOVEMAPPING: parts of files in the DAX window, which the front end keeps.

Rare beside what they save, and bound by the front end's answer: so they are Python, always on a
thread that may wait, and outside of their queue's gate meanwhile.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from errno import EINVAL, EIO, ENOSPC, ENOSYS, ESTALE
from mmap import PAGESIZE
from threading import Lock
from typing import Protocol

from vfsd._dax import Mapping, Window
from vfsd.fuse import abi
from vfsd.fuse.dispatch import Request
from vfsd.hostfs.table._tables import Tables

log = logging.getLogger("vfsd.fuse")

NOBODY = 0  # the nodeid of what is no guest's: may be mapped or not, as the front end did not answer
OFFSET_MAX = (1 << 63) - 1


class FrontEnd(Protocol):
    """The window as the front end has it; `vfsd.vhost.shmem` says what each method does."""

    size: int
    mappings_max: int

    @property
    def connected(self) -> bool: ...
    def map(self, fd: int, fd_offset: int, shm_offset: int, size: int, writable: bool) -> None: ...
    def unmap(self, shm_offset: int, size: int) -> None: ...
    def unmap_unheard(self, shm_offset: int, size: int) -> bool: ...


class MappedFile:
    """A file with mappings, open as long as it has some: their remains are mapped anew from it.

    refused: why it can't be writable.
    """

    def __init__(self, fd: int, writable: bool, refused: OSError | None) -> None:
        self.fd = fd
        self.writable = writable
        self.refused = refused

    def suits(self, write: bool) -> bool:
        """Whether to map it as it was opened, for a guest that will write to it, or may later."""
        if self.refused is not None:
            return not write  # the reason may be gone
        return self.writable == (write or not is_empty(self.fd))


class Mappings:
    """What one guest has in its window."""

    def __init__(self, tables: Tables, front_end: FrontEnd) -> None:
        self._tables = tables
        self._front_end = front_end
        self._window = Window(front_end.size, PAGESIZE)
        self._files: dict[int, MappedFile] = {}
        self._lock = Lock()

    @property
    def connected(self) -> bool:
        """Whether the front end has a window for this guest."""
        return self._front_end.connected

    def setup(self, nodeid: int, foffset: int, length: int, moffset: int, write: bool) -> None:
        """That part of the file appears at moffset, in place of what is there. OSError."""
        self._check(moffset, length)
        if not length or foffset % PAGESIZE or foffset > OFFSET_MAX - length:
            raise OSError(EINVAL, "no such part of a file")
        with self._turn() as touched:
            if self._is_mapped(nodeid, foffset, length, moffset, write):
                return
            touched.add(nodeid)
            file = self._open(nodeid, write)
            self._make_room(moffset, length, 1, touched)
            self._map(file, Mapping(moffset, length, nodeid, foffset, file.writable))

    def remove(self, parts: list[tuple[int, int]]) -> None:
        """Nothing is in these parts (moffset, length) any more, nor need it have been. OSError."""
        for moffset, length in parts:
            self._check(moffset, length)
        with self._turn() as touched:
            for moffset, length in parts:
                self._make_room(moffset, length, 0, touched)

    def can_map(self, fd: int, writable: bool) -> bool:
        """Whether the front end takes a range of this file, of which nothing stays mapped. OSError: it does
        not say."""
        with self._turn() as touched:
            self._make_room(0, abi.DAX_RANGE, 1, touched)
            try:
                self._map(MappedFile(fd, writable, None), Mapping(0, abi.DAX_RANGE, NOBODY, 0, writable))
            except OSError as problem:
                if problem.errno != EIO:
                    raise
                return False
            self._make_room(0, abi.DAX_RANGE, 0, touched)
        return True

    def clear(self) -> None:
        """Nothing is in the window any more."""
        with self._turn() as touched:
            touched.update(self._files)
            for mapping in self._window.mappings():
                if not self._front_end.unmap_unheard(mapping.moffset, mapping.length):
                    log.debug("the front end can't be told what to unmap")
                    break
            self._window.clear()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[set[int]]:
        """One request at a time. Nodeids put into the set are closed if they have no mapping left."""
        touched: set[int] = set()
        with self._lock:
            try:
                yield touched
            finally:
                for nodeid in touched & self._files.keys():
                    if not self._window.has(nodeid):
                        self._tables.close_file(self._files.pop(nodeid).fd)
                        self._tables.set_mapped(nodeid, False)

    # ---- steps of a turn

    def _check(self, moffset: int, length: int) -> None:
        size = self._front_end.size
        if moffset % PAGESIZE or length % PAGESIZE or moffset > size or length > size - moffset:
            raise OSError(EINVAL, "outside of the window")

    def _is_mapped(self, nodeid: int, foffset: int, length: int, moffset: int, write: bool) -> bool:
        """A read-only part that becomes writable was mapped so from the start, where it could be."""
        at = self._window.at(moffset)
        return (
            at is not None
            and at.inode == nodeid
            and at.foffset + (moffset - at.moffset) == foffset
            and at.moffset + at.length >= moffset + length
            and (at.writable or not write)
        )

    def _open(self, nodeid: int, write: bool) -> MappedFile:
        file = self._files.get(nodeid)
        if file is not None and not self._tables.knows(nodeid):
            raise OSError(ESTALE, "forgotten")
        if file is None or not file.suits(write):
            newer = self._open_anew(nodeid, write)
            if file is not None:
                self._tables.close_file(file.fd)
            file = self._files[nodeid] = newer
            self._tables.set_mapped(nodeid, True)
        if write and file.refused is not None:
            raise file.refused
        return file

    def _open_anew(self, nodeid: int, write: bool) -> MappedFile:
        refused = None
        try:
            fd = self._tables.open(nodeid, os.O_RDWR)
            # QEMU 11.1 makes an empty file as long as what it maps of it, if it can write to it.
            if write or not is_empty(fd):
                return MappedFile(fd, True, None)
            self._tables.close_file(fd)
        except OSError as problem:
            refused = problem
        return MappedFile(self._tables.open(nodeid, os.O_RDONLY), False, refused)

    def _map(self, file: MappedFile, part: Mapping) -> None:
        try:
            self._front_end.map(file.fd, part.foffset, part.moffset, part.length, part.writable)
        except TimeoutError:
            self._window.map(part.moffset, part.length, NOBODY, 0, False)
            raise
        self._window.map(part.moffset, part.length, part.inode, part.foffset, part.writable)

    def _make_room(self, moffset: int, length: int, to_come: int, touched: set[int]) -> None:
        """Unmap what lies in [moffset, moffset + length); what is left of it is mapped anew."""
        hit = self._window.overlapping(moffset, length)
        whole = sum(moffset <= m.moffset and m.moffset + m.length <= moffset + length for m in hit)
        split = sum(m.moffset < moffset and moffset + length < m.moffset + m.length for m in hit)
        if self._window.n_mapped - whole + split + to_come > self._front_end.mappings_max:
            raise OSError(ENOSPC, "the front end can't have more mappings")
        touched.update(m.inode for m in hit)
        for mapping in hit:
            self._unmap(mapping)
            start = max(moffset, mapping.moffset)
            end = min(moffset + length, mapping.moffset + mapping.length)
            rests = self._window.cut(start, end - start)
            for rest in rests:
                self._window.unmap(rest.moffset)
            if mapping.inode != NOBODY:
                for rest in rests:
                    self._map(self._files[mapping.inode], rest)

    def _unmap(self, mapping: Mapping) -> None:
        try:
            self._front_end.unmap(mapping.moffset, mapping.length)
        except TimeoutError:
            self._window.unmap(mapping.moffset)
            self._window.map(mapping.moffset, mapping.length, NOBODY, 0, False)
            raise


def is_empty(fd: int) -> bool:
    return os.fstat(fd).st_size == 0


# ---- operations


class HasMappings(Protocol):
    """What these operations need of `vfsd.hostfs.fs.HostFs`."""

    mappings: Mappings | None


def mappings_of(fs: HasMappings) -> Mappings:
    if fs.mappings is None or not fs.mappings.connected:
        raise OSError(ENOSYS, "there is no window")
    return fs.mappings


def setupmapping(fs: HasMappings, request: Request) -> None:
    mappings = mappings_of(fs)
    # Linux names no handle: the file is that of the nodeid.
    _fh, foffset, length, flags, moffset = request.take(abi.SETUPMAPPING_IN)
    if flags & ~(abi.SETUPMAPPING_READ | abi.SETUPMAPPING_WRITE):
        raise OSError(EINVAL, "unknown flags")
    write = bool(flags & abi.SETUPMAPPING_WRITE)
    mappings.setup(request.nodeid, foffset, length, moffset, write)


def removemapping(fs: HasMappings, request: Request) -> None:
    mappings = mappings_of(fs)
    (count,) = request.take(abi.REMOVEMAPPING_IN)
    mappings.remove([request.take(abi.REMOVEMAPPING_ONE) for _ in range(count)])
