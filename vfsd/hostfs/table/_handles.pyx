"""The handle table."""

from libc.errno cimport EBADF, ENFILE

from vfsd.sys._threads cimport pthread_mutex_lock, pthread_mutex_unlock
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._slots cimport (
    DIRTY_NOTHING, DIRTY_SIZES, HANDLES_MAX, OPEN, REFERENCES, UNOPENED_MAX, WRITABLE, add_int, add_u64, cas_int,
    cas_u64, generation_of, handle_t, load_acquire_int, load_acquire_u64, reference, store_release_u64, unopened_t,
)

assert sizeof(handle_t) == 32


cdef int64_t handle_get(tables_t *t, uint64_t fh, int *fd) noexcept nogil:
    cdef uint32_t index = <uint32_t>fh
    if index == 0 or index >= HANDLES_MAX or not reference(&t.handles[index].state, fh >> 32, OPEN, 0):
        return -EBADF
    fd[0] = t.handles[index].fd
    return index


cdef int drop(tables_t *t, uint32_t index) noexcept nogil:
    """Give a reference back: the descriptor nobody uses any more, -1 while somebody does."""
    cdef handle_t *handle = &t.handles[index]
    cdef int fd
    if (add_u64(&handle.state, <uint64_t>-1) & REFERENCES) != 0:
        return -1
    fd = handle.fd
    if handle.dirties:
        add_int(&t.dirtiers[handle.inode], -1)
    if handle.other_fd >= 0:
        h.close(handle.other_fd)
        descriptor_put(t)
    pthread_mutex_lock(&t.alloc)
    handle.inode = t.handles_free
    t.handles_free = index
    store_release_u64(&handle.state, (generation_of(handle.state) + 1) << 32)
    pthread_mutex_unlock(&t.alloc)
    add_u64(&t.n_handles, <uint64_t>-1)
    descriptor_put(t)
    return fd


cdef void handle_put(tables_t *t, uint32_t index) noexcept nogil:
    cdef int fd = drop(t, index)
    if fd >= 0:
        h.close(fd)


cdef int descriptor_take(tables_t *t) noexcept nogil:
    while add_u64(&t.n_descriptors, 1) > load_acquire_u64(&t.handles_max):
        add_u64(&t.n_descriptors, <uint64_t>-1)
        if not (t.zero_open and unopened_drop_any(t)):
            return -ENFILE
    return 0


cdef void descriptor_put(tables_t *t) noexcept nogil:
    add_u64(&t.n_descriptors, <uint64_t>-1)


cdef inline bint may_dirty(const tables_t *t, int flags) noexcept nogil:
    """Whether the guest may have changes of a file so opened that only it knows: see DIRTY_*."""
    cdef int access = flags & h.O_ACCMODE
    if t.dirty == DIRTY_SIZES:
        return access != h.O_RDONLY
    return t.dirty != DIRTY_NOTHING and access == h.O_RDWR  # mmap(2) always asks for reading


cdef uint64_t handle_open(tables_t *t, int fd, uint32_t inode, int flags, bint writable, uint64_t *noted) noexcept nogil:
    cdef uint32_t index
    cdef uint64_t generation
    cdef handle_t *handle
    pthread_mutex_lock(&t.alloc)
    index = t.handles_free
    if index:
        t.handles_free = t.handles[index].inode
    else:
        index = t.handles_top  # below HANDLES_MAX, as handles_max is
        t.handles_top += 1
    pthread_mutex_unlock(&t.alloc)
    handle = &t.handles[index]
    handle.fd = fd
    handle.inode = inode
    handle.other_fd = -1
    handle.flags = flags
    handle.dirties = may_dirty(t, flags)
    if handle.dirties:
        add_int(&t.dirtiers[inode], 1)
    add_u64(&t.n_handles, 1)
    generation = generation_of(handle.state)
    if noted != NULL:
        store_release_u64(noted, (generation << 32) | index)
    store_release_u64(&handle.state, (generation << 32) | OPEN | (WRITABLE if writable else 0) | 1)
    return (generation << 32) | index


