"""Notes of evicted inodes, and what they hold on to: a descriptor of each mount, long names."""

from libc.errno cimport EMFILE, ENFILE, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from vfsd.sys._threads cimport pthread_mutex_lock, pthread_mutex_unlock
from vfsd.fuse._wire cimport FUSE_ROOT_ID
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._handles cimport descriptor_put, descriptor_take
from vfsd.hostfs.table._kinds cimport handles_only_cached
from vfsd.hostfs.table._slots cimport (
    BY_NAME, HANDLE_BYTES_MAX, LONG_NAME, LONG_NAMES_MAX, MOUNTS_MAX, SHORT_NAME, inode_t, named_t, note_t,
    tables_t,
)

assert sizeof(named_t) == HANDLE_BYTES_MAX

# --- file handles ---

cdef int handle_of(int fd, vfsd_handle *handle) noexcept nogil:
    cdef int mount_id = 0
    handle.handle_bytes = HANDLE_BYTES_MAX
    if h.name_to_handle_at(fd, b"", <h.file_handle *>handle, &mount_id, h.AT_EMPTY_PATH) < 0:
        return -errno
    return 0


cdef bint handles_work(int fd) noexcept nogil:
    cdef vfsd_handle handle
    cdef h.statfs_t fs
    cdef int probe
    if h.fstatfs(fd, &fs) < 0 or handles_only_cached(fs.f_type) or handle_of(fd, &handle) < 0:
        return False
    probe = h.open_by_handle_at(fd, <h.file_handle *>&handle, h.O_PATH | h.O_CLOEXEC)
    if probe >= 0:
        h.close(probe)
    return probe >= 0


cdef void note_root(tables_t *t) noexcept nogil:
    """The share's own mount, while there are descriptors: later, evicting must not need one."""
    cdef inode_t *root = &t.inodes[FUSE_ROOT_ID]
    t.mounts[0].mnt_id = root.mnt_id
    t.mounts[0].users = 1  # its descriptor is the root's
    t.mounts[0].fd = root.fd if t.file_handles and handles_work(root.fd) else -1
    t.n_mounts = 1


cdef int mount_open(tables_t *t, const inode_t *inode) noexcept nogil:
    """A readable descriptor of a directory, if file handles work there; -1, or -EMFILE for not now."""
    cdef char name[h.FD_BYTES]
    cdef int flags = h.O_RDONLY | h.O_DIRECTORY | h.O_CLOEXEC | h.O_NONBLOCK
    cdef int fd = descriptor_take(t)
    if fd < 0:
        return -EMFILE
    fd = h.openat(t.proc_fd, h.fd_name(inode.fd, name), flags)
    if fd >= 0 and handles_work(fd):
        return fd
    descriptor_put(t)
    if fd < 0:
        return -EMFILE if errno == EMFILE or errno == ENFILE else -1
    h.close(fd)
    return -1


cdef int mount_take_locked(tables_t *t, const inode_t *inode) noexcept nogil:
    """Index of the inode's mount with one more user, or -1: file handles don't work there."""
    cdef uint32_t i, free = t.n_mounts
    cdef int fd
    for i in range(t.n_mounts):
        if t.mounts[i].mnt_id == inode.mnt_id:
            if t.mounts[i].fd < 0:
                return -1
            t.mounts[i].users += 1
            return i
        if t.mounts[i].mnt_id == 0 or (free == MOUNTS_MAX and t.mounts[i].users == 0):
            free = i
    # A directory stands for its mount: a file would be kept on disk when it is removed.
    if free == MOUNTS_MAX or inode.mode != h.S_IFDIR:
        return -1
    fd = mount_open(t, inode)
    if fd == -EMFILE:
        return -1
    t.mounts[free].mnt_id = inode.mnt_id
    t.mounts[free].fd = fd
    t.mounts[free].users = 1 if fd >= 0 else 0
    if free == t.n_mounts:
        t.n_mounts += 1
    return free if fd >= 0 else -1


cdef void mount_put(tables_t *t, uint32_t i) noexcept nogil:
    """The last user closes it: the host may want to unmount."""
    pthread_mutex_lock(&t.mount)
    t.mounts[i].users -= 1
    if t.mounts[i].users == 0:
        h.close(t.mounts[i].fd)
        descriptor_put(t)
        t.mounts[i].fd = -1
        t.mounts[i].mnt_id = 0
    pthread_mutex_unlock(&t.mount)


cdef bint note_handle(tables_t *t, const inode_t *inode, note_t *note) noexcept nogil:
    cdef vfsd_handle handle
    cdef int mount
    if not t.file_handles or handle_of(inode.fd, &handle) < 0:
        return False
    pthread_mutex_lock(&t.mount)
    mount = mount_take_locked(t, inode)
    pthread_mutex_unlock(&t.mount)
    if mount < 0:
        return False
    note.how = mount + 1
    note.handle_type = handle.handle_type
    note.handle_bytes = handle.handle_bytes
    memcpy(note.bytes, handle.bytes, handle.handle_bytes)
    return True


# --- names ---

cdef uint32_t long_name_take(tables_t *t) noexcept nogil:
    """A place for a long name, 0: there is none."""
    cdef uint32_t at
    pthread_mutex_lock(&t.alloc)
    at = t.long_names_free
    if at:
        t.long_names_free = t.long_names[at].next
    elif t.long_names_top < LONG_NAMES_MAX:
        at = t.long_names_top
        t.long_names_top += 1
    pthread_mutex_unlock(&t.alloc)
    return at


cdef bint note_name(tables_t *t, uint64_t parent, uint64_t born, const char *name, size_t n,
                    note_t *note) noexcept nogil:
    cdef named_t *named = <named_t *>note.bytes
    if n >= LONG_NAME:
        return False
    named.parent = parent
    named.born = born
    named.long_name = 0
    if n >= SHORT_NAME:
        named.long_name = long_name_take(t)
        if named.long_name == 0:
            return False
    note.how = BY_NAME
    memcpy(<char *>noted_name(t, note), name, n + 1)
    return True


cdef const char *noted_name(tables_t *t, const note_t *note) noexcept nogil:
    cdef const named_t *named = <const named_t *>note.bytes
    if named.long_name:
        return t.long_names[named.long_name].name
    return named.name


cdef void note_drop(tables_t *t, note_t *note) noexcept nogil:
    cdef named_t *named = <named_t *>note.bytes
    if note.how == BY_NAME:
        if named.long_name:
            pthread_mutex_lock(&t.alloc)
            t.long_names[named.long_name].next = t.long_names_free
            t.long_names_free = named.long_name
            pthread_mutex_unlock(&t.alloc)
    elif note.how:
        mount_put(t, note.how - 1)
    note.how = 0
