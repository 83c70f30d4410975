"""Reading, writing and mapping files through the DAX window (fs/fuse/dax.c, fs/dax.c).

The host can cut a file off under its mapping: then a copy is short, the size is asked for, and a read
ends there; what can't be explained that way is EIO. A view can't be short: pages that are not there any
more read as zeroes, and what is written to them is lost (`View.torn` counts them).
"""

import threading
from collections.abc import Callable
from errno import EACCES, EIO, ENODEV
from os import strerror

from vfsd.fuse.abi import PAGE_SIZE
from vfsd.guest.client.attributes import getattr_now, update_attributes
from vfsd.guest.client.dax import RANGE, Dax, InodeDax
from vfsd.guest.client.openfile import OpenFile
from vfsd.guest.client.replies import STATX_MODIFY, STATX_SIZE

Direct = Callable[[OpenFile, int, memoryview], int]


class Copy:
    """One read or write. direct: by request, for what the window can't do."""

    def __init__(self, file: OpenFile, write: bool, direct: Direct) -> None:
        assert file.conn.dax is not None and file.inode.dax is not None
        self.file = file
        self.inode = file.inode
        self.dax: Dax = file.conn.dax
        self.state: InodeDax = file.inode.dax
        self.write = write
        self.direct = direct
        self._faulted = -1  # where

    def run(self, position: int, data: memoryview) -> int:
        """Bytes done: fewer at the end of the file, or before an error."""
        done = 0
        while done < len(data):
            at = position + done
            left = self.inode.size - at
            if left <= 0:
                return done + (self.direct(self.file, at, data[done:]) if self.write else 0)
            part = data[done : done + min(left, RANGE - at % RANGE)]
            try:
                count = self._one(at, part)
                done += count
                if count < len(part):
                    self._explain(at + count)
            except OSError:
                if done == 0:
                    raise
                break
        return done

    def _one(self, at: int, part: memoryview) -> int:
        """Within one range."""
        memory, table = self.dax.memory, self.dax.table
        copy = memory.write_file if self.write else memory.read_file
        count = copy(table, self.state.key, at, part)
        if count >= 0:
            self.dax.used()
            return count
        moffset = self.dax.pin(self.inode, at, self.write)
        if moffset is None:
            self.dax.count("direct")
            return self.direct(self.file, at, part)
        try:
            offset = moffset + at % RANGE
            return memory.write(offset, part) if self.write else memory.read(offset, part)
        finally:
            self.dax.unpin(moffset)

    def _explain(self, at: int) -> None:
        """The copy ended there: the file may, or its range was just being made writable.

        OSError EIO: neither."""
        with self.state.sem:
            again = at == self._faulted
        self._faulted = at
        self.dax.count("faults")
        getattr_now(self.inode, self.file.fh)
        if again and at < self.inode.size:
            raise OSError(EIO, strerror(EIO))


def read(file: OpenFile, position: int, into: memoryview, direct: Direct) -> int:
    """fuse_dax_read_iter. Past the end as it is known, the size is asked for once it has expired."""
    inode = file.inode
    if position + len(into) > inode.size:
        update_attributes(inode, STATX_SIZE, file.fh)
    assert inode.dax is not None
    with inode.dax.readers.shared():
        return Copy(file, False, direct).run(position, into)


def write(file: OpenFile, position: int, data: memoryview, direct: Direct) -> int:
    """fuse_dax_write_iter, with inode.lock: what makes the file longer is one WRITE."""
    inode = file.inode
    assert inode.dax is not None
    with inode.dax.readers.alone():
        if position + len(data) > inode.size:
            return direct(file, position, data)
        done = Copy(file, True, direct).run(position, data)
    inode.invalidate(STATX_MODIFY)
    return done


class Hold:
    """What a view keeps: its ranges, and its file as if it were open."""

    def __init__(self, file: OpenFile, dax: Dax, first: int, last: int) -> None:
        """Ranges that have the bytes first to last of the file."""
        self.dax = dax
        self.inode = file.inode
        self.starts = range(first & -RANGE, last + 1, RANGE)
        self.pins: list[int] = []
        self.mount = file.mount
        self._lock = threading.Lock()
        self._over = False
        dax.hold(self.inode, self.starts)
        self.dentry = file.dentry.sb.tree.get(file.dentry)
        with self.mount.lock:
            self.mount.busy += 1
            self.mount.views.add(self)

    def pin(self, write: bool) -> None:
        """fuse_dax_huge_fault, for each range. ValueError: the file has become too short."""
        state = self.inode.dax
        assert state is not None
        for start in self.starts:
            moffset = None
            while moffset is None:
                with state.invalidate.shared():
                    if start >= self.inode.size:
                        raise ValueError("the file has become shorter")
                    moffset = self.dax.pin(self.inode, start, write, fault=True)
                if moffset is None:
                    self.dax.wait_free(holds=True)
            self.pins.append(moffset)

    def release(self) -> None:
        """Idempotent."""
        with self._lock:
            over, self._over = self._over, True
        if over:
            return
        for moffset in self.pins:
            self.dax.unpin(moffset)
        self.dax.unhold(self.inode, self.starts)
        with self.mount.lock:
            self.mount.busy -= 1
            self.mount.views.discard(self)
        self.dentry.sb.tree.put(self.dentry)


def mmap(file: OpenFile, offset: int, length: int) -> memoryview:
    """That part of the file as memory, shared; writable if the file is.

    ValueError: not within the file. OSError ENODEV: no DAX; EACCES: not open for reading; ENOMEM: more
    ranges than the window has left; the daemon's.
    """
    inode, dax = file.inode, file.conn.dax
    inode.check_good()
    if inode.dax is None or dax is None:
        raise OSError(ENODEV, "the file has no DAX")
    if not file.readable:
        raise OSError(EACCES, strerror(EACCES))
    update_attributes(inode, STATX_SIZE, file.fh)
    if offset < 0 or length <= 0 or offset + length > inode.size:
        raise ValueError(f"[{offset}, {offset + length}) is not within the {inode.size} bytes of the file")
    hold = Hold(file, dax, offset, offset + length - 1)
    try:
        hold.pin(file.writable)
        return view_of(hold, offset, length, file.writable)
    except BaseException:
        hold.release()
        raise


def view_of(hold: Hold, offset: int, length: int, writable: bool) -> memoryview:
    first = offset // PAGE_SIZE * PAGE_SIZE
    end = -(-(offset + length) // PAGE_SIZE) * PAGE_SIZE
    parts = []
    for start, moffset in zip(hold.starts, hold.pins, strict=True):
        low, high = max(first, start), min(end, start + RANGE)
        parts.append((moffset + low - start, high - low))
    dax = hold.dax
    # Released wherever the last reference goes, perhaps under our own locks: the worker does the rest.
    return dax.memory.view(parts, offset - first, length, writable, lambda: dax.post(hold.release))