cdef int handle_other(tables_t *t, uint32_t index, int fd) noexcept nogil:
    cdef handle_t *handle = &t.handles[index]
    if not cas_int(&handle.other_fd, -1, fd):
        h.close(fd)
        descriptor_put(t)
        fd = load_acquire_int(&handle.other_fd)
    return fd


cdef int64_t handle_next(tables_t *t, uint32_t inode, uint32_t after, int *fd) noexcept nogil:
    cdef uint32_t index
    cdef uint64_t state
    for index in range(after + 1, t.handles_top):
        if t.handles[index].inode != inode:
            continue
        state = load_acquire_u64(&t.handles[index].state)
        if reference(&t.handles[index].state, generation_of(state), OPEN, 0):
            fd[0] = t.handles[index].fd
            return index
    return -EBADF


cdef int handle_release(tables_t *t, uint64_t fh, int *fd) noexcept nogil:
    cdef uint32_t index = <uint32_t>fh
    cdef uint64_t seen
    if index == 0 or index >= HANDLES_MAX:
        return -EBADF
    while True:
        seen = load_acquire_u64(&t.handles[index].state)
        if generation_of(seen) != fh >> 32 or not seen & OPEN:
            return -EBADF
        if cas_u64(&t.handles[index].state, seen, seen & ~OPEN):
            fd[0] = drop(t, index)
            return (seen & WRITABLE) != 0


cdef void handle_close(tables_t *t, uint64_t fh) noexcept nogil:
    cdef int fd = -1
    if handle_release(t, fh, &fd) >= 0 and fd >= 0:
        h.close(fd)


# --- files that nobody has opened ---

cdef int64_t unopened_get(tables_t *t, uint64_t nodeid, int *fd) noexcept nogil:
    cdef unopened_t *slot = &t.unopened[nodeid % UNOPENED_MAX]
    cdef int64_t index = -EBADF
    pthread_mutex_lock(&slot.lock)
    if slot.nodeid == nodeid:
        index = handle_get(t, slot.fh, fd)
    pthread_mutex_unlock(&slot.lock)
    return index


cdef void replace(tables_t *t, unopened_t *slot, uint64_t nodeid, uint64_t fh) noexcept nogil:
    """Under the slot's lock, which ends here."""
    cdef uint64_t old = slot.fh
    slot.nodeid = nodeid
    slot.fh = fh
    pthread_mutex_unlock(&slot.lock)
    handle_close(t, old)


cdef void unopened_keep(tables_t *t, uint64_t nodeid, uint64_t fh) noexcept nogil:
    cdef unopened_t *slot = &t.unopened[nodeid % UNOPENED_MAX]
    pthread_mutex_lock(&slot.lock)
    replace(t, slot, nodeid, fh)


cdef bint unopened_drop_any(tables_t *t) noexcept nogil:
    """Close a file that is only kept for the next request: False, there is none."""
    cdef unopened_t *slot
    cdef uint32_t tries = 0
    while tries < UNOPENED_MAX:
        tries += 1
        t.unopened_hand += 1
        slot = &t.unopened[t.unopened_hand % UNOPENED_MAX]
        pthread_mutex_lock(&slot.lock)
        if slot.nodeid:
            replace(t, slot, 0, 0)
            return True
        pthread_mutex_unlock(&slot.lock)
    return False


cdef void unopened_drop(tables_t *t, uint64_t nodeid) noexcept nogil:
    cdef unopened_t *slot = &t.unopened[nodeid % UNOPENED_MAX]
    pthread_mutex_lock(&slot.lock)
    if slot.nodeid == nodeid:
        replace(t, slot, 0, 0)
    else:
        pthread_mutex_unlock(&slot.lock)
