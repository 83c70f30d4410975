"""Inode and handle tables (docs/architecture.md, "Inodes and handles")."""

cimport cython
from libc.errno cimport EBADF, EMFILE, ENFILE, ESTALE, errno
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset

from vfsd._wire cimport FUSE_ROOT_ID
from vfsd.hostfs cimport _host as h

import os

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    int cas_int(int *p, int expected, int desired)
    uint64_t load_acquire_u64(const uint64_t *p)
    void store_release_u64(uint64_t *p, uint64_t v)
    int cas_u64(uint64_t *p, uint64_t expected, uint64_t desired)
    uint64_t add_u64(uint64_t *p, uint64_t v)

cdef extern from *:
    """
    /* struct file_handle with room for the bytes */
    struct vfsd_handle { unsigned int handle_bytes; int handle_type; unsigned char bytes[64]; };
    #define VFSD_SLOT_FLAG (UINT64_C(1) << 31)
    """
    uint64_t BUSY "VFSD_SLOT_FLAG"                # the evictor has the slot for itself
    uint64_t OPEN "VFSD_SLOT_FLAG"                # a handle the guest has not released
    uint64_t REFERENCES "(VFSD_SLOT_FLAG - 1)"
    struct vfsd_handle:
        unsigned int handle_bytes
        int handle_type
        unsigned char bytes[HANDLE_BYTES_MAX]

assert sizeof(inode_t) == 128
assert sizeof(handle_t) == 16

cdef enum:
    EVICT_STEPS = 4096          # slots the evictor's hand passes in one call
    EVICT_BATCH = 16

cdef unsigned int ATTR_MASK = h.STATX_BASIC_STATS | h.STATX_MNT_ID


# --- references ---

cdef inline uint64_t generation_of(uint64_t state) noexcept nogil:
    return state >> 32


cdef bint reference(uint64_t *state, uint64_t generation, uint64_t wanted, uint64_t busy) noexcept nogil:
    """Take a reference if the slot is alive, of that generation and has the `wanted` bits."""
    cdef uint64_t seen
    while True:
        seen = load_acquire_u64(state)
        if generation_of(seen) != generation or (seen & REFERENCES) == 0 or (seen & wanted) != wanted:
            return False
        if seen & busy:
            h.sched_yield()
        elif cas_u64(state, seen, seen + 1):
            return True


cdef int64_t inode_get(tables_t *t, uint64_t nodeid) noexcept nogil:
    cdef uint32_t index = <uint32_t>nodeid
    if index == 0 or index >= INODES_MAX:
        return -ESTALE
    if not reference(&t.inodes[index].state, nodeid >> 32, 0, BUSY):
        return -ESTALE
    return index


cdef void inode_put(tables_t *t, uint32_t index) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    if (add_u64(&inode.state, <uint64_t>-1) & REFERENCES) == 0:
        inode_free(t, index)


cdef void inode_free(tables_t *t, uint32_t index) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    unhash(t, index)
    if inode.fd >= 0:
        h.close(inode.fd)
        inode.fd = -1
        add_u64(&t.n_anchors, <uint64_t>-1)
    add_u64(&t.n_inodes, <uint64_t>-1)
    h.pthread_mutex_lock(&t.alloc)
    inode.next = t.inodes_free
    t.inodes_free = index
    store_release_u64(&inode.state, (generation_of(inode.state) + 1) << 32)
    h.pthread_mutex_unlock(&t.alloc)


cdef uint32_t inode_alloc(tables_t *t) noexcept nogil:
    """A dead slot of the caller's own, 0 when the table is full."""
    cdef uint32_t index
    h.pthread_mutex_lock(&t.alloc)
    index = t.inodes_free
    if index:
        t.inodes_free = t.inodes[index].next
    elif t.inodes_top < INODES_MAX:
        index = t.inodes_top
        t.inodes_top += 1
    h.pthread_mutex_unlock(&t.alloc)
    return index


# --- identity: (dev, ino, mnt_id) to slot ---

cdef inline uint64_t device_of(const h.statx_t *st) noexcept nogil:
    return (<uint64_t>st.stx_dev_major << 32) | st.stx_dev_minor


