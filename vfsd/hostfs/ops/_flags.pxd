"""An open file's flags, which the guest may change after it has opened it (fcntl(2), F_SETFL).

READ and WRITE say what they are at that moment. O_APPEND is applied to each WRITE, O_NONBLOCK means nothing to
a file; the others the host's descriptor has to have.
"""

from libc.errno cimport EINVAL, EMFILE, ENFILE, errno
from libc.stdint cimport uint32_t

from vfsd.sys cimport _syscalls as h
from vfsd.sys._syscalls cimport FD_BYTES, fd_name
from vfsd.hostfs.ops._caller cimport room_for_handle
from vfsd.hostfs.table._anchors cimport out_of_descriptors
from vfsd.hostfs.table._handles cimport descriptor_put, handle_other
from vfsd.hostfs.table._slots cimport cas_int, handle_t, load_acquire_int, tables_t


cdef inline int open_other(tables_t *t, uint32_t index) noexcept nogil:
    """The handle's second descriptor, or -errno. Not the first one changed: requests that were sent before
    the guest changed the flag, or that write its page cache back, may be under way.
    """
    cdef handle_t *handle = &t.handles[index]
    cdef char name[FD_BYTES]
    cdef int fd = load_acquire_int(&handle.other_fd)
    cdef int flags, rc
    if fd >= 0:
        return fd
    rc = room_for_handle(t)
    if rc < 0:
        return rc
    flags = h.fcntl(handle.fd, h.F_GETFL)
    flags = (flags & (h.O_ACCMODE | h.O_APPEND | h.O_SYNC | h.O_NOATIME)) | ((handle.flags ^ h.O_DIRECT) & h.O_DIRECT)
    while True:
        fd = h.openat(t.proc_fd, fd_name(handle.fd, name), flags | h.O_CLOEXEC | h.O_NONBLOCK)
        if fd >= 0:
            return handle_other(t, index, fd)
        rc = errno
        if out_of_descriptors(t, rc):
            continue
        descriptor_put(t)
        if rc == EINVAL:  # a file system without O_DIRECT, of which fcntl(2) in the guest knows nothing
            return handle.fd
        return -ENFILE if rc == EMFILE else -rc


cdef inline void set_noatime(int fd, int wanted) noexcept nogil:
    """As well as the daemon may: only the owner, or root, keeps the time of access from changing."""
    cdef int now = h.fcntl(fd, h.F_GETFL) if fd >= 0 else -1
    if now >= 0:
        h.fcntl(fd, h.F_SETFL, (now & ~h.O_NOATIME) | wanted)


cdef inline void follow_noatime(handle_t *handle, int flags) noexcept nogil:
    cdef int known = load_acquire_int(&handle.flags)
    if (known ^ flags) & h.O_NOATIME and cas_int(&handle.flags, known, known ^ h.O_NOATIME):
        set_noatime(handle.fd, flags & h.O_NOATIME)
        set_noatime(load_acquire_int(&handle.other_fd), flags & h.O_NOATIME)


cdef inline int descriptor_for(tables_t *t, uint32_t index, uint32_t flags, int follow) noexcept nogil:
    """Of a referenced handle, the descriptor for a READ or WRITE with these f_flags, or -errno.

    follow: those of `follow_flags` that matter to it. Linux always has O_LARGEFILE in a file's flags: none at
    all is a driver that does not tell.
    """
    cdef handle_t *handle = &t.handles[index]
    cdef int changed = (<int>flags ^ load_acquire_int(&handle.flags)) & follow
    cdef int fd = handle.fd
    if changed == 0:
        return fd
    if changed & h.O_DIRECT:
        fd = open_other(t, index)
    if changed & h.O_NOATIME:
        follow_noatime(handle, <int>flags)
    return fd
