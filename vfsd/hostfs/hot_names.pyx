"""LOOKUP, FORGET, BATCH_FORGET, GETATTR: operations on names and inodes that never take the GIL."""

from libc.errno cimport EINVAL, ENAMETOOLONG
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from vfsd cimport _wire as w
from vfsd.fuse.dispatch cimport NAME_MAX, NO_REPLY, Dispatch, name_check, request_t, span_read, span_write
from vfsd.hostfs cimport _handles as handles
from vfsd.hostfs cimport _inodes as inodes
from vfsd.hostfs._anchors cimport inode_fd
from vfsd.hostfs._slots cimport tables_t
from vfsd.hostfs._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)


cdef int read_name(request_t *r, char *name) noexcept nogil:
    """The body's name, checked, NUL-terminated; name holds NAME_MAX + 2 bytes."""
    cdef uint64_t n = r.body.bytes
    cdef int rc
    if n == 0:
        return -EINVAL
    if n > NAME_MAX + 1:
        return -ENAMETOOLONG
    rc = span_read(&r.body, name, n)
    if rc < 0:
        return rc
    # Linux sends the name and its NUL as two arguments: the NUL is the last byte.
    if name[n - 1] != 0:
        return -EINVAL
    return name_check(name, n - 1)


cdef int op_lookup(void *fs, request_t *r) noexcept nogil:
    cdef char name[NAME_MAX + 2]
    cdef w.fuse_entry_out out
    cdef int rc = read_name(r, name)
    if rc < 0:
        return rc
    if r.reply.bytes < sizeof(out):
        return -EINVAL
    rc = inodes.lookup(<tables_t *>fs, r.header.nodeid, name, &out)
    if rc < 0:
        return rc
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef int op_forget(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_forget_in forget
    if span_read(&r.body, &forget, sizeof(forget)) < 0:
        return -EINVAL
    inodes.inode_forget(<tables_t *>fs, r.header.nodeid, forget.nlookup)
    return NO_REPLY


cdef int op_batch_forget(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_batch_forget_in batch
    cdef w.fuse_forget_one one
    if span_read(&r.body, &batch, sizeof(batch)) < 0:
        return -EINVAL
    while batch.count:
        batch.count -= 1
        if span_read(&r.body, &one, sizeof(one)) < 0:
            return -EINVAL
        inodes.inode_forget(<tables_t *>fs, one.nodeid, one.nlookup)
    return NO_REPLY


cdef int op_getattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *tables = <tables_t *>fs
    cdef w.fuse_getattr_in arg
    cdef w.fuse_attr_out out
    cdef int64_t index
    cdef int fd = -1, rc
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or r.reply.bytes < sizeof(out):
        return -EINVAL
    if arg.getattr_flags & w.FUSE_GETATTR_FH:
        index = handles.handle_get(tables, arg.fh, &fd)
        if index < 0:
            return <int>index
        rc = inodes.attr_of(tables, fd, &out)
        handles.handle_put(tables, index)
    else:
        index = inodes.inode_get(tables, r.header.nodeid)
        if index < 0:
            return <int>index
        rc = inode_fd(tables, index)
        if rc >= 0:
            rc = inodes.attr_of(tables, rc, &out)
        inodes.inode_put(tables, index)
    if rc < 0:
        return rc
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *fs = &tables.t
    dispatch.set_hot(NUMBER["LOOKUP"], op_lookup, fs, tables)
    dispatch.set_hot(NUMBER["FORGET"], op_forget, fs, tables)
    dispatch.set_hot(NUMBER["BATCH_FORGET"], op_batch_forget, fs, tables)
    dispatch.set_hot(NUMBER["GETATTR"], op_getattr, fs, tables)
