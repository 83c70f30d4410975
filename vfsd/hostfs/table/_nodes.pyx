"""The inode table: slots, references, identities."""

from libc.errno cimport ESTALE
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from vfsd.sys._threads cimport pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock
from vfsd.fuse._wire cimport FUSE_ROOT_ID
from vfsd.sys cimport _syscalls as h
from vfsd.fuse.dispatch cimport FILE_SYSTEMS
from vfsd.hostfs.table._handles cimport unopened_drop
from vfsd.hostfs.table._notes cimport note_drop
from vfsd.hostfs.table._slots cimport (
    BUSY, BY_NAME, INODES_MAX, ORIGIN_ANY, REFERENCES, SHARDS, add_u64, cas_int, clear_bits_u64, generation_of, inode_t,
    load_acquire_int, load_acquire_u64, note_t, reference, set_bits_u64, store_release_int, store_release_u64, tables_t,
)

assert sizeof(inode_t) == 128

ATTR_MASK = h.STATX_BASIC_STATS | h.STATX_MNT_ID | h.STATX_MNT_ID_UNIQUE

cdef enum:
    DIRECTORY_LIVES = 4  # others come back by it, and the guest comes back to it
    THREADS_MAX = 4096   # that may make something at a time: of the queues and the pool


# --- references ---

cdef int64_t inode_get(tables_t *t, uint64_t nodeid) noexcept nogil:
    cdef uint32_t index = <uint32_t>nodeid
    if index == 0 or index >= INODES_MAX:
        return -ESTALE
    if not reference(&t.inodes[index].state, nodeid >> 32, 0, BUSY):
        return -ESTALE
    return index


cdef uint32_t inode_file_system(void *fs, uint64_t nodeid) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef uint32_t index = <uint32_t>nodeid & (INODES_MAX - 1)
    return <uint32_t>((t.inodes[index].dev * 0x9E3779B97F4A7C15u) >> 32) & (FILE_SYSTEMS - 1)


cdef void inode_put(tables_t *t, uint32_t index) noexcept nogil:
    if (add_u64(&t.inodes[index].state, <uint64_t>-1) & REFERENCES) == 0:
        inode_free(t, index)


cdef void inode_free(tables_t *t, uint32_t index) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    unhash(t, index)
    if t.zero_open:
        unopened_drop(t, (generation_of(inode.state) << 32) | index)
    if inode.fd >= 0:
        anchor_close(t, index)
    elif inode.note.how == BY_NAME:
        add_u64(&t.n_by_name, <uint64_t>-1)
    if inode.note.how:
        note_drop(t, &inode.note)
    slot_free(t, index)


cdef void slot_free(tables_t *t, uint32_t index) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    add_u64(&t.n_inodes, <uint64_t>-1)
    pthread_mutex_lock(&t.alloc)
    inode.next = t.inodes_free
    t.inodes_free = index
    store_release_u64(&inode.state, (generation_of(inode.state) + 1) << 32)
    pthread_mutex_unlock(&t.alloc)


cdef uint32_t slot_alloc(tables_t *t) noexcept nogil:
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
    if index:
        add_u64(&t.n_inodes, 1)
    return index


# --- anchors ---

cdef int anchor_set(tables_t *t, uint32_t index, int fd) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    if not cas_int(&inode.fd, -1, fd):
        h.close(fd)
        return load_acquire_int(&inode.fd)
    if inode.note.how == BY_NAME:
        add_u64(&t.n_by_name, <uint64_t>-1)
    add_u64(&t.n_anchors, 1)
    set_bits_u64(&t.anchored[index >> 6], <uint64_t>1 << (index & 63))
    return fd


cdef void anchor_close(tables_t *t, uint32_t index) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    cdef int fd = inode.fd
    clear_bits_u64(&t.anchored[index >> 6], <uint64_t>1 << (index & 63))
    add_u64(&t.n_anchors, <uint64_t>-1)
    store_release_int(&inode.fd, -1)
    h.close(fd)


# --- identity: (dev, ino, mnt_id) to slot ---

cdef inline pthread_mutex_t *shard_of(tables_t *t, uint32_t bucket) noexcept nogil:
    return &t.shard[bucket % SHARDS]


cdef pthread_mutex_t *lock_of(tables_t *t, const inode_t *inode) noexcept nogil:
    return shard_of(t, bucket_of(inode.dev, inode.ino, inode.mnt_id))


