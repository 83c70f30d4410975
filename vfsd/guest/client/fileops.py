"""What else open files can do: holes, copies and locks (fs/fuse/file.c)."""

import fcntl
import os
from contextlib import nullcontext
from errno import (
    EAGAIN,
    EBADF,
    EINVAL,
    EIO,
    EISDIR,
    ENODEV,
    ENOSYS,
    ENXIO,
    EOPNOTSUPP,
    EXDEV,
)  # fmt: skip
from os import strerror

from vfsd.fuse import abi
from vfsd.fuse.abi import PAGE_SIZE, Init, SeekWhence
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.client.attributes import remove_privileges, size_changing, update_attributes
from vfsd.guest.client.connection import current
from vfsd.guest.client.dax import layout_alone
from vfsd.guest.client.files import flush_dirty, read_at, scrambled, write_at
from vfsd.guest.client.locks import OFFSET_MAX, Range
from vfsd.guest.client.openfile import OpenFile
from vfsd.guest.client.replies import STATX_MODSIZE, STATX_SIZE

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 0x10
COPY_MAX = 0xFFFFF000  # of COPY_FILE_RANGE, which answers with 32 bits
SPLICE_PART = 1 << 20
LOCK_KINDS = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}


def error(number: int) -> OSError:
    return OSError(number, strerror(number))


def fallocate(file: OpenFile, mode: int, offset: int, length: int) -> None:
    """fuse_file_fallocate"""
    inode, conn = file.inode, file.conn
    if offset < 0 or length <= 0:
        raise error(EINVAL)
    if not file.writable:
        raise error(EBADF)
    if inode.is_dir:
        raise error(EISDIR)
    if not inode.is_reg:
        raise error(ENODEV)
    if mode & ~(FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE):
        raise error(EOPNOTSUPP)
    inode.check_good()
    replaces = mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE)
    with inode.lock:
        if replaces:
            flush_dirty(inode)
        remove_privileges(inode)
        args = abi.FALLOCATE_IN.pack(file.fh, offset, length, mode, 0)
        grows = not mode & FALLOC_KEEP_SIZE
        layout = layout_alone(inode) if grows or replaces else nullcontext()
        with layout, size_changing(inode, when=grows):
            conn.try_call(Opcode.FALLOCATE, inode.nodeid, args, instead=EOPNOTSUPP)
        if grows:
            inode.grow(offset + length)
        if replaces:
            inode.pages.drop_range(offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE)
        inode.invalidate(STATX_MODSIZE)


def lseek(file: OpenFile, offset: int, whence: int) -> int:
    """fuse_file_llseek: only SEEK_DATA and SEEK_HOLE need the daemon."""
    inode = file.inode
    with file.position_lock:
        if whence == os.SEEK_CUR:
            offset += file.position
        elif whence == os.SEEK_END:
            update_attributes(inode, STATX_SIZE, file.fh)
            offset += inode.size
        elif whence in (SeekWhence.DATA, SeekWhence.HOLE):
            offset = seek_data(file, offset, whence)
        elif whence != os.SEEK_SET:
            raise error(EINVAL)
        if not 0 <= offset <= OFFSET_MAX:
            raise error(EINVAL)
        file.position = offset
        return offset


def seek_data(file: OpenFile, offset: int, whence: int) -> int:
    """fuse_lseek"""
    inode, conn = file.inode, file.conn
    if offset < 0:
        raise error(ENXIO)
    flush_dirty(inode)
    args = abi.LSEEK_IN.pack(file.fh, offset, whence, 0)
    try:
        out, _ = conn.try_call(Opcode.LSEEK, inode.nodeid, args, instead=ENOSYS, out=abi.LSEEK_OUT.size)
    except OSError as problem:
        if problem.errno != ENOSYS:
            raise
        update_attributes(inode, STATX_SIZE, file.fh)
        if offset >= inode.size:
            raise error(ENXIO) from None
        return offset if whence == SeekWhence.DATA else inode.size
    return int(abi.LSEEK_OUT.unpack(out)[0])


def copy_file_range(source: OpenFile, target: OpenFile, count: int, at: int, to: int) -> int:
    """fuse_copy_file_range; by reading and writing where the daemon can't."""
    source.check(write=False)
    target.check(write=True)
    if target.flags & os.O_APPEND:
        raise error(EBADF)
    if count < 0 or at < 0 or to < 0:
        raise error(EINVAL)
    if source.inode is target.inode and at < to + count and to < at + count:
        raise error(EINVAL)
    update_attributes(source.inode, STATX_SIZE, source.fh)
    count = min(count, source.inode.size - at)
    if count <= 0:
        return 0
    try:
        return send_copy(source, target, count, at, to)
    except OSError as problem:
        if problem.errno not in (EOPNOTSUPP, EXDEV):
            raise
    return splice(source, target, count, at, to)


