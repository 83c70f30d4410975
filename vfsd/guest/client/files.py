"""Open files: OPEN to RELEASE, reading and writing through the page cache or past it (fs/fuse/file.c)."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from errno import EINVAL, EIO, EISDIR, ELOOP, ENOSYS, ENXIO
from functools import partial
from os import strerror

from vfsd.fuse import abi
from vfsd.fuse.abi import PAGE_SIZE, Fattr, Fopen, Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.client import daxfile, objects
from vfsd.guest.client.attributes import (
    MAY_READ,
    MAY_WRITE,
    check_writable,
    daemon_kills,
    permission,
    remove_privileges,
    setattr_now,
    size_changing,
    update_attributes,
)  # fmt: skip
from vfsd.guest.client.connection import Connection
from vfsd.guest.client.dax import layout_alone
from vfsd.guest.client.inodes import Dentry, Inode, Superblock
from vfsd.guest.client.mountpoints import Mount
from vfsd.guest.client.openfile import OpenFile
from vfsd.guest.client.replies import (
    SIZE_MAX,
    STATX_ATIME,
    STATX_BLOCKS,
    STATX_MODE,
    STATX_MODSIZE,
    STATX_SIZE,
)

DIRTY_PAGES_MAX = 4096  # of one file, before a write waits for them to be written
FETCH_MAX = 4096  # pages at a time, less than are kept
NOT_FOR_OPEN = os.O_CREAT | os.O_EXCL | os.O_NOCTTY


# ---- open and close


def send_open(inode: Inode, flags: int) -> tuple[int, Fopen]:
    """OPEN or OPENDIR: fh and what the daemon says of it (fuse_file_open)."""
    conn = inode.sb.conn
    opcode = Opcode.OPENDIR if inode.is_dir else Opcode.OPEN
    default = Fopen.KEEP_CACHE | (Fopen.CACHE_DIR if inode.is_dir else Fopen(0))
    sent = flags & ~NOT_FOR_OPEN
    if not conn.has(Init.ATOMIC_O_TRUNC):
        sent &= ~os.O_TRUNC
    kill = abi.OPEN_KILL_SUIDGID if sent & os.O_TRUNC and daemon_kills(conn) else 0
    args = abi.OPEN_IN.pack(sent, kill)
    try:
        out, _ = conn.try_call(opcode, inode.nodeid, args, instead=ENOSYS, out=abi.OPEN_OUT.size)
    except OSError as problem:
        wanted = Init.NO_OPENDIR_SUPPORT if inode.is_dir else Init.NO_OPEN_SUPPORT
        if problem.errno != ENOSYS or not conn.offered & wanted:
            raise
        return 0, default
    fh, open_flags, _ = abi.OPEN_OUT.unpack(out)
    if inode.is_dir:
        open_flags &= ~Fopen.DIRECT_IO
    return fh, Fopen(open_flags)


def check_open(inode: Inode, flags: int, readonly: bool) -> None:
    """may_open"""
    writes = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
    if inode.is_link:
        raise OSError(ELOOP, strerror(ELOOP))
    if inode.is_dir and (writes or flags & os.O_CREAT):
        raise OSError(EISDIR, strerror(EISDIR))
    if not inode.is_dir and not inode.is_reg:
        # A fifo or device is opened by the guest's kernel, which has none here.
        raise OSError(ENXIO, "special files can't be opened here")
    if writes:
        check_writable(readonly)
    wanted = MAY_READ if flags & os.O_ACCMODE != os.O_WRONLY else 0
    permission(inode, wanted | (MAY_WRITE if writes else 0))


def open_dentry(mount: Mount, dentry: Dentry, flags: int) -> OpenFile:
    """Open what exists; takes over the reference to the dentry also if it fails."""
    inode = dentry.inode
    assert inode is not None
    try:
        check_open(inode, flags, mount.readonly)
        inode.check_good()
        truncates = flags & os.O_TRUNC and inode.is_reg
        if truncates:
            remove_privileges(inode)
        if truncates and inode.dax is not None:
            with inode.lock, layout_alone(inode):
                fh, open_flags = send_open(inode, flags)
        else:
            fh, open_flags = send_open(inode, flags)
    except BaseException:
        dentry.sb.tree.put(dentry)
        raise
    file = OpenFile(mount, dentry, flags, fh, open_flags)
    try:
        finish_open(file)
        if truncates and not file.conn.has(Init.ATOMIC_O_TRUNC):
            with inode.lock:
                setattr_now(inode, Fattr.SIZE, size=0)
    except BaseException:
        release(file)
        raise
    return file


def finish_open(file: OpenFile) -> None:
    """fuse_finish_open: close-to-open"""
    inode = file.inode
    if inode.is_reg and file.flags & os.O_TRUNC and file.conn.has(Init.ATOMIC_O_TRUNC):
        inode.set_size(0)
    if not file.open_flags & Fopen.KEEP_CACHE:
        if inode.is_reg and inode.pages.dirty:
            flush_dirty(inode)
        inode.pages.clear()
        inode.listing = None


def close(file: OpenFile, owner: int) -> None:
    """close(2): FLUSH, whose error counts, and RELEASE, whose does not."""
    if file.closed:
        return
    try:
        flush(file, owner)
    finally:
        release(file, owner)


def flush(file: OpenFile, owner: int) -> None:
    """fuse_flush"""
    conn, inode = file.conn, file.inode
    if inode.is_dir:
        return
    inode.check_good()
    if file.open_flags & Fopen.NOFLUSH and not conn.has(Init.WRITEBACK_CACHE):
        return
    if file.writable:
        flush_for(file)
    else:
        flush_quietly(inode)
    args = abi.FLUSH_IN.pack(file.fh, 0, 0, scrambled(conn, owner))
    conn.try_call(Opcode.FLUSH, inode.nodeid, args, instead=0)
    if conn.has(Init.WRITEBACK_CACHE):
        inode.invalidate(STATX_BLOCKS)


def release(file: OpenFile, owner: int = 0) -> None:
    """fuse_release: waited for, because a submount may go with it."""
    conn, inode = file.conn, file.inode
    if file.closed:
        return
    file.closed = True
    inode.locks.release(file, owner)
    release_flags, lock_owner = 0, 0
    if file.flocked and conn.has(Init.FLOCK_LOCKS):
        release_flags, lock_owner = abi.RELEASE_FLOCK_UNLOCK, scrambled(conn, id(file))
    send_release(inode, file.fh, file.flags & ~NOT_FOR_OPEN, release_flags, lock_owner)
    if file.writable and inode.is_reg:
        with inode.guard:
            inode.writable.remove(file.fh)
    objects.gone("open files")
    file.dentry.sb.tree.put(file.dentry)
    with file.mount.lock:
        file.mount.busy -= 1


def send_release(inode: Inode, fh: int, flags: int, release_flags: int = 0, lock_owner: int = 0) -> None:
    """RELEASE or RELEASEDIR; nothing where opening is without a message."""
    conn = inode.sb.conn
    if conn.lacks(Opcode.OPENDIR if inode.is_dir else Opcode.OPEN):
        return
    opcode = Opcode.RELEASEDIR if inode.is_dir else Opcode.RELEASE
    args = abi.RELEASE_IN.pack(fh, flags, release_flags, lock_owner)
    with suppress(OSError):
        conn.call(opcode, inode.nodeid, args, force=True, nocreds=True)


def scrambled(conn: Connection, owner: int) -> int:
    """fuse_lock_owner_id: the daemon can tell owners apart, and learns no address."""
    mixed = (owner ^ conn.scramble_key) * 0x9E3779B97F4A7C15 & (2**64 - 1)
    return mixed ^ mixed >> 32


class Batch:
    """Background requests that are waited for together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self.error = 0

    def begin(self) -> None:
        with self._changed:
            self._running += 1

    def end(self, error: int) -> None:
        with self._changed:
            self._running -= 1
            self.error = self.error or error
            self._changed.notify_all()

    def wait(self) -> None:
        """OSError: the first error."""
        with self._changed:
            while self._running:
                self._changed.wait()
        if self.error:
            raise OSError(self.error, strerror(self.error))