cdef void unhash(tables_t *t, uint32_t index) noexcept nogil:
    """Nothing when it is out of its bucket already."""
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
    cdef uint32_t index = t.buckets[bucket]
    cdef inode_t *inode
    while index:
        inode = &t.inodes[index]
        if (is_inode(inode, st)
                and reference(&inode.state, generation_of(load_acquire_u64(&inode.state)), 0, BUSY)):
            if inode.nlookup == 0:
                add_u64(&inode.state, 1)  # the lookups' own reference
            store_release_u64(&inode.nlookup, inode.nlookup + 1)
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


cdef uint64_t find_nodeid(tables_t *t, const h.statx_t *st) noexcept nogil:
    cdef uint32_t bucket = bucket_of(device_of(st), st.stx_ino, st.stx_mnt_id)
    cdef uint64_t nodeid = 0
    cdef uint32_t index
    if is_inode(&t.inodes[FUSE_ROOT_ID], st):
        return FUSE_ROOT_ID
    pthread_mutex_lock(shard_of(t, bucket))
    index = t.buckets[bucket]
    while index and not is_inode(&t.inodes[index], st):
        index = t.inodes[index].next
    if index:
        nodeid = (generation_of(load_acquire_u64(&t.inodes[index].state)) << 32) | index
    pthread_mutex_unlock(shard_of(t, bucket))
    return nodeid


cdef bint is_anchored(tables_t *t, uint64_t dev, uint64_t ino, uint64_t mnt_id) noexcept nogil:
    cdef uint32_t bucket = bucket_of(dev, ino, mnt_id)
    cdef uint32_t index
    cdef inode_t *inode
    cdef bint found = False
    pthread_mutex_lock(shard_of(t, bucket))
    index = t.buckets[bucket]
    while index and not found:
        inode = &t.inodes[index]
        found = inode.ino == ino and inode.dev == dev and inode.mnt_id == mnt_id
        found = found and load_acquire_int(&inode.fd) >= 0
        index = inode.next
    pthread_mutex_unlock(shard_of(t, bucket))
    return found


cdef bint room_for_inode(tables_t *t) noexcept nogil:
    return load_acquire_u64(&t.n_inodes) < INODES_MAX - THREADS_MAX


cdef uint32_t insert(tables_t *t, int fd, const h.statx_t *st, note_t *note) noexcept nogil:
    cdef uint32_t bucket = bucket_of(device_of(st), st.stx_ino, st.stx_mnt_id)
    cdef uint32_t index, mine = slot_alloc(t)
    cdef inode_t *inode
    if mine == 0:
        return 0
    inode = &t.inodes[mine]
    inode.dev = device_of(st)
    inode.ino = st.stx_ino
    inode.mnt_id = st.stx_mnt_id
    inode.mode = <uint16_t>(st.stx_mode & h.S_IFMT)
    inode.fd = fd
    inode.used = DIRECTORY_LIVES if inode.mode == h.S_IFDIR else 1
    inode.finds_new = inode.mapped = 0
    inode.origin = ORIGIN_ANY
    inode.kill = inode.cached = 0
    inode.nlookup = 1
    pthread_mutex_lock(shard_of(t, bucket))
    index = find_locked(t, bucket, st)
    if index == 0:
        if note != NULL:
            inode.note = note[0]
            note.how = 0
            add_u64(&t.n_by_name, 1)
        else:
            add_u64(&t.n_anchors, 1)
            set_bits_u64(&t.anchored[mine >> 6], <uint64_t>1 << (mine & 63))
        inode.next = t.buckets[bucket]
        t.buckets[bucket] = mine
        add_u64(&inode.state, 2)  # the lookups' and the caller's
    pthread_mutex_unlock(shard_of(t, bucket))
    if index == 0:
        return mine
    inode.fd = -1
    slot_free(t, mine)
    return index


# --- lookup counts ---

cdef void drop_lookups(tables_t *t, uint32_t index, uint64_t n) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    cdef pthread_mutex_t *lock = lock_of(t, inode)
    cdef bint last
    pthread_mutex_lock(lock)
    last = 0 < inode.nlookup <= n
    store_release_u64(&inode.nlookup, inode.nlookup - n if inode.nlookup > n else 0)
    pthread_mutex_unlock(lock)
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