cdef inline uint32_t bucket_of(uint64_t dev, uint64_t ino, uint64_t mnt_id) noexcept nogil:
    cdef uint64_t x = (ino ^ (dev << 17) ^ (mnt_id << 41)) * 0x9E3779B97F4A7C15ULL
    return <uint32_t>(x >> 46)


cdef inline h.pthread_mutex_t *shard_of(tables_t *t, uint32_t bucket) noexcept nogil:
    return &t.shard[bucket % SHARDS]


cdef void unhash(tables_t *t, uint32_t index) noexcept nogil:
    """Take the slot out of its bucket; nothing when it is out already."""
    cdef inode_t *inode = &t.inodes[index]
    cdef uint32_t bucket = bucket_of(inode.dev, inode.ino, inode.mnt_id)
    cdef uint32_t *link = &t.buckets[bucket]
    h.pthread_mutex_lock(shard_of(t, bucket))
    while link[0] and link[0] != index:
        link = &t.inodes[link[0]].next
    if link[0]:
        link[0] = inode.next
    h.pthread_mutex_unlock(shard_of(t, bucket))


cdef uint32_t find_locked(tables_t *t, uint32_t bucket, const h.statx_t *st) noexcept nogil:
    """The slot of that identity, referenced and with one more lookup; 0 when there is none."""
    cdef uint32_t index = t.buckets[bucket]
    cdef uint64_t dev = device_of(st)
    cdef inode_t *inode
    while index:
        inode = &t.inodes[index]
        if (inode.ino == st.stx_ino and inode.dev == dev and inode.mnt_id == st.stx_mnt_id
                and reference(&inode.state, generation_of(load_acquire_u64(&inode.state)), 0, BUSY)):
            if inode.nlookup == 0:
                add_u64(&inode.state, 1)  # the lookups' own reference
            inode.nlookup += 1
            return index
        index = inode.next
    return 0


cdef uint32_t find(tables_t *t, const h.statx_t *st) noexcept nogil:
    cdef uint32_t bucket = bucket_of(device_of(st), st.stx_ino, st.stx_mnt_id)
    cdef uint32_t index
    h.pthread_mutex_lock(shard_of(t, bucket))
    index = find_locked(t, bucket, st)
    h.pthread_mutex_unlock(shard_of(t, bucket))
    return index


cdef uint32_t insert(tables_t *t, int fd, const h.statx_t *st) noexcept nogil:
    """Own fd as the anchor of that identity, or close it when another thread was faster.

    Referenced, with one more lookup. 0: the table is full, fd closed.
    """
    cdef uint32_t bucket = bucket_of(device_of(st), st.stx_ino, st.stx_mnt_id)
    cdef uint32_t index, mine = inode_alloc(t)
    cdef inode_t *inode
    if mine == 0:
        h.close(fd)
        return 0
    inode = &t.inodes[mine]
    inode.dev = device_of(st)
    inode.ino = st.stx_ino
    inode.mnt_id = st.stx_mnt_id
    inode.mode = st.stx_mode & h.S_IFMT
    inode.fd = fd
    inode.used = 1
    inode.nlookup = 1
    add_u64(&t.n_inodes, 1)
    add_u64(&t.n_anchors, 1)
    h.pthread_mutex_lock(shard_of(t, bucket))
    index = find_locked(t, bucket, st)
    if index == 0:
        inode.next = t.buckets[bucket]
        t.buckets[bucket] = mine
        add_u64(&inode.state, 2)  # the lookups' and the caller's
    h.pthread_mutex_unlock(shard_of(t, bucket))
    if index == 0:
        return mine
    inode_free(t, mine)
    return index


# --- anchors: descriptors within a budget ---