# ---- reading


def read_args(file: OpenFile, position: int, size: int) -> bytes:
    return abi.READ_IN.pack(file.fh, position, size, 0, 0, file.flags & ~NOT_FOR_OPEN, 0)


def read_at(file: OpenFile, position: int, into: memoryview) -> int:
    """fuse_file_read_iter"""
    file.check(write=False)
    check_range(position, len(into))
    if file.inode.dax is not None:
        return daxfile.read(file, position, into, read_direct)
    return read_direct(file, position, into) if file.direct else read_cached(file, position, into)


def check_range(position: int, length: int) -> None:
    """rw_verify_area"""
    if position < 0 or position + length > SIZE_MAX:
        raise OSError(EINVAL, strerror(EINVAL))


def atime_changed(file: OpenFile) -> None:
    """fuse_invalidate_atime, after each READ"""
    if not file.mount.readonly:
        file.inode.invalidate(STATX_ATIME)


def read_direct(file: OpenFile, position: int, into: memoryview) -> int:
    """fuse_direct_io: straight into the caller's memory, until a short reply."""
    flush_dirty(file.inode)
    most = file.conn.max_pages * PAGE_SIZE
    done = 0
    while done < len(into):
        part = into[done : done + most]
        try:
            _, count = file.conn.call(
                Opcode.READ, file.inode.nodeid, read_args(file, position + done, len(part)),
                into=part, argvar=True,
            )  # fmt: skip
        except OSError:
            if done:
                break
            raise
        done += count
        if count < len(part):
            break
    atime_changed(file)
    return done


