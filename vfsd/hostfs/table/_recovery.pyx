"""Making the tables whole again (see the .pxd)."""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vfsd.fuse._wire cimport FUSE_ROOT_ID
from vfsd.hostfs.table._nodes cimport bucket_of
from vfsd.hostfs.table._slots cimport (
    ALIVE_MAX, BUCKETS, BUSY, BY_NAME, HANDLES_MAX, HELD_POSIX, INODES_MAX, LISTINGS, LONG_NAMES_MAX, OPEN, REFERENCES, SEEN_NAMES,
    TOLD_MAX, UNOPENED_MAX, WRITABLE, generation_of, handle_t, inode_t, listing_t, named_t,
)
from vfsd.state._memory cimport make_empty
from vfsd.sys cimport _syscalls as h

__all__ = ()


cdef inline uint64_t next_generation(uint64_t state) noexcept nogil:
    """Of a slot that nobody has: whoever had it must not be mistaken for its next user."""
    return (generation_of(state) + 1) << 32


cdef void drop_unanswered(tables_t *t, uint64_t fh, uint64_t nodeid) noexcept nogil:
    cdef uint32_t index = <uint32_t>nodeid
    if (FUSE_ROOT_ID < index < t.inodes_top and generation_of(t.inodes[index].state) == nodeid >> 32
            and t.inodes[index].nlookup > 0):
        t.inodes[index].nlookup -= 1
    index = <uint32_t>fh
    if 0 < index < t.handles_top and generation_of(t.handles[index].state) == fh >> 32:
        t.handles[index].state &= ~OPEN


cdef void recover_inode(tables_t *t, uint32_t index) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    cdef uint32_t bucket
    if (inode.state & REFERENCES) == 0 or inode.nlookup == 0:
        inode.state = next_generation(inode.state)
        inode.nlookup = 0
        inode.fd = -1
        inode.note.how = 0
        inode.next = t.inodes_free
        t.inodes_free = index
        return
    # What was being noted is noted anew when it is to be evicted.
    if inode.state & BUSY and inode.fd >= 0:
        inode.note.how = 0
    inode.state = (generation_of(inode.state) << 32) | 1
    bucket = bucket_of(inode.dev, inode.ino, inode.mnt_id)
    inode.next = t.buckets[bucket]
    t.buckets[bucket] = index
    t.n_inodes += 1
    if inode.fd >= 0:
        t.n_anchors += 1
        t.anchored[index >> 6] |= <uint64_t>1 << (index & 63)
    elif inode.note.how == BY_NAME:
        t.n_by_name += 1


cdef void recover_handle(tables_t *t, uint32_t index) noexcept nogil:
    cdef handle_t *handle = &t.handles[index]
    if (handle.state & REFERENCES) == 0 or not handle.state & OPEN:
        handle.state = next_generation(handle.state)
        handle.inode = t.handles_free
        t.handles_free = index
        return
    handle.state = (generation_of(handle.state) << 32) | OPEN | (handle.state & WRITABLE) | 1
    t.n_handles += 1
    t.n_descriptors += 1 + (handle.other_fd >= 0)
    t.dirtiers[handle.inode] += handle.dirties


cdef void recover_mounts(tables_t *t) noexcept nogil:
    """Their users are the notes that were made by handle."""
    cdef uint32_t i, index
    for i in range(t.n_mounts):
        t.mounts[i].users = 1 if i == 0 else 0
    for index in range(<uint32_t>FUSE_ROOT_ID + 1, t.inodes_top):
        i = t.inodes[index].note.how
        if 0 < i < BY_NAME and i <= t.n_mounts:
            t.mounts[i - 1].users += 1
    for i in range(1, t.n_mounts):
        if t.mounts[i].users:
            t.n_descriptors += 1
        else:
            t.mounts[i].mnt_id = 0
            t.mounts[i].fd = -1


