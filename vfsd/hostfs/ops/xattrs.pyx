"""Extended attributes, off unless the operator turned them on (--xattr)."""

from libc.errno cimport E2BIG, EEXIST, EINVAL, ENODATA, ENOSYS, ERANGE, errno
from libc.stdint cimport uint32_t
from libc.string cimport memcmp, memmove, memset, strcmp

from vfsd.fuse cimport _wire as w
from vfsd.fuse.dispatch cimport Dispatch, request_t, span_read, span_write
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.ops._again cimport note_begin, was_begun
from vfsd.hostfs.ops._caller cimport FD_BYTES, fd_name, place_get, place_put, place_t, read_string
from vfsd.hostfs.ids._credentials cimport enter_proc, keep_setid
from vfsd.hostfs.table._slots cimport NAME_BYTES, tables_t
from vfsd.hostfs.table._tables cimport Tables
from vfsd.hostfs.ids._xattrmap cimport may_store, name_to_guest, name_to_host

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char *text, size_t most)

cdef enum:
    VALUE_MAX = 65536  # XATTR_SIZE_MAX and XATTR_LIST_MAX of linux/limits.h
    LIST_USUAL = 4096  # bytes that nearly every list fits in


cdef int read_attribute(tables_t *t, request_t *r, char *name) noexcept nogil:
    """The next string as an attribute's name, made the host's: 0 or -errno."""
    cdef int n = read_string(&r.body, name, NAME_BYTES)
    if n <= 0:
        return -EINVAL if n == -EINVAL else -ERANGE
    return name_to_host(t, name)


cdef int place_path(tables_t *t, request_t *r, place_t *p, char *path) noexcept nogil:
    """The inode, held, and a path that names it, be it a symlink, for this thread: 0 or -errno.

    Descriptors of O_PATH have no fgetxattr(2); the shorter the path, the cheaper.
    """
    cdef int rc = place_get(t, r.header.nodeid, p)
    if rc < 0:
        return rc
    rc = enter_proc(t)
    if rc < 0:
        place_put(t, p)
        return rc
    fd_name(p.fd, path)
    return 0


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
    cdef char path[FD_BYTES]
    cdef char value[VALUE_MAX]
    cdef uint32_t room
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
    # No more than was asked for: the kernel clears as much memory first.
    room = arg.size if arg.size < VALUE_MAX else VALUE_MAX
    rc = reply_sized(r, value, h.getxattr(path, name, value, room), arg.size)
    place_put(t, &p)
    return rc


cdef ssize_t list_for_guest(tables_t *t, const char *path, char *names) noexcept nogil:
    """The names the guest may see, as it calls them: bytes, or -1 and errno."""
    cdef const char *name
    cdef ssize_t n = h.listxattr(path, names, LIST_USUAL), at = 0, kept = 0, size
    if n < 0 and errno == ERANGE:
        n = h.listxattr(path, names, VALUE_MAX)
    while at < n:
        size = strnlen(names + at, n - at) + 1
        if size > n - at:
            break  # 9p passes on what its server says, with or without an end
        name = name_to_guest(t, names + at)
        at += size
        if name != NULL:
            size = names + at - name
            memmove(names + kept, name, size)
            kept += size
    return n if n < 0 else kept


cdef int op_listxattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_getxattr_in arg
    cdef place_t p
    cdef char path[FD_BYTES]
    cdef char names[VALUE_MAX]
    cdef int rc
    if not t.xattr:
        return -ENOSYS
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    rc = place_path(t, r, &p, path)
    if rc < 0:
        return rc
    rc = reply_sized(r, names, list_for_guest(t, path, names), arg.size)
    place_put(t, &p)
    return rc


cdef int drop_setgid(tables_t *t, int fd, const char *path) noexcept nogil:
    """What setting an ACL does for who is not in the file's group (posix_acl_update_mode)."""
    cdef h.statx_t st
    if h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_BASIC_STATS, &st) < 0:
        return -errno
    if not st.stx_mode & h.S_ISGID:
        return 0
    return -errno if h.fchmodat(t.proc_fd, path, st.stx_mode & 0o5777, 0) < 0 else 0


cdef bint has_value(const char *path, const char *name, const char *value, uint32_t n) noexcept nogil:
    cdef char found[VALUE_MAX]
    return h.getxattr(path, name, found, VALUE_MAX) == n and memcmp(found, value, n) == 0


cdef int op_setxattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_setxattr_in arg
    cdef w.fuse_setxattr_ext more
    cdef place_t p
    cdef char name[NAME_BYTES]
    cdef char path[FD_BYTES]
    cdef char value[VALUE_MAX]
    cdef int rc
    if not t.xattr:
        return -ENOSYS
    memset(&more, 0, sizeof(more))
    if (span_read(&r.body, &arg, sizeof(arg)) < 0
            or (t.setxattr_ext and span_read(&r.body, &more, sizeof(more)) < 0)):
        return -EINVAL
    rc = read_attribute(t, r, name)
    if rc == 0:
        rc = may_store(t, name)
    if rc < 0:
        return rc
    if arg.size > VALUE_MAX:
        return -E2BIG
    if arg.flags & ~<uint32_t>(h.XATTR_CREATE | h.XATTR_REPLACE) or span_read(&r.body, value, arg.size) < 0:
        return -EINVAL
    rc = place_path(t, r, &p, path)
    if rc < 0:
        return rc
    rc = keep_setid(t, True)  # only the guest knows the caller's groups
    if rc == 0:
        note_begin(r)
        rc = -errno if h.setxattr(path, name, value, arg.size, arg.flags) < 0 else 0
    if rc == -EEXIST and was_begun(r) and has_value(path, name, value, arg.size):
        rc = 0
    if (rc == 0 and more.setxattr_flags & w.FUSE_SETXATTR_ACL_KILL_SGID
            and strcmp(name, b"system.posix_acl_access") == 0):
        rc = drop_setgid(t, p.fd, path)
    place_put(t, &p)
    return rc


cdef int op_removexattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef place_t p
    cdef char name[NAME_BYTES]
    cdef char path[FD_BYTES]
    cdef int rc
    if not t.xattr:
        return -ENOSYS
    rc = read_attribute(t, r, name)
    if rc == 0:
        rc = place_path(t, r, &p, path)
    if rc < 0:
        return rc
    note_begin(r)
    rc = -errno if h.removexattr(path, name) < 0 else 0
    if rc == -ENODATA and was_begun(r):
        rc = 0
    place_put(t, &p)
    return rc


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *t = tables.t
    dispatch.set_hot(NUMBER["GETXATTR"], op_getxattr, t, tables)
    dispatch.set_hot(NUMBER["LISTXATTR"], op_listxattr, t, tables)
    dispatch.set_hot(NUMBER["SETXATTR"], op_setxattr, t, tables)
    dispatch.set_hot(NUMBER["REMOVEXATTR"], op_removexattr, t, tables)
