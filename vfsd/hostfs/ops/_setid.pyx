"""Set-id bits of a file that is changed (see the .pxd)."""

from libc.errno cimport ENOSYS, errno
from libc.stdint cimport uint32_t

from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.ids._credentials cimport keep_setid
from vfsd.hostfs.table._slots cimport tables_t
from vfsd.sys._syscalls cimport FD_BYTES, fd_name

cdef enum:
    FCHMODAT2 = 452  # the same number on every architecture; younger than Debian 12's libc


cdef int set_mode(tables_t *t, int fd, uint32_t mode) noexcept nogil:
    """By descriptor (fchmodat2, Linux 6.6) or through /proc, which costs a path walk."""
    cdef char name[FD_BYTES]
    cdef int rc = keep_setid(t, True)
    if rc < 0:
        return rc
    if h.syscall(FCHMODAT2, fd, b"", mode, h.AT_EMPTY_PATH) == 0:
        return 0
    if errno != ENOSYS:
        return -errno
    return -errno if h.fchmodat(t.proc_fd, fd_name(fd, name), mode, 0) < 0 else 0


cdef int before_change(tables_t *t, int fd, bint kills) noexcept nogil:
    cdef h.statx_t st
    if not (t.killpriv_v2 and kills):
        return keep_setid(t, True)
    if h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_MODE, &st) < 0:
        return -errno
    if st.stx_mode & (h.S_ISGID | h.S_IXGRP) != h.S_ISGID:
        return keep_setid(t, False)
    # Such a set-group-id bit stays. Of a thread without CAP_FSETID the kernel would take it away, as the daemon
    # is not in the file's group (setattr_should_drop_sgid): the other bit has to go in a step of its own.
    if st.stx_mode & h.S_ISUID:
        return set_mode(t, fd, st.stx_mode & 0o7777 & ~h.S_ISUID)
    return keep_setid(t, True)