cdef int recover_long_names(tables_t *t) noexcept nogil:
    """Those that no note has are free."""
    cdef unsigned char *used
    cdef const named_t *named
    cdef uint32_t index, at
    if t.long_names_top <= 1:
        return 0
    used = <unsigned char *>calloc(t.long_names_top, 1)
    if used == NULL:
        return -ENOMEM
    for index in range(<uint32_t>FUSE_ROOT_ID + 1, t.inodes_top):
        if t.inodes[index].note.how == BY_NAME:
            named = <const named_t *>t.inodes[index].note.bytes
            if named.long_name < t.long_names_top:
                used[named.long_name] = 1
    t.long_names_free = 0
    for at in range(1, t.long_names_top):
        if not used[at]:
            t.long_names[at].next = t.long_names_free
            t.long_names_free = at
    free(used)
    return 0


cdef int tables_recover(tables_t *t) noexcept nogil:
    cdef uint32_t index
    make_empty(t.buckets, BUCKETS * sizeof(uint32_t))
    make_empty(t.listings, LISTINGS * sizeof(listing_t))
    make_empty(t.dirtiers, INODES_MAX * sizeof(int))
    make_empty(t.anchored, INODES_MAX // 8)
    make_empty(t.seen_names, SEEN_NAMES * sizeof(uint64_t))
    memset(t.told, 0, TOLD_MAX * sizeof(uint64_t))
    memset(t.alive, 0, ALIVE_MAX * sizeof(uint64_t))
    t.inodes_free = t.handles_free = 0
    t.n_inodes = t.n_handles = t.n_anchors = t.n_descriptors = t.n_by_name = 0
    t.n_locks = t.n_ranges = 0
    # From the top, so that the free lists begin with the lowest.
    for index in range(t.inodes_top - 1, <uint32_t>FUSE_ROOT_ID, -1):
        recover_inode(t, index)
    t.inodes[FUSE_ROOT_ID].state = 1
    for index in range(t.handles_top - 1, 0, -1):
        recover_handle(t, index)
    for index in range(<uint32_t>UNOPENED_MAX):
        if t.unopened[index].nodeid and not is_open(t, t.unopened[index].fh):
            t.unopened[index].nodeid = t.unopened[index].fh = 0
    recover_mounts(t)
    t.evict_at = t.fds_max
    return recover_long_names(t)


cdef bint is_open(const tables_t *t, uint64_t fh) noexcept nogil:
    cdef uint32_t index = <uint32_t>fh
    return index < HANDLES_MAX and generation_of(t.handles[index].state) == fh >> 32 and t.handles[index].state & OPEN


cdef void tables_descriptors(const tables_t *t, fd_set_t *known) noexcept nogil:
    cdef uint32_t index
    note_fd(known, t.proc_fd)
    note_fd(known, t.selinux_proc_fd)
    for index in range(<uint32_t>FUSE_ROOT_ID, t.inodes_top):
        if t.inodes[index].state & REFERENCES:
            note_fd(known, t.inodes[index].fd)
    for index in range(1, t.handles_top):
        if t.handles[index].state & OPEN:
            note_fd(known, t.handles[index].fd)
            note_fd(known, t.handles[index].other_fd)
    for index in range(1, t.n_mounts):
        note_fd(known, t.mounts[index].fd)
    for index in range(t.held_top):
        if t.held[index].kind == HELD_POSIX:
            note_fd(known, <int>index)


cdef void close_unknown(const fd_set_t *known) noexcept nogil:
    """Gap by gap: nobody has to list what is open."""
    cdef int64_t fd = 0, first
    while fd < known.n:
        if known.bits[fd >> 6] == <uint64_t>-1:
            fd = (fd | 63) + 1
            continue
        if known.bits[fd >> 6] >> (fd & 63) & 1:
            fd += 1
            continue
        first = fd
        while fd < known.n and not known.bits[fd >> 6] >> (fd & 63) & 1:
            fd = fd + 1 if known.bits[fd >> 6] else (fd | 63) + 1
        h.syscall(h.SYS_close_range, <unsigned int>first, <unsigned int>(fd - 1), 0u)
