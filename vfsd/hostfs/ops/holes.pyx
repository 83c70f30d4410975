"""LSEEK: where a file's data and holes are, as far as the host can know."""

from libc.errno cimport EINVAL, ENOSYS, ENXIO, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from vfsd.fuse cimport _wire as w
from vfsd.fuse.dispatch cimport Dispatch, request_t, span_read, span_write
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.ops._caller cimport file_get
from vfsd.hostfs.table._handles cimport handle_put
from vfsd.hostfs.table._slots cimport (
    DIRTY_NOTHING, DIRTY_SIZES, load_acquire_int, load_relaxed_u8, tables_t,
)
from vfsd.hostfs.table._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)


cdef bint may_be_dirty(tables_t *t, uint32_t index) noexcept nogil:
    """Whether the guest may have data where the host has a hole, or beyond the host's end of the file.

    Linux asks without writing back first (fuse_lseek). It has written all back when it releases what was
    open for writing, which a mapping keeps open. A page that is stored to was read or written before.
    """
    if t.dirty == DIRTY_NOTHING:
        return False
    if t.dirty != DIRTY_SIZES and not load_relaxed_u8(&t.inodes[index].cached):
        return False
    return t.zero_open or load_acquire_int(&t.dirtiers[index]) > 0


cdef int64_t seek_in_data(int fd, int64_t offset, uint32_t whence) noexcept nogil:
    """As generic_file_llseek() has it: all is data, and a hole at the end."""
    cdef h.statx_t st
    if h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_SIZE, &st) < 0:
        return -errno
    if offset < 0 or <uint64_t>offset >= st.stx_size:
        return -ENXIO
    return offset if whence == <uint32_t>h.SEEK_DATA else <int64_t>st.stx_size


cdef int64_t seek(tables_t *t, uint32_t index, int fd, int64_t offset, uint32_t whence) noexcept nogil:
    cdef int64_t found
    if may_be_dirty(t, index):
        # A size that only the guest knows it must use itself; it never asks again then, of no file.
        return -ENOSYS if t.dirty == DIRTY_SIZES else seek_in_data(fd, offset, whence)
    found = h.lseek(fd, offset, whence)
    return found if found >= 0 else -errno


cdef int op_lseek(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_lseek_in arg
    cdef w.fuse_lseek_out out
    cdef int64_t index, found
    cdef int fd = -1
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or r.reply.bytes < sizeof(out):
        return -EINVAL
    # Only these reach the host; other kinds would move a position that nobody uses.
    if arg.whence != <uint32_t>h.SEEK_DATA and arg.whence != <uint32_t>h.SEEK_HOLE:
        return -EINVAL
    index = file_get(t, r.header.nodeid, arg.fh, 0, &fd)
    if index < 0:
        return <int>index
    found = seek(t, t.handles[index].inode, fd, arg.offset, arg.whence)
    handle_put(t, index)
    if found < 0:
        return <int>found
    out.offset = found
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    dispatch.set_hot(NUMBER["LSEEK"], op_lseek, tables.t, tables)
