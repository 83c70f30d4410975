"""Making names and files as the caller (see the .pxd)."""

from libc.errno cimport EISDIR, EMFILE, ENFILE, EOPNOTSUPP, errno
from libc.stdint cimport uint32_t
from libc.string cimport strcmp

from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._anchors cimport out_of_descriptors
from vfsd.hostfs.ids._credentials cimport become, creator_t, enter_proc, must_restore, override, unbecome
from vfsd.hostfs.table._nodes cimport device_of
from vfsd.sys._syscalls cimport FD_BYTES, fd_name
from vfsd.hostfs.table._slots cimport tables_t


# --- the label ---

cdef bint kernel_labels(const tables_t *t, const creator_t *c) noexcept nogil:
    return t.selinux_proc_fd >= 0 and strcmp(c.context_name, b"security.selinux") == 0


cdef int open_fscreate(tables_t *t) noexcept nogil:
    cdef int fd
    while True:
        fd = h.openat(t.selinux_proc_fd, b"thread-self/attr/fscreate", h.O_WRONLY | h.O_CLOEXEC)
        if fd >= 0 or not out_of_descriptors(t, errno):
            return fd if fd >= 0 else -errno


cdef int begin(tables_t *t, const creator_t *c, int *fscreate) noexcept nogil:
    """Be the caller, and have what this thread makes labelled by the kernel, until end: 0 or -errno."""
    cdef int rc
    fscreate[0] = -1
    if c.context_bytes and kernel_labels(t, c):
        fscreate[0] = open_fscreate(t)
        if fscreate[0] < 0:
            return fscreate[0]
        if h.write(fscreate[0], c.context, c.context_bytes) < 0:
            rc = -errno
            h.close(fscreate[0])
            return rc
    rc = become(t, c)
    if rc < 0:
        drop_fscreate(fscreate[0])
    return rc


cdef void drop_fscreate(int fd) noexcept nogil:
    """A thread that went on with this label would give it to others' files: never."""
    cdef int tries = 0
    if fd < 0:
        return
    while h.write(fd, NULL, 0) < 0:
        must_restore(&tries)
    h.close(fd)


cdef void end(tables_t *t, const creator_t *c, int fscreate) noexcept nogil:
    unbecome(t, c)
    drop_fscreate(fscreate)


cdef void unmake(int parent, const char *name, int fd) noexcept nogil:
    cdef h.statx_t made, found
    if (h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_INO, &made) == 0
            and h.statx(parent, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, h.STATX_INO, &found) == 0
            and made.stx_ino == found.stx_ino and device_of(&made) == device_of(&found)):
        h.unlinkat(parent, name, h.AT_REMOVEDIR if made.stx_mode & h.S_IFMT == h.S_IFDIR else 0)


cdef int open_name(tables_t *t, int parent, const char *name) noexcept nogil:
    """A new O_PATH descriptor, or -errno."""
    cdef int fd, rc
    while True:
        fd = h.openat(parent, name, h.O_PATH | h.O_NOFOLLOW | h.O_CLOEXEC)
        if fd >= 0:
            return fd
        rc = errno
        if not out_of_descriptors(t, rc):
            return -ENFILE if rc == EMFILE else -rc


cdef int label_name(tables_t *t, const creator_t *c, int parent, const char *name) noexcept nogil:
    """Label what was just made and is not open: 0, or -errno and it is gone again."""
    cdef char path[FD_BYTES]
    cdef int anchor = open_name(t, parent, name)
    cdef int rc = enter_proc(t) if anchor >= 0 else anchor
    if rc == 0 and h.setxattr(fd_name(anchor, path), c.context_name, c.context, c.context_bytes, 0) < 0:
        rc = -errno
    if rc < 0 and anchor >= 0:
        unmake(parent, name, anchor)
    elif rc < 0 and h.unlinkat(parent, name, 0) < 0 and errno == EISDIR:
        h.unlinkat(parent, name, h.AT_REMOVEDIR)  # nothing tells whose it is but that it was made just now
    if anchor >= 0:
        h.close(anchor)
    return rc


cdef int label_made(tables_t *t, const creator_t *c, int parent, const char *name, int fd) noexcept nogil:
    """As the daemon, not as the caller."""
    cdef int rc
    if c.context_bytes == 0 or kernel_labels(t, c):
        return 0
    if fd < 0:
        return label_name(t, c, parent, name)
    rc = -errno if h.fsetxattr(fd, c.context_name, c.context, c.context_bytes, 0) < 0 else 0
    if rc < 0 and name != NULL:
        unmake(parent, name, fd)
    return rc


