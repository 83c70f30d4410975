"""The inode cache's descriptors: closed when there are too many, brought back by file handle."""

from libc.errno cimport EMFILE, ENFILE, errno
from libc.stdint cimport uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy

from vfsd._wire cimport FUSE_ROOT_ID
from vfsd._threads cimport pthread_mutex_lock, pthread_mutex_unlock
from vfsd.hostfs cimport _host as h
from vfsd.hostfs._slots cimport (
    BUSY, HANDLE_BYTES_MAX, MOUNTS_MAX, REFERENCES, add_u64, cas_int, cas_u64, inode_t, load_acquire_int,
    load_acquire_u64, store_release_int, store_release_u64,
)

cdef extern from *:
    """
    /* struct file_handle with room for the bytes */
    struct vfsd_handle { unsigned int handle_bytes; int handle_type; unsigned char bytes[64]; };
    """
    struct vfsd_handle:
        unsigned int handle_bytes
        int handle_type
        unsigned char bytes[HANDLE_BYTES_MAX]

cdef enum:
    EVICT_STEPS = 4096  # slots the evictor's hand passes in one call


cdef bint handles_work(int fd, vfsd_handle *handle) noexcept nogil:
    """Whether that file handle can be opened in the mount of fd."""
    cdef int probe = h.open_by_handle_at(fd, <h.file_handle *>handle, h.O_PATH | h.O_CLOEXEC)
    if probe >= 0:
        h.close(probe)
    return probe >= 0


cdef void note_root(tables_t *t) noexcept nogil:
    """The share's own mount, while there are descriptors: later, evicting must not need one."""
    cdef inode_t *root = &t.inodes[FUSE_ROOT_ID]
    cdef vfsd_handle handle
    cdef int mnt_id = 0
    handle.handle_bytes = HANDLE_BYTES_MAX
    t.mounts[0].mnt_id = root.mnt_id
    t.mounts[0].fd = -1
    t.n_mounts = 1
    if (h.name_to_handle_at(root.fd, b"", <h.file_handle *>&handle, &mnt_id, h.AT_EMPTY_PATH) == 0
            and handles_work(root.fd, &handle)):
        t.mounts[0].fd = root.fd


cdef int mount_of(tables_t *t, inode_t *inode, vfsd_handle *handle) noexcept nogil:
    """Index of the mount the inode's file handle can be opened in, or -1. Under t.evict."""
    cdef uint32_t i
    cdef int fd
    cdef char path[32]
    for i in range(t.n_mounts):
        if t.mounts[i].mnt_id == inode.mnt_id:
            return i if t.mounts[i].fd >= 0 else -1
    # A directory stands for its mount: a file would be kept on disk when it is removed.
    if t.n_mounts == MOUNTS_MAX or inode.mode != h.S_IFDIR:
        return -1
    snprintf(path, sizeof(path), b"/proc/self/fd/%d", inode.fd)
    fd = h.openat(-1, path, h.O_RDONLY | h.O_CLOEXEC)
    if fd >= 0:
        if not handles_work(fd, handle):
            h.close(fd)
            fd = -1
    elif errno == EMFILE or errno == ENFILE:
        return -1
    i = t.n_mounts
    t.mounts[i].mnt_id = inode.mnt_id
    t.mounts[i].fd = fd
    t.n_mounts += 1
    return i if fd >= 0 else -1


cdef bint can_reopen(tables_t *t, inode_t *inode) noexcept nogil:
    """Note the file handle that brings the inode back. An unlinked one could not come back."""
    cdef vfsd_handle handle
    cdef h.statx_t st
    cdef int mnt_id = 0, mount
    if h.statx(inode.fd, b"", h.AT_EMPTY_PATH, h.STATX_BASIC_STATS, &st) < 0 or st.stx_nlink == 0:
        return False
    handle.handle_bytes = HANDLE_BYTES_MAX
    if h.name_to_handle_at(inode.fd, b"", <h.file_handle *>&handle, &mnt_id, h.AT_EMPTY_PATH) < 0:
        return False
    mount = mount_of(t, inode, &handle)
    if mount < 0:
        return False
    inode.mount = mount
    inode.handle_type = handle.handle_type
    inode.handle_bytes = handle.handle_bytes
    memcpy(inode.handle, handle.bytes, handle.handle_bytes)
    return True


cdef bint evict_one(tables_t *t, inode_t *inode) noexcept nogil:
    cdef uint64_t state = load_acquire_u64(&inode.state)
    cdef bint gone = False
    if (state & (BUSY | REFERENCES)) != 1 or inode.fd < 0:
        return False
    if inode.used:
        inode.used = 0
        return False
    if not cas_u64(&inode.state, state, state | BUSY):
        return False
    if can_reopen(t, inode):
        h.close(inode.fd)
        store_release_int(&inode.fd, -1)
        gone = True
    store_release_u64(&inode.state, state)
    return gone


cdef int evict(tables_t *t, int n) noexcept nogil:
    cdef int closed = 0, steps = EVICT_STEPS
    pthread_mutex_lock(&t.evict)
    while closed < n and steps:
        steps -= 1
        t.hand += 1
        if t.hand >= t.inodes_top:
            t.hand = FUSE_ROOT_ID + 1
        if t.hand < t.inodes_top:
            closed += evict_one(t, &t.inodes[t.hand])
    pthread_mutex_unlock(&t.evict)
    add_u64(&t.n_anchors, <uint64_t>-closed)
    add_u64(&t.evicted, closed)
    return closed


cdef bint out_of_descriptors(tables_t *t, int error) noexcept nogil:
    """Whether it is worth trying the system call that failed once more."""
    return (error == EMFILE or error == ENFILE) and evict(t, EVICT_BATCH) > 0


cdef int inode_fd(tables_t *t, uint32_t index) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    cdef int fd = load_acquire_int(&inode.fd), rc
    cdef vfsd_handle handle
    inode.used = 1
    if fd >= 0:
        return fd
    if load_acquire_u64(&t.n_anchors) >= t.anchors_max:
        evict(t, EVICT_BATCH)
    handle.handle_bytes = inode.handle_bytes
    handle.handle_type = inode.handle_type
    memcpy(handle.bytes, inode.handle, inode.handle_bytes)
    while fd < 0:
        fd = h.open_by_handle_at(t.mounts[inode.mount].fd, <h.file_handle *>&handle, h.O_PATH | h.O_CLOEXEC)
        if fd < 0:
            rc = errno
            if not out_of_descriptors(t, rc):
                return -rc
    if cas_int(&inode.fd, -1, fd):
        add_u64(&t.n_anchors, 1)
        return fd
    h.close(fd)  # another thread was faster
    return load_acquire_int(&inode.fd)
