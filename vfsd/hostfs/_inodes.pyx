"""The inode table."""

from libc.errno cimport EBADF, EMFILE, ENFILE, ENOENT, ESTALE, errno

from libc.stdio cimport snprintf

from vfsd._wire cimport FUSE_ATTR_DAX, FUSE_ROOT_ID
from vfsd._threads cimport pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock
from vfsd.hostfs cimport _host as h
from vfsd.hostfs._anchors cimport EVICT_BATCH, evict, inode_fd, out_of_descriptors
from vfsd.hostfs._handles cimport unopened_drop
from vfsd.hostfs._idmap cimport id_to_guest
from vfsd.hostfs._slots cimport (
    BUSY, INODES_MAX, REFERENCES, SHARDS, add_u64, generation_of, inode_t, load_acquire_u64, reference,
    store_release_u64,
)

assert sizeof(inode_t) == 128

ATTR_MASK = h.STATX_BASIC_STATS | h.STATX_MNT_ID


# --- references ---

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
    if t.zero_open:
        unopened_drop(t, (generation_of(inode.state) << 32) | index)
    if inode.fd >= 0:
        h.close(inode.fd)
        inode.fd = -1
        add_u64(&t.n_anchors, <uint64_t>-1)
    add_u64(&t.n_inodes, <uint64_t>-1)
    pthread_mutex_lock(&t.alloc)
    inode.next = t.inodes_free
    t.inodes_free = index
    store_release_u64(&inode.state, (generation_of(inode.state) + 1) << 32)
    pthread_mutex_unlock(&t.alloc)


cdef uint32_t inode_alloc(tables_t *t) noexcept nogil:
    """A dead slot of the caller's own, 0 when the table is full."""
    cdef uint32_t index
    pthread_mutex_lock(&t.alloc)
    index = t.inodes_free
    if index:
        t.inodes_free = t.inodes[index].next
    elif t.inodes_top < INODES_MAX:
        index = t.inodes_top
        t.inodes_top += 1
    pthread_mutex_unlock(&t.alloc)
    return index


# --- identity: (dev, ino, mnt_id) to slot ---

cdef inline uint32_t bucket_of(uint64_t dev, uint64_t ino, uint64_t mnt_id) noexcept nogil:
    cdef uint64_t x = (ino ^ (dev << 17) ^ (mnt_id << 41)) * 0x9E3779B97F4A7C15ULL
    return <uint32_t>(x >> 46)


cdef inline pthread_mutex_t *shard_of(tables_t *t, uint32_t bucket) noexcept nogil:
    return &t.shard[bucket % SHARDS]


cdef void unhash(tables_t *t, uint32_t index) noexcept nogil:
    """Take the slot out of its bucket; nothing when it is out already."""
    cdef inode_t *inode = &t.inodes[index]
    cdef uint32_t bucket = bucket_of(inode.dev, inode.ino, inode.mnt_id)
    cdef uint32_t *link = &t.buckets[bucket]
    pthread_mutex_lock(shard_of(t, bucket))
    while link[0] and link[0] != index:
        link = &t.inodes[link[0]].next
    if link[0]:
        link[0] = inode.next
    pthread_mutex_unlock(shard_of(t, bucket))


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
    pthread_mutex_lock(shard_of(t, bucket))
    index = find_locked(t, bucket, st)
    pthread_mutex_unlock(shard_of(t, bucket))
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
    pthread_mutex_lock(shard_of(t, bucket))
    index = find_locked(t, bucket, st)
    if index == 0:
        inode.next = t.buckets[bucket]
        t.buckets[bucket] = mine
        add_u64(&inode.state, 2)  # the lookups' and the caller's
    pthread_mutex_unlock(shard_of(t, bucket))
    if index == 0:
        return mine
    inode_free(t, mine)
    return index


# --- lookup, forget, attributes ---

cdef int open_anchor(tables_t *t, int parent, const char *name, int flags, h.statx_t *st) noexcept nogil:
    """A new O_PATH descriptor of a name and its attributes, or -errno. flags: O_NOFOLLOW or 0."""
    cdef int fd = -1, rc
    if load_acquire_u64(&t.n_anchors) >= t.anchors_max:
        evict(t, EVICT_BATCH)
    while fd < 0:
        fd = h.openat(parent, name, h.O_PATH | flags | h.O_CLOEXEC)
        if fd < 0:
            rc = errno
            if not out_of_descriptors(t, rc):
                return -ENFILE if rc == EMFILE else -rc
    if h.statx(fd, b"", h.AT_EMPTY_PATH, ATTR_MASK, st) < 0:
        rc = -errno
        h.close(fd)
        return rc
    return fd


cdef int find_known(tables_t *t, const h.statx_t *st, uint32_t *index) noexcept nogil:
    """A known inode, referenced and with one more lookup: 0, -ENOENT, or -errno.

    Its anchor keeps (dev, ino) from being reused; an evicted one proves itself by its file handle.
    """
    cdef int fd
    index[0] = find(t, st)
    if index[0] == 0:
        return -ENOENT
    fd = inode_fd(t, index[0])
    if fd >= 0:
        return 0
    if fd == -ESTALE:
        unhash(t, index[0])
        fd = -ENOENT
    drop_lookups(t, index[0], 1)
    inode_put(t, index[0])
    return fd