cdef int mount_of(tables_t *t, inode_t *inode, vfsd_handle *handle) noexcept nogil:
    """Index of the mount the inode's file handle can be opened in, or -1. Under t.evict."""
    cdef uint32_t i
    cdef int fd, probe
    cdef char path[32]
    for i in range(t.n_mounts):
        if t.mounts[i].mnt_id == inode.mnt_id:
            return i if t.mounts[i].fd >= 0 else -1
    # Only what can be opened without side effects may stand for its mount.
    if t.n_mounts == MOUNTS_MAX or (inode.mode != h.S_IFDIR and inode.mode != h.S_IFREG):
        return -1
    snprintf(path, sizeof(path), b"/proc/self/fd/%d", inode.fd)
    fd = h.openat(-1, path, h.O_RDONLY | h.O_CLOEXEC)
    if fd >= 0:
        probe = h.open_by_handle_at(fd, <h.file_handle *>handle, h.O_PATH | h.O_CLOEXEC)
        if probe >= 0:
            h.close(probe)
        else:
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
    h.pthread_mutex_lock(&t.evict)
    while closed < n and steps:
        steps -= 1
        t.hand += 1
        if t.hand >= t.inodes_top:
            t.hand = FUSE_ROOT_ID + 1
        if t.hand < t.inodes_top:
            closed += evict_one(t, &t.inodes[t.hand])
    h.pthread_mutex_unlock(&t.evict)
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


# --- lookup, forget, attributes ---

cdef int open_anchor(tables_t *t, int parent, const char *name, h.statx_t *st) noexcept nogil:
    """A new O_PATH descriptor of a name and its attributes, or -errno."""
    cdef int fd = -1, rc
    if load_acquire_u64(&t.n_anchors) >= t.anchors_max:
        evict(t, EVICT_BATCH)
    while fd < 0:
        fd = h.openat(parent, name, h.O_PATH | h.O_NOFOLLOW | h.O_CLOEXEC)
        if fd < 0:
            rc = errno
            if not out_of_descriptors(t, rc):
                return -ENFILE if rc == EMFILE else -rc
    if h.statx(fd, b"", h.AT_EMPTY_PATH, ATTR_MASK, st) < 0:
        rc = -errno
        h.close(fd)
        return rc
    return fd


cdef int lookup_at(tables_t *t, int parent, const char *name, h.statx_t *st, uint32_t *index) noexcept nogil:
    """The slot of a name, referenced and with one more lookup. 0 or -errno.

    A known inode costs the one statx: its anchor keeps (dev, ino) from being reused. An evicted
    one proves itself by its file handle first.
    """
    cdef int fd
    if h.statx(parent, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, ATTR_MASK, st) < 0:
        return -errno
    index[0] = find(t, st)
    if index[0]:
        fd = inode_fd(t, index[0])
        if fd >= 0:
            return 0
        if fd == -ESTALE:
            unhash(t, index[0])
        drop_lookups(t, index[0], 1)
        inode_put(t, index[0])
        if fd != -ESTALE:
            return fd
    fd = open_anchor(t, parent, name, st)
    if fd < 0:
        return fd
    index[0] = insert(t, fd, st)
    return 0 if index[0] else -ENFILE


cdef int lookup(tables_t *t, uint64_t parent, const char *name, fuse_entry_out *out) noexcept nogil:
    cdef h.statx_t st
    cdef uint32_t index = 0
    cdef int64_t dir_index = inode_get(t, parent)
    cdef int rc
    if dir_index < 0:
        return <int>dir_index
    rc = inode_fd(t, dir_index)
    if rc >= 0:
        rc = lookup_at(t, rc, name, &st, &index)
    inode_put(t, dir_index)
    if rc < 0:
        return rc
    out.nodeid = (generation_of(load_acquire_u64(&t.inodes[index].state)) << 32) | index
    out.generation = 0
    out.entry_valid = t.entry_valid
    out.entry_valid_nsec = t.entry_valid_nsec
    out.attr_valid = t.attr_valid
    out.attr_valid_nsec = t.attr_valid_nsec
    attr_fill(&st, &out.attr)
    inode_put(t, index)
    return 0


cdef void drop_lookups(tables_t *t, uint32_t index, uint64_t n) noexcept nogil:
    """Take n lookups from a referenced inode; their own reference goes with the last."""
    cdef inode_t *inode = &t.inodes[index]
    cdef h.pthread_mutex_t *lock = shard_of(t, bucket_of(inode.dev, inode.ino, inode.mnt_id))
    cdef bint last
    h.pthread_mutex_lock(lock)
    last = 0 < inode.nlookup <= n
    inode.nlookup = inode.nlookup - n if inode.nlookup > n else 0
    h.pthread_mutex_unlock(lock)
    if last:
        inode_put(t, index)