def read_cached(file: OpenFile, position: int, into: memoryview) -> int:
    """fuse_cache_read_iter, filemap_read"""
    inode = file.inode
    if file.conn.has(Init.AUTO_INVAL_DATA) or position + len(into) > inode.size:
        update_attributes(inode, STATX_SIZE, file.fh)
    sequential = position == file.next_read
    done = 0
    while done < (length := min(len(into), inode.size - position)):
        count = inode.pages.read(position + done, into[done:length])
        if count == 0:
            first, last = (position + done) // PAGE_SIZE, (position + length - 1) // PAGE_SIZE
            fetch(file, first, last, sequential)
        elif done == 0:
            file.conn.hit("pages")
        done += count
    file.next_read = position + done
    return done


def fetch(file: OpenFile, first: int, last: int, sequential: bool) -> None:
    """READ what is missing of these pages, a sequential reader's readahead too (fuse_readahead)."""
    inode, conn = file.inode, file.conn
    if sequential:
        last = max(last, first + conn.max_readahead // PAGE_SIZE - 1)
    last = min(last, (inode.size - 1) // PAGE_SIZE, first + FETCH_MAX - 1)
    most = conn.max_pages
    runs = [
        (at, min(at + most, end))
        for start, end in inode.pages.missing(first, last)
        for at in range(start, end, most)
    ]
    version = inode.pages.version
    atime_changed(file)
    if len(runs) > 1 and conn.has(Init.ASYNC_READ):
        fetch_many(file, runs, version)
        return
    for start, end in runs:
        asked = conn.attr_version
        buffer = bytearray((end - start) * PAGE_SIZE)
        args = read_args(file, start * PAGE_SIZE, len(buffer))
        _, count = conn.call(Opcode.READ, inode.nodeid, args, into=buffer, argvar=True)
        inode.pages.fill(start, buffer, version)
        conn.pool.filled(inode.pages)
        if count < len(buffer):
            short_read(inode, start * PAGE_SIZE + count, asked)


def fetch_many(file: OpenFile, runs: list[tuple[int, int]], version: int) -> None:
    batch = Batch()
    inode, conn = file.inode, file.conn
    asked = conn.attr_version

    def done(start: int, size: int, error: int, _out: bytes, data: bytes) -> None:
        try:
            if not error:
                inode.pages.fill(start, data if len(data) == size else data.ljust(size, b"\0"), version)
                if len(data) < size:
                    short_read(inode, start * PAGE_SIZE + len(data), asked)
        finally:
            batch.end(error)

    try:
        for start, end in runs:
            size = (end - start) * PAGE_SIZE
            batch.begin()
            try:
                conn.background(
                    partial(done, start, size), Opcode.READ, inode.nodeid,
                    read_args(file, start * PAGE_SIZE, size), into=size, argvar=True,
                )  # fmt: skip
            except OSError as problem:
                batch.end(problem.errno or EIO)
                break
    finally:
        batch.wait()
    conn.pool.filled(inode.pages)


def short_read(inode: Inode, end: int, asked: int) -> None:
    """The file ends there, unless something newer is known (fuse_read_update_size)."""
    if inode.keeps_times:
        return
    with inode.guard:
        if inode.attr_version <= asked and end < inode.size and not inode.size_unstable:
            inode.attr_version = inode.sb.conn.next_attr_version()
            inode.size = end


# ---- writing


def write_at(file: OpenFile, position: int | None, data: memoryview) -> tuple[int, int]:
    """Bytes written, and the position after them. position None: at the end (O_APPEND).

    fuse_file_write_iter
    """
    file.check(write=True)
    check_range(position or 0, len(data))
    inode, conn = file.inode, file.conn
    with inode.lock:
        if conn.has(Init.WRITEBACK_CACHE):
            update_attributes(inode, STATX_SIZE | STATX_MODE, file.fh)
        if position is None:
            if inode.dax is not None:
                update_attributes(inode, STATX_SIZE, file.fh)
            position = inode.size
        if not data:
            return 0, position
        remove_privileges(inode)
        if inode.dax is not None:
            done = daxfile.write(file, position, data, write_direct)
        elif file.direct:
            done = write_direct(file, position, data)
        elif conn.has(Init.WRITEBACK_CACHE):
            done = write_back(file, position, data)
        else:
            done = write_through(file, position, data)
    if file.flags & (os.O_SYNC | os.O_DSYNC):
        fsync(file, datasync=not file.flags & os.O_SYNC & ~os.O_DSYNC)
    return done, position + done


def send_write(file: OpenFile, position: int, part: memoryview) -> int:
    inode, conn = file.inode, file.conn
    kill = abi.WRITE_KILL_SUIDGID if daemon_kills(conn) else 0
    args = abi.WRITE_IN.pack(file.fh, position, len(part), kill, 0, file.flags & ~NOT_FOR_OPEN, 0)
    out, _ = conn.call(Opcode.WRITE, inode.nodeid, args, out=abi.WRITE_OUT.size, data=part)
    count = int(abi.WRITE_OUT.unpack(out)[0])
    if count > len(part):
        raise OSError(EIO, strerror(EIO))
    return count


def write_parts(file: OpenFile, position: int, data: memoryview, whole_pages: bool) -> Iterator[memoryview]:
    """What goes into one WRITE each: by max_write and max_pages."""
    conn = file.conn
    done = 0
    while done < len(data):
        pages = conn.max_pages if conn.has(Init.BIG_WRITES) or not whole_pages else 1
        room = pages * PAGE_SIZE - ((position + done) % PAGE_SIZE if whole_pages else 0)
        part = data[done : done + min(room, conn.max_write)]
        yield part
        done += len(part)


def write_direct(file: OpenFile, position: int, data: memoryview) -> int:
    inode = file.inode
    flush_dirty(inode)
    done = 0
    try:
        for part in write_parts(file, position, data, False):
            count = send_write(file, position + done, part)
            done += count
            if count < len(part):
                break
    except OSError:
        if done == 0:
            raise
    finally:
        if done:
            inode.grow(position + done)
            inode.pages.drop_range(position // PAGE_SIZE, (position + done - 1) // PAGE_SIZE)
    return done


def write_through(file: OpenFile, position: int, data: memoryview) -> int:
    """fuse_perform_write: each part is sent, and kept if the daemon took it."""
    inode = file.inode
    done = 0
    with size_changing(inode, when=position + len(data) > inode.size):
        try:
            for part in write_parts(file, position, data, True):
                count = send_write(file, position + done, part)
                inode.pages.write(position + done, part[:count], dirty=False)
                file.conn.pool.filled(inode.pages)
                done += count
                inode.grow(position + done)
                if count < len(part):
                    if count == 0:
                        raise OSError(EIO, strerror(EIO))
                    break
        except OSError:
            inode.invalidate(STATX_MODSIZE)
            if done == 0:
                raise
    return done


def write_back(file: OpenFile, position: int, data: memoryview) -> int:
    """Only the page cache is changed; size and times are the guest's own."""
    inode = file.inode
    last = position + len(data) - 1
    for index in {position // PAGE_SIZE, last // PAGE_SIZE}:
        start = index * PAGE_SIZE
        whole = position <= start and last >= start + PAGE_SIZE - 1
        if not whole and not inode.pages.has(index):
            if start >= inode.size:
                inode.pages.add_zero(index)
            else:
                fetch(file, index, index, False)
    inode.pages.write(position, data, dirty=True)
    seconds, nsec = divmod(time.time_ns(), 10**9)
    with inode.guard:
        inode.attr_version = file.conn.next_attr_version()
        inode.size = max(inode.size, last + 1)
        inode.attr = inode.attr._replace(mtime=seconds, mtimensec=nsec, ctime=seconds, ctimensec=nsec)
        inode.dirty_times = True
    if inode.pages.dirty > DIRTY_PAGES_MAX:
        flush_dirty(inode)
    return len(data)


def flush_dirty(inode: Inode) -> None:
    """Write what is dirty, then the times, and wait, also for what others write back just now
    (filemap_write_and_wait, fuse_flush_times). OSError, of which `flush_for` tells each open file too."""
    if not inode.keeps_times:
        return
    with inode.lock:
        if not inode.pages.dirty and not inode.dirty_times:
            return
        try:
            flush_locked(inode)
        except OSError as problem:
            inode.write_errors += 1
            inode.write_error = problem.errno or EIO
            raise
        finally:
            inode.invalidate(STATX_BLOCKS)


def flush_locked(inode: Inode) -> None:
    conn = inode.sb.conn
    if not inode.writable:
        raise OSError(EIO, "dirty pages without a file to write them by")
    fh = inode.writable[-1]
    batch = Batch()
    try:
        for first, data in inode.pages.take_dirty(min(conn.max_pages, conn.max_write // PAGE_SIZE)):
            send_dirty(inode, fh, first * PAGE_SIZE, data, batch)
    finally:
        batch.wait()
    if inode.dirty_times:
        inode.dirty_times = False
        attr = inode.attr
        setattr_now(inode, Fattr.MTIME | Fattr.CTIME, mtime_ns=attr.mtime_ns,
                    ctime_ns=attr.ctime * 10**9 + attr.ctimensec, fh=fh)  # fmt: skip


def flush_for(file: OpenFile) -> None:
    """The same for fsync(2) and close(2), which tell an error once for each open file, whoever met it first
    (file_check_and_advance_wb_err)."""
    inode = file.inode
    flush_quietly(inode)
    if file.write_errors_told != inode.write_errors:
        file.write_errors_told = inode.write_errors
        raise OSError(inode.write_error, strerror(inode.write_error))


def flush_quietly(inode: Inode) -> None:
    """For who has written nothing: an error is for those to be told who have."""
    with suppress(OSError):
        flush_dirty(inode)


def send_dirty(inode: Inode, fh: int, position: int, data: bytes, batch: Batch) -> None:
    size = min(len(data), inode.size - position)
    if size <= 0:
        return
    args = abi.WRITE_IN.pack(fh, position, size, abi.WRITE_CACHE, 0, 0, 0)

    def done(error: int, out: bytes, _data: bytes) -> None:
        batch.end(error or (0 if out == abi.WRITE_OUT.pack(size, 0) else EIO))

    batch.begin()
    try:
        inode.sb.conn.background(
            done, Opcode.WRITE, inode.nodeid, args, out=abi.WRITE_OUT.size, data=memoryview(data)[:size],
            nocreds=True,
        )  # fmt: skip
    except OSError as problem:
        batch.end(problem.errno or EIO)


def fsync(file: OpenFile, datasync: bool) -> None:
    """fuse_fsync, fuse_dir_fsync"""
    inode = file.inode
    inode.check_good()
    flush_for(file)
    opcode = Opcode.FSYNCDIR if inode.is_dir else Opcode.FSYNC
    args = abi.FSYNC_IN.pack(file.fh, abi.FSYNC_FDATASYNC if datasync else 0, 0)
    file.conn.try_call(opcode, inode.nodeid, args, instead=0)


def sync_filesystem(sb: Superblock, wait: bool = True) -> None:
    """What is dirty is written, then SYNCFS for this superblock (fuse_sync_fs)."""
    with sb.tree.lock:
        inodes = [inode for inode in sb.tree.by_nodeid.values() if inode.pages.dirty]
    for inode in inodes:
        flush_dirty(inode)
    if not wait or sb.root is None or not sb.conn.sync_fs:
        return
    assert sb.root.inode is not None
    sb.conn.try_call(Opcode.SYNCFS, sb.root.inode.nodeid, abi.SYNCFS_IN.pack(0), instead=0)
    sb.conn.sync_fs = not sb.conn.lacks(Opcode.SYNCFS)