cdef int lookup_at(tables_t *t, int parent, const char *name, bint fresh, h.statx_t *st, uint32_t *index) noexcept nogil:
    """The slot of a name, referenced and with one more lookup. 0 or -errno."""
    cdef int fd, rc
    if not fresh:
        if h.statx(parent, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, ATTR_MASK, st) < 0:
            return -errno
        rc = find_known(t, st, index)
        if rc != -ENOENT:
            return rc
    fd = open_anchor(t, parent, name, h.O_NOFOLLOW, st)
    if fd < 0:
        return fd
    index[0] = insert(t, fd, st)
    return 0 if index[0] else -ENFILE


cdef void entry_fill(tables_t *t, uint32_t index, const h.statx_t *st, fuse_entry_out *out) noexcept nogil:
    out.nodeid = (generation_of(load_acquire_u64(&t.inodes[index].state)) << 32) | index
    out.generation = 0
    out.entry_valid = t.entry_valid
    out.entry_valid_nsec = t.entry_valid_nsec
    out.attr_valid = t.attr_valid
    out.attr_valid_nsec = t.attr_valid_nsec
    attr_fill(t, st, &out.attr)
    if maybe_dax(t, st) and is_dax(t, inode_fd(t, index), st):
        out.attr.flags |= FUSE_ATTR_DAX


cdef int entry_of_open(tables_t *t, const char *fd_name, fuse_entry_out *out) noexcept nogil:
    cdef h.statx_t st
    cdef uint32_t index
    cdef int fd = open_anchor(t, t.proc_fd, fd_name, 0, &st)
    if fd < 0:
        return fd
    index = insert(t, fd, &st)
    if index == 0:
        return -ENFILE
    entry_fill(t, index, &st, out)
    inode_put(t, index)
    return 0


cdef int entry_at(tables_t *t, int parent, const char *name, bint fresh, fuse_entry_out *out) noexcept nogil:
    cdef h.statx_t st
    cdef uint32_t index = 0
    cdef int rc = lookup_at(t, parent, name, fresh, &st, &index)
    if rc < 0:
        return rc
    entry_fill(t, index, &st, out)
    rc = t.inodes[index].nlookup == 1
    inode_put(t, index)
    return rc


cdef int lookup(tables_t *t, uint64_t parent, const char *name, fuse_entry_out *out) noexcept nogil:
    cdef int64_t index = inode_get(t, parent)
    cdef int rc
    if index < 0:
        return <int>index
    rc = inode_fd(t, index)
    if rc >= 0:
        rc = entry_at(t, rc, name, t.inodes[index].cold, out)
    if rc >= 0:
        t.inodes[index].cold = rc
        rc = 0
    inode_put(t, index)
    return rc


cdef void drop_lookups(tables_t *t, uint32_t index, uint64_t n) noexcept nogil:
    """Take n lookups from a referenced inode; their own reference goes with the last."""
    cdef inode_t *inode = &t.inodes[index]
    cdef pthread_mutex_t *lock = shard_of(t, bucket_of(inode.dev, inode.ino, inode.mnt_id))
    cdef bint last
    pthread_mutex_lock(lock)
    last = 0 < inode.nlookup <= n
    inode.nlookup = inode.nlookup - n if inode.nlookup > n else 0
    pthread_mutex_unlock(lock)
    if last:
        inode_put(t, index)


cdef uint32_t inode_hold(tables_t *t, int parent, const char *name) noexcept nogil:
    cdef h.statx_t st
    cdef uint32_t index = 0
    if (h.statx(parent, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, ATTR_MASK, &st) < 0
            or find_known(t, &st, &index) < 0):
        return 0
    drop_lookups(t, index, 1)
    return index


cdef void inode_forget(tables_t *t, uint64_t nodeid, uint64_t n) noexcept nogil:
    cdef int64_t index
    if nodeid == FUSE_ROOT_ID:
        return
    index = inode_get(t, nodeid)
    if index < 0:
        return
    drop_lookups(t, index, n)
    inode_put(t, index)


cdef void attr_fill(const tables_t *t, const h.statx_t *st, fuse_attr *attr) noexcept nogil:
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
    attr.uid = id_to_guest(&t.uid_to_guest, st.stx_uid)
    attr.gid = id_to_guest(&t.gid_to_guest, st.stx_gid)
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
    attr_fill(t, &st, &out.attr)
    if maybe_dax(t, &st) and is_dax(t, fd, &st):
        out.attr.flags |= FUSE_ATTR_DAX
    return 0


cdef inline bint maybe_dax(tables_t *t, const h.statx_t *st) noexcept nogil:
    return (t.dax_size_min <= st.stx_size or t.dax_marked) and st.stx_mode & h.S_IFMT == h.S_IFREG


cdef bint is_dax(tables_t *t, int fd, const h.statx_t *st) noexcept nogil:
    """Whether a guest that leaves it to us maps that regular file."""
    cdef h.fsxattr marks
    cdef char name[16]
    cdef int opened, rc
    if t.dax_size_min <= st.stx_size:
        return True
    rc = h.ioctl(fd, h.FS_IOC_FSGETXATTR, &marks)
    if rc < 0 and errno == EBADF and fd >= 0:  # an anchor
        snprintf(name, sizeof(name), b"%d", fd)
        opened = h.openat(t.proc_fd, name, h.O_RDONLY | h.O_CLOEXEC | h.O_NONBLOCK)
        if opened < 0:
            return False
        rc = h.ioctl(opened, h.FS_IOC_FSGETXATTR, &marks)
        h.close(opened)
    return rc == 0 and marks.fsx_xflags & h.FS_XFLAG_DAX