# --- making ---

cdef int make_name(tables_t *t, const creator_t *c, int parent, const char *name, make_t call,
                   const void *what) noexcept nogil:
    cdef int fscreate = -1
    cdef int rc = begin(t, c, &fscreate)
    if rc < 0:
        return rc
    rc = -errno if call(parent, name, what) < 0 else 0
    if override(t, c, rc):
        rc = -errno if call(parent, name, what) < 0 else 0
    end(t, c, fscreate)
    return rc if rc < 0 else label_made(t, c, parent, name, -1)


cdef int open_made(tables_t *t, const creator_t *c, int parent, const char *name, int flags,
                   uint32_t mode) noexcept nogil:
    """openat(2) as the caller: a descriptor or -errno."""
    cdef int fd = -1, fscreate = -1, rc
    while True:
        rc = begin(t, c, &fscreate)
        if rc < 0:
            return rc
        fd = h.openat(parent, name, flags | h.O_NOFOLLOW | h.O_CLOEXEC | h.O_NONBLOCK, mode & 0o7777)
        if fd < 0 and override(t, c, -errno):
            fd = h.openat(parent, name, flags | h.O_NOFOLLOW | h.O_CLOEXEC | h.O_NONBLOCK, mode & 0o7777)
        rc = errno
        end(t, c, fscreate)
        if fd >= 0:
            return fd
        if not out_of_descriptors(t, rc):
            return -ENFILE if rc == EMFILE else -rc


cdef int make_nameless(tables_t *t, const creator_t *c, int parent, int flags, uint32_t mode) noexcept nogil:
    cdef int fd = open_made(t, c, parent, b".", flags | h.O_TMPFILE, mode)
    cdef int rc
    if fd < 0:
        return fd
    rc = label_made(t, c, parent, NULL, fd)
    if rc < 0:
        h.close(fd)
        return rc
    return fd


cdef int reopen_reading(tables_t *t, int fd) noexcept nogil:
    """The same file open for reading alone, so that the host can execute it; or fd if that is not allowed."""
    cdef char path[FD_BYTES]
    cdef int reading = h.openat(t.proc_fd, fd_name(fd, path), h.O_RDONLY | h.O_CLOEXEC | h.O_NONBLOCK)
    if reading < 0:
        return fd
    h.close(fd)
    return reading


cdef int make_labelled(tables_t *t, const creator_t *c, int parent, const char *name, int flags,
                       uint32_t mode) noexcept nogil:
    """make_file of a file that nobody ever sees without its label; -EISDIR where files can't be nameless."""
    cdef char path[FD_BYTES]
    cdef int opened = flags & ~(h.O_EXCL | h.O_TRUNC | h.O_ACCMODE)
    cdef int fd, rc
    # Without a name a file must be open for writing.
    opened |= h.O_RDWR if flags & h.O_ACCMODE == h.O_RDONLY else flags & h.O_ACCMODE
    fd = open_made(t, c, parent, b".", opened | h.O_TMPFILE, mode)
    if fd < 0:
        return -EISDIR if fd == -EOPNOTSUPP else fd
    rc = label_made(t, c, parent, NULL, fd)
    # Through the link in /proc: AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH.
    if rc == 0 and h.linkat(t.proc_fd, fd_name(fd, path), parent, name, h.AT_SYMLINK_FOLLOW) < 0:
        rc = -errno
    if rc < 0:
        h.close(fd)
        return rc
    return reopen_reading(t, fd) if flags & h.O_ACCMODE == h.O_RDONLY else fd


cdef int make_file(tables_t *t, const creator_t *c, int parent, const char *name, int flags,
                   uint32_t mode) noexcept nogil:
    cdef int fd, rc
    if c.context_bytes and not kernel_labels(t, c):
        fd = make_labelled(t, c, parent, name, flags, mode)
        if fd != -EISDIR:
            return fd
    fd = open_made(t, c, parent, name, flags | h.O_CREAT | h.O_EXCL, mode)
    if fd < 0:
        return fd
    rc = label_made(t, c, parent, name, fd)
    if rc < 0:
        h.close(fd)
        return rc
    return fd
