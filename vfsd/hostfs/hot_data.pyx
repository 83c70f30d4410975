"""READ and WRITE: straight between the file and guest memory, never taking the GIL."""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from vfsd cimport _wire as w
from vfsd.fuse.dispatch cimport Dispatch, request_t, span_limit, span_read, span_t, span_write
from vfsd.hostfs cimport _host as h
from vfsd.hostfs cimport _handles as handles
from vfsd.hostfs._slots cimport tables_t
from vfsd.hostfs._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

ctypedef ssize_t (*transfer_t)(int fd, const h.iovec *iov, int n, int64_t offset) noexcept nogil


cdef ssize_t read_at(int fd, const h.iovec *iov, int n, int64_t offset) noexcept nogil:
    return h.preadv(fd, iov, n, offset)


cdef ssize_t write_at(int fd, const h.iovec *iov, int n, int64_t offset) noexcept nogil:
    return h.pwritev(fd, iov, n, offset)


cdef ssize_t append(int fd, const h.iovec *iov, int n, int64_t offset) noexcept nogil:
    return h.pwritev2(fd, iov, n, offset, h.RWF_APPEND)


cdef int64_t transfer(transfer_t op, int fd, span_t *s, int64_t offset) noexcept nogil:
    """Move the whole span in as few system calls as IOV_MAX allows: bytes moved, or -errno."""
    cdef int64_t done = 0, asked
    cdef ssize_t moved
    cdef uint32_t at = 0, n, i
    while at < s.n:
        n = s.n - at if s.n - at < <uint32_t>h.IOV_MAX else <uint32_t>h.IOV_MAX
        asked = 0
        for i in range(n):
            asked += s.iov[at + i].iov_len
        moved = op(fd, &s.iov[at], n, offset + done)
        if moved < 0:
            return done if done else -errno
        done += moved
        if moved < asked:
            return done
        at += n
    return done


cdef int op_read(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *tables = <tables_t *>fs
    cdef w.fuse_read_in arg
    cdef int64_t index, done
    cdef int fd = -1
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or arg.size > r.reply.bytes:
        return -EINVAL
    index = handles.handle_get(tables, arg.fh, &fd)
    if index < 0:
        return <int>index
    span_limit(&r.reply, arg.size)
    done = transfer(read_at, fd, &r.reply, arg.offset)
    handles.handle_put(tables, index)
    if done < 0:
        return <int>done
    r.reply_bytes = done
    return 0


cdef int op_write(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *tables = <tables_t *>fs
    cdef w.fuse_write_in arg
    cdef w.fuse_write_out out
    cdef transfer_t op = write_at
    cdef int64_t index, done
    cdef int fd = -1
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or arg.size > r.body.bytes or r.reply.bytes < sizeof(out):
        return -EINVAL
    index = handles.handle_get(tables, arg.fh, &fd)
    if index < 0:
        return <int>index
    span_limit(&r.body, arg.size)
    # Files are opened without O_APPEND: another guest, or the host, may have moved the end.
    if arg.flags & h.O_APPEND and not arg.write_flags & w.FUSE_WRITE_CACHE:
        op = append
    done = transfer(op, fd, &r.body, arg.offset)
    handles.handle_put(tables, index)
    if done < 0:
        return <int>done
    out.size = <uint32_t>done
    out.padding = 0
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    dispatch.set_hot(NUMBER["READ"], op_read, &tables.t, tables)
    dispatch.set_hot(NUMBER["WRITE"], op_write, &tables.t, tables)
