"""Locks of open files: flock(2) and POSIX record locks, for guests that were offered them."""

from libc.errno cimport EBADF, EINVAL, ENOSYS, EOVERFLOW
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset

from vfsd.fuse cimport _wire as w
from vfsd.fuse.dispatch cimport Dispatch, request_args, request_t, span_read, span_write
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._handles cimport handle_get, handle_put
from vfsd.hostfs.lock._holds cimport OFFSET_MAX, want_t
from vfsd.hostfs.lock._locks cimport lock_set, lock_test, locks_interrupt
from vfsd.hostfs.table._slots cimport tables_t
from vfsd.hostfs.table._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

assert sizeof(w.fuse_lk_in) == 48

cdef uint32_t SETLKW = NUMBER["SETLKW"]


cdef int read_want(tables_t *t, request_t *r, want_t *want) noexcept nogil:
    """What is asked for, checked as flock_to_posix_lock() of fs/locks.c does: 0 or -errno."""
    cdef w.fuse_lk_in arg
    memset(&arg, 0, sizeof(arg))
    memset(want, 0, sizeof(want_t))
    if request_args(r, &arg, sizeof(arg)) < 0 or arg.lk_flags & ~<uint32_t>w.FUSE_LK_FLOCK:
        return -EINVAL
    want.flock = arg.lk_flags & w.FUSE_LK_FLOCK
    if not (t.flock if want.flock else t.posix_lock):
        return -ENOSYS
    if (arg.lk.type != <uint32_t>h.F_RDLCK and arg.lk.type != <uint32_t>h.F_WRLCK
            and arg.lk.type != <uint32_t>h.F_UNLCK):
        return -EINVAL
    if want.flock:
        arg.lk.start = 0
        arg.lk.end = OFFSET_MAX
    elif <int64_t>arg.lk.start < 0:
        return -EINVAL
    elif arg.lk.end > OFFSET_MAX:
        return -EOVERFLOW
    elif arg.lk.end < arg.lk.start:
        return -EINVAL
    want.guest = t
    want.unique = r.header.unique
    want.fh = arg.fh
    want.number = arg.fh if want.flock else arg.owner
    want.start = arg.lk.start
    want.end = arg.lk.end
    want.type = arg.lk.type
    want.pid = arg.lk.pid
    return 0


cdef int op_getlk(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_file_lock out
    cdef want_t want
    cdef int64_t index
    cdef int rc = read_want(t, r, &want)
    if rc < 0:
        return rc
    if want.flock or want.type == h.F_UNLCK or r.reply.bytes < sizeof(out):
        return -EINVAL
    index = handle_get(t, want.fh, &want.fd)
    if index < 0:
        return <int>index
    rc = lock_test(&want)
    handle_put(t, <uint32_t>index)
    if rc < 0:
        return rc
    out.start = want.start
    out.end = want.end
    out.type = want.type
    out.pid = want.pid
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef int check_mode(want_t *want) noexcept nogil:
    """A read lock needs a file open to read, a write lock one open to write: 0 or -EBADF."""
    cdef int mode = h.fcntl(want.fd, h.F_GETFL) & h.O_ACCMODE
    want.reads_only = mode == h.O_RDONLY
    if want.flock or want.type == h.F_UNLCK:
        return 0
    return -EBADF if mode == (h.O_WRONLY if want.type == h.F_RDLCK else h.O_RDONLY) else 0


cdef int op_setlk(void *fs, request_t *r) noexcept nogil:
    """SETLK, and SETLKW, which is parked if it has to wait."""
    cdef tables_t *t = <tables_t *>fs
    cdef want_t want
    cdef int64_t index
    cdef int rc = read_want(t, r, &want)
    if rc < 0:
        return rc
    index = handle_get(t, want.fh, &want.fd)
    if index < 0:
        return <int>index
    rc = check_mode(&want)
    if rc == 0:
        rc = lock_set(&want, r.header.opcode == SETLKW, r.parked)
    handle_put(t, <uint32_t>index)
    return rc


cdef int op_interrupt(void *fs, request_t *r) noexcept nogil:
    """A wait for a lock ends with EINTR; nothing else waits long enough. Linux's own driver never sends it.

    Sent on the queue of the request it is for, it finds that waiting or answered.
    """
    cdef w.fuse_interrupt_in arg
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    locks_interrupt(<tables_t *>fs, arg.unique)
    return 0


def install(Dispatch dispatch, Tables tables):
    """Make these operations the dispatch's, if the share has locks; else they are not there (ENOSYS)."""
    cdef tables_t *t = tables.t
    if not (t.flock or t.posix_lock):
        return
    dispatch.set_hot(NUMBER["GETLK"], op_getlk, t, tables)
    dispatch.set_hot(NUMBER["SETLK"], op_setlk, t, tables)
    dispatch.set_hot(NUMBER["SETLKW"], op_setlk, t, tables)
    dispatch.set_hot(NUMBER["INTERRUPT"], op_interrupt, t, tables)