cdef void inode_forget(tables_t *t, uint64_t nodeid, uint64_t n) noexcept nogil:
    cdef int64_t index
    if nodeid == FUSE_ROOT_ID:
        return
    index = inode_get(t, nodeid)
    if index < 0:
        return
    drop_lookups(t, index, n)
    inode_put(t, index)


cdef void attr_fill(const h.statx_t *st, fuse_attr *attr) noexcept nogil:
    attr.ino = st.stx_ino
    attr.size = st.stx_size
    attr.blocks = st.stx_blocks
    attr.atime = st.stx_atime.tv_sec
    attr.mtime = st.stx_mtime.tv_sec
    attr.ctime = st.stx_ctime.tv_sec
    attr.atimensec = st.stx_atime.tv_nsec
    attr.mtimensec = st.stx_mtime.tv_nsec
    attr.ctimensec = st.stx_ctime.tv_nsec
    attr.mode = st.stx_mode
    attr.nlink = st.stx_nlink
    attr.uid = st.stx_uid
    attr.gid = st.stx_gid
    # new_encode_dev() of linux/kdev_t.h
    attr.rdev = ((st.stx_rdev_minor & 0xff) | (st.stx_rdev_major << 8)
                 | ((st.stx_rdev_minor & ~<uint32_t>0xff) << 12))
    attr.blksize = st.stx_blksize
    attr.flags = 0


cdef int attr_of(tables_t *t, int fd, fuse_attr_out *out) noexcept nogil:
    cdef h.statx_t st
    if h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_BASIC_STATS, &st) < 0:
        return -errno
    out.attr_valid = t.attr_valid
    out.attr_valid_nsec = t.attr_valid_nsec
    out.dummy = 0
    attr_fill(&st, &out.attr)
    return 0


# --- handles ---

cdef int64_t handle_get(tables_t *t, uint64_t fh, int *fd) noexcept nogil:
    cdef uint32_t index = <uint32_t>fh
    if index == 0 or index >= HANDLES_MAX or not reference(&t.handles[index].state, fh >> 32, OPEN, 0):
        return -EBADF
    fd[0] = t.handles[index].fd
    return index


cdef void handle_put(tables_t *t, uint32_t index) noexcept nogil:
    cdef handle_t *handle = &t.handles[index]
    if (add_u64(&handle.state, <uint64_t>-1) & REFERENCES) != 0:
        return
    h.close(handle.fd)
    add_u64(&t.n_handles, <uint64_t>-1)
    h.pthread_mutex_lock(&t.alloc)
    handle.next = t.handles_free
    t.handles_free = index
    store_release_u64(&handle.state, (generation_of(handle.state) + 1) << 32)
    h.pthread_mutex_unlock(&t.alloc)


cdef int handle_open(tables_t *t, int fd, uint64_t *fh) noexcept nogil:
    cdef uint32_t index
    cdef handle_t *handle
    h.pthread_mutex_lock(&t.alloc)
    index = t.handles_free
    if index:
        t.handles_free = t.handles[index].next
    elif t.handles_top < HANDLES_MAX:
        index = t.handles_top
        t.handles_top += 1
    h.pthread_mutex_unlock(&t.alloc)
    if index == 0:
        return -ENFILE
    handle = &t.handles[index]
    handle.fd = fd
    add_u64(&t.n_handles, 1)
    fh[0] = (generation_of(handle.state) << 32) | index
    store_release_u64(&handle.state, handle.state | OPEN | 1)
    return 0


cdef int handle_release(tables_t *t, uint64_t fh) noexcept nogil:
    cdef uint32_t index = <uint32_t>fh
    cdef uint64_t seen
    if index == 0 or index >= HANDLES_MAX:
        return -EBADF
    while True:
        seen = load_acquire_u64(&t.handles[index].state)
        if generation_of(seen) != fh >> 32 or not seen & OPEN:
            return -EBADF
        if cas_u64(&t.handles[index].state, seen, seen & ~OPEN):
            handle_put(t, index)
            return 0


