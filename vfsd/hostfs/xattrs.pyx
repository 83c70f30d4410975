"""Extended attributes, off unless the operator turned them on (--xattr)."""

from libc.errno cimport E2BIG, EINVAL, ENOSYS, EOPNOTSUPP, ERANGE, errno
from libc.stdint cimport uint32_t
from libc.stdio cimport snprintf
from libc.string cimport strncmp

from vfsd cimport _wire as w
from vfsd.fuse.dispatch cimport NAME_MAX, Dispatch, request_t, span_read, span_write
from vfsd.hostfs cimport _host as h
from vfsd.hostfs._caller cimport NAME_BYTES, place_get, place_put, place_t, read_string
from vfsd.hostfs._slots cimport tables_t
from vfsd.hostfs._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

cdef enum:
    VALUE_MAX = 65536  # XATTR_SIZE_MAX and XATTR_LIST_MAX of linux/limits.h
    FD_PATH = 32       # bytes of a path below /proc/self/fd


cdef int read_attribute(tables_t *t, request_t *r, char *name) noexcept nogil:
    """The next string as an attribute's name: 0 or -errno."""
    cdef int n = read_string(&r.body, name, NAME_BYTES)
    if n == 0 or n > NAME_MAX:
        return -ERANGE
    if n < 0:
        return -EINVAL if n == -EINVAL else -ERANGE
    # Without FUSE_POSIX_ACL the guest would not enforce what it stores.
    return -EOPNOTSUPP if strncmp(name, b"system.posix_acl_", 17) == 0 else 0


cdef int place_path(tables_t *t, request_t *r, place_t *p, char *path) noexcept nogil:
    """The inode, held, and the path that names it, be it a symlink: 0 or -errno."""
    cdef int rc = place_get(t, r.header.nodeid, p)
    if rc == 0:
        snprintf(path, FD_PATH, b"/proc/self/fd/%d", p.fd)
    return rc


cdef int reply_sized(request_t *r, const char *data, ssize_t n, uint32_t size) noexcept nogil:
    """The data if it fits what the guest has room for, its length if it asked only for that."""
    cdef w.fuse_getxattr_out out
    if n < 0:
        return -errno
    if size == 0:
        out.size = <uint32_t>n
        out.padding = 0
        r.reply_bytes = sizeof(out)
        return span_write(&r.reply, &out, sizeof(out))
    if n > size:
        return -ERANGE
    r.reply_bytes = n
    return span_write(&r.reply, data, n)


cdef int op_getxattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_getxattr_in arg
    cdef place_t p
    cdef char name[NAME_BYTES]
    cdef char path[FD_PATH]
    cdef char value[VALUE_MAX]
    cdef int rc
    if not t.xattr:
        return -ENOSYS  # the guest never asks again
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    rc = read_attribute(t, r, name)
    if rc == 0:
        rc = place_path(t, r, &p, path)
    if rc < 0:
        return rc
    rc = reply_sized(r, value, h.getxattr(path, name, value, VALUE_MAX), arg.size)
    place_put(t, &p)
    return rc


cdef int op_listxattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_getxattr_in arg
    cdef place_t p
    cdef char path[FD_PATH]
    cdef char names[VALUE_MAX]
    cdef int rc
    if not t.xattr:
        return -ENOSYS
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    rc = place_path(t, r, &p, path)
    if rc < 0:
        return rc
    rc = reply_sized(r, names, h.listxattr(path, names, VALUE_MAX), arg.size)
    place_put(t, &p)
    return rc


cdef int op_setxattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_setxattr_in arg
    cdef place_t p
    cdef char name[NAME_BYTES]
    cdef char path[FD_PATH]
    cdef char value[VALUE_MAX]
    cdef int rc
    if not t.xattr:
        return -ENOSYS
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    rc = read_attribute(t, r, name)
    if rc < 0:
        return rc
    if arg.size > VALUE_MAX:
        return -E2BIG
    if arg.flags & ~<uint32_t>(h.XATTR_CREATE | h.XATTR_REPLACE) or span_read(&r.body, value, arg.size) < 0:
        return -EINVAL
    rc = place_path(t, r, &p, path)
    if rc < 0:
        return rc
    rc = -errno if h.setxattr(path, name, value, arg.size, arg.flags) < 0 else 0
    place_put(t, &p)
    return rc


cdef int op_removexattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef place_t p
    cdef char name[NAME_BYTES]
    cdef char path[FD_PATH]
    cdef int rc
    if not t.xattr:
        return -ENOSYS
    rc = read_attribute(t, r, name)
    if rc == 0:
        rc = place_path(t, r, &p, path)
    if rc < 0:
        return rc
    rc = -errno if h.removexattr(path, name) < 0 else 0
    place_put(t, &p)
    return rc


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *t = &tables.t
    dispatch.set_hot(NUMBER["GETXATTR"], op_getxattr, t, tables)
    dispatch.set_hot(NUMBER["LISTXATTR"], op_listxattr, t, tables)
    dispatch.set_hot(NUMBER["SETXATTR"], op_setxattr, t, tables)
    dispatch.set_hot(NUMBER["REMOVEXATTR"], op_removexattr, t, tables)