def send_copy(source: OpenFile, target: OpenFile, count: int, at: int, to: int) -> int:
    inode, conn = target.inode, target.conn
    if source.inode.sb is not inode.sb:
        raise error(EXDEV)
    flush_dirty(source.inode)
    with inode.lock:
        flush_dirty(inode)
        remove_privileges(inode)

        def args(length: int) -> bytes:
            return abi.COPY_FILE_RANGE_IN.pack(source.fh, at, inode.nodeid, target.fh, to, length, 0)

        nodeid = source.inode.nodeid
        with size_changing(inode, when=to + count > inode.size):
            try:
                if conn.minor < 45:
                    raise error(ENOSYS)
                out, _ = conn.try_call(
                    Opcode.COPY_FILE_RANGE_64, nodeid, args(count), instead=ENOSYS,
                    out=abi.COPY_FILE_RANGE_64_OUT.size,
                )  # fmt: skip
                done = int(abi.COPY_FILE_RANGE_64_OUT.unpack(out)[0])
            except OSError as problem:
                if problem.errno != ENOSYS:
                    raise
                count = min(count, COPY_MAX)
                out, _ = conn.try_call(
                    Opcode.COPY_FILE_RANGE, nodeid, args(count), instead=EOPNOTSUPP, out=abi.WRITE_OUT.size
                )
                done = int(abi.WRITE_OUT.unpack(out)[0])
        if done > count:
            raise error(EIO)
        if done:
            inode.pages.drop_range(to // PAGE_SIZE, (to + done - 1) // PAGE_SIZE)
            inode.grow(to + done)
        inode.invalidate(STATX_MODSIZE)
    return done


def splice(source: OpenFile, target: OpenFile, count: int, at: int, to: int) -> int:
    """splice_copy_file_range"""
    buffer = memoryview(bytearray(min(count, SPLICE_PART)))
    length = read_at(source, at, buffer)
    return write_at(target, to, buffer[:length])[0]


# ---- locks


def flock(file: OpenFile, operation: int) -> None:
    """fuse_file_flock"""
    kind = operation & ~fcntl.LOCK_NB
    if kind not in LOCK_KINDS:
        raise error(EINVAL)
    if not file.conn.has(Init.FLOCK_LOCKS):
        file.inode.locks.flock(file, operation)
        return
    file.flocked = True
    wait = not operation & fcntl.LOCK_NB and kind != fcntl.LOCK_UN
    send_lock(file, Range(0, OFFSET_MAX, LOCK_KINDS[kind], id(file)), wait, abi.LK_FLOCK)


def lockf(file: OpenFile, command: int, length: int, start: int, owner: int) -> None:
    """lockf(3) with flags as in fcntl.lockf: LOCK_SH, LOCK_EX, LOCK_UN, LOCK_NB."""
    kind = LOCK_KINDS.get(command & ~fcntl.LOCK_NB)
    if kind is None:
        raise error(EINVAL)
    if (kind == fcntl.F_RDLCK and not file.readable) or (kind == fcntl.F_WRLCK and not file.writable):
        raise error(EBADF)
    end = OFFSET_MAX if length == 0 else start + length - 1
    if start < 0 or end < start:
        raise error(EINVAL)
    wanted = Range(start, end, kind, owner)
    wait = not command & fcntl.LOCK_NB and kind != fcntl.F_UNLCK
    if file.conn.has(Init.POSIX_LOCKS):
        send_lock(file, wanted, wait, 0)
    else:
        file.inode.locks.lock(wanted, wait)


def send_lock(file: OpenFile, wanted: Range, wait: bool, flags: int) -> None:
    """fuse_setlk"""
    assert isinstance(wanted.owner, int)
    pid = 0 if wanted.kind == fcntl.F_UNLCK else current().pid
    args = abi.LK_IN.pack(
        file.fh, scrambled(file.conn, wanted.owner), wanted.start, wanted.end, wanted.kind, pid, flags, 0
    )
    try:
        file.conn.call(Opcode.SETLKW if wait else Opcode.SETLK, file.inode.nodeid, args)
    except OSError as problem:
        if problem.errno == EAGAIN:
            raise BlockingIOError(EAGAIN, strerror(EAGAIN)) from problem
        raise