# --- Python's side ---

cdef void *reserve(size_t size) except NULL:
    """Zeroed address space; memory is taken page by page as it is touched."""
    cdef void *at = h.mmap(NULL, size, h.PROT_READ | h.PROT_WRITE,
                           h.MAP_PRIVATE | h.MAP_ANONYMOUS | h.MAP_NORESERVE, -1, 0)
    if at == h.MAP_FAILED:
        raise OSError(errno, os.strerror(errno))
    return at


cdef object failed(int rc):
    return OSError(-rc, os.strerror(-rc))


@cython.final
cdef class Pin:
    """A descriptor that stays open, and its inode's type, while the `with` block runs."""

    cdef Tables owner
    cdef int64_t index
    cdef bint of_handle
    cdef readonly int fd
    cdef readonly uint32_t type  # S_IFMT bits; 0 for a handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.drop()

    def __dealloc__(self):
        self.drop()

    cdef void drop(self) noexcept:
        if self.index == 0:
            return
        if self.of_handle:
            handle_put(&self.owner.t, self.index)
        else:
            inode_put(&self.owner.t, self.index)
        self.index = 0


@cython.final
cdef class Tables:
    """The inodes and handles of one guest, below the directory `root_fd`.

    root_fd: readable descriptor of the shared directory; kept open by the tables as their own.
    anchors_max: O_PATH descriptors to hold at most, as far as file handles allow.
    OSError when the directory can't be read or address space runs out.
    """

    def __cinit__(self, int root_fd, uint64_t anchors_max):
        cdef tables_t *t = &self.t
        cdef int i
        for i in range(SHARDS):
            h.pthread_mutex_init(&t.shard[i], NULL)
        h.pthread_mutex_init(&t.alloc, NULL)
        h.pthread_mutex_init(&t.evict, NULL)
        t.inodes_top = FUSE_ROOT_ID + 1
        t.handles_top = 1
        t.hand = FUSE_ROOT_ID
        t.anchors_max = anchors_max
        t.inodes = <inode_t *>reserve(INODES_MAX * sizeof(inode_t))
        t.handles = <handle_t *>reserve(HANDLES_MAX * sizeof(handle_t))
        t.buckets = <uint32_t *>reserve(BUCKETS * sizeof(uint32_t))
        self.set_root(root_fd)

    cdef int set_root(self, int root_fd) except -1:
        cdef inode_t *root = &self.t.inodes[FUSE_ROOT_ID]
        cdef h.statx_t st
        if h.statx(root_fd, b"", h.AT_EMPTY_PATH, ATTR_MASK, &st) < 0:
            raise OSError(errno, os.strerror(errno))
        root.fd = h.c_dup(root_fd)
        if root.fd < 0:
            raise OSError(errno, os.strerror(errno))
        os.set_inheritable(root.fd, False)
        root.dev = device_of(&st)
        root.ino = st.stx_ino
        root.mnt_id = st.stx_mnt_id
        root.mode = st.stx_mode & h.S_IFMT
        root.nlookup = 1
        root.state = 1
        return 0

    def __dealloc__(self):
        cdef tables_t *t = &self.t
        cdef uint32_t i
        if t.inodes != NULL and t.handles != NULL and t.buckets != NULL:
            self.clear()
            if t.inodes[FUSE_ROOT_ID].state:
                h.close(t.inodes[FUSE_ROOT_ID].fd)
        for i in range(t.n_mounts):
            if t.mounts[i].fd >= 0:
                h.close(t.mounts[i].fd)
        if t.inodes != NULL:
            h.munmap(t.inodes, INODES_MAX * sizeof(inode_t))
        if t.handles != NULL:
            h.munmap(t.handles, HANDLES_MAX * sizeof(handle_t))
        if t.buckets != NULL:
            h.munmap(t.buckets, BUCKETS * sizeof(uint32_t))

    def set_timeouts(self, double entry_s, double attr_s):
        """How long the guest may keep names and attributes, in seconds."""
        self.t.entry_valid = <uint64_t>entry_s
        self.t.entry_valid_nsec = <uint32_t>((entry_s - <uint64_t>entry_s) * 1e9)
        self.t.attr_valid = <uint64_t>attr_s
        self.t.attr_valid_nsec = <uint32_t>((attr_s - <uint64_t>attr_s) * 1e9)

    def clear(self):
        """Forget every inode but the root and release every handle (DESTROY, reset)."""
        cdef tables_t *t = &self.t
        cdef uint32_t index
        cdef uint64_t state
        with nogil:
            for index in range(1, t.handles_top):
                state = load_acquire_u64(&t.handles[index].state)
                if state & OPEN:
                    handle_release(t, (generation_of(state) << 32) | index)
            for index in range(FUSE_ROOT_ID + 1, t.inodes_top):
                state = load_acquire_u64(&t.inodes[index].state)
                if state & REFERENCES:
                    inode_forget(t, (generation_of(state) << 32) | index, <uint64_t>-1)

    def lookup(self, uint64_t parent, bytes name):
        """fuse_entry_out of a checked name, its lookup counted. OSError."""
        cdef fuse_entry_out out
        cdef const char *text = name
        cdef int rc
        memset(&out, 0, sizeof(out))
        with nogil:
            rc = lookup(&self.t, parent, text, &out)
        if rc < 0:
            raise failed(rc)
        return (<char *>&out)[:sizeof(out)]

    def forget(self, uint64_t nodeid, uint64_t n):
        """Take n from the lookup count."""
        inode_forget(&self.t, nodeid, n)

    def attr(self, int fd):
        """fuse_attr_out of a descriptor. OSError."""
        cdef fuse_attr_out out
        cdef int rc
        with nogil:
            rc = attr_of(&self.t, fd, &out)
        if rc < 0:
            raise failed(rc)
        return (<char *>&out)[:sizeof(out)]

    def pin(self, uint64_t nodeid):
        """The inode's O_PATH descriptor. OSError: ESTALE when the guest does not know that nodeid."""
        cdef Pin pin = Pin.__new__(Pin)
        cdef int64_t index
        with nogil:
            index = inode_get(&self.t, nodeid)
            if index >= 0:
                pin.fd = inode_fd(&self.t, index)
        if index < 0:
            raise failed(<int>index)
        pin.owner = self
        pin.index = index
        pin.type = self.t.inodes[index].mode
        if pin.fd < 0:
            raise failed(pin.fd)
        return pin

    def handle(self, uint64_t fh):
        """An open handle's descriptor. OSError: EBADF when the guest has no such handle."""
        cdef Pin pin = Pin.__new__(Pin)
        cdef int fd = -1
        cdef int64_t index = handle_get(&self.t, fh, &fd)
        if index < 0:
            raise failed(<int>index)
        pin.owner = self
        pin.index = index
        pin.of_handle = True
        pin.fd = fd
        return pin

    def open(self, int fd):
        """Own fd as a new handle: its fh. OSError ENFILE: fd has been closed."""
        cdef uint64_t fh = 0
        cdef int rc = handle_open(&self.t, fd, &fh)
        if rc < 0:
            h.close(fd)
            raise failed(rc)
        return fh

    def release(self, uint64_t fh):
        """Give a handle up; its descriptor goes when nobody works with it any more. OSError EBADF."""
        cdef int rc
        with nogil:
            rc = handle_release(&self.t, fh)
        if rc < 0:
            raise failed(rc)

    def make_room(self):
        """Close a few anchors that nobody uses, for a caller out of descriptors: whether any went."""
        cdef int closed
        with nogil:
            closed = evict(&self.t, EVICT_BATCH)
        return closed > 0

    def counts(self):
        """Now: inodes, handles, anchors (O_PATH descriptors held); since the start: evicted."""
        return {
            "inodes": load_acquire_u64(&self.t.n_inodes),
            "handles": load_acquire_u64(&self.t.n_handles),
            "anchors": load_acquire_u64(&self.t.n_anchors),
            "evicted": load_acquire_u64(&self.t.evicted),
        }
