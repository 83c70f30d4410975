"""The inode cache's descriptors: closed when there are too many, brought back when needed.

An evicted inode comes back by file handle; where handles don't work (overlayfs, FUSE, another user
than root) by parent and name, if what is found there is the same inode; and if neither leads to it
any more, by a file that the guest has it open as.
"""

from libc.errno cimport EACCES, EINTR, EIO, EMFILE, ENFILE, ENOENT, ENOMEM, EPERM, ESTALE, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset, strlen, strrchr

from vfsd.sys._threads cimport pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock
from vfsd.fuse._wire cimport FUSE_ROOT_ID
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._handles cimport handle_next, handle_put
from vfsd.hostfs.table._nodes cimport (
    ATTR_MASK, anchor_close, anchor_set, find_nodeid, inode_get, inode_put, is_inode, lock_of, unhash,
)
from vfsd.hostfs.table._notes cimport handle_of, note_drop, note_handle, note_name, noted_name, vfsd_handle
from vfsd.hostfs.table._slots cimport (
    BUSY, BY_NAME, REFERENCES, add_u64, cas_u64, inode_t, load_acquire_int, load_acquire_u64, named_t,
    load_relaxed_u8, note_t, store_relaxed_u8, store_release_u64,
)

cdef extern from *:
    int lowest_bit "__builtin_ctzll"(uint64_t bits) nogil

cdef enum:
    ROUNDS = 5           # of the hand over all anchors in one call: more than a directory's lives
    FAILURES_MAX = 64    # of notes in one call
    LIVES_OF_FAILED = 64 # rounds until a note is tried again
    AGAIN_AFTER = 64     # descriptors beyond the budget until the evictor tries again that found none
    SEARCH_MAX = 1 << 16 # names that are compared in one directory
    SEARCH_BYTES = 2048  # of names at a time; on the stack of DEPTH_MAX ancestors
    DEPTH_MAX = 256      # ancestors that are opened again for one inode; a LOOKUP of each goes further


# --- going ---

cdef uint64_t birth_of(const h.statx_t *st) noexcept nogil:
    if not st.stx_mask & h.STATX_BTIME:
        return 0
    return (<uint64_t>st.stx_btime.tv_sec << 30) ^ st.stx_btime.tv_nsec


cdef bint place_of(tables_t *t, const inode_t *inode, int fd, char *path) noexcept nogil:
    cdef char number[h.FD_BYTES]
    cdef h.statx_t found
    cdef int flags = h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT
    cdef ssize_t n = h.readlinkat(t.proc_fd, h.fd_name(fd, number), path, h.PATH_BYTES)
    if n <= 0 or n == h.PATH_BYTES or path[0] != c'/':
        return False
    path[n] = 0
    return h.statx(h.AT_FDCWD, path, flags, ATTR_MASK, &found) == 0 and is_inode(inode, &found)


cdef bint note_place(tables_t *t, const inode_t *inode, const h.statx_t *st, note_t *note) noexcept nogil:
    """Note where an inode is now, as the kernel knows it, if the guest knows the directory too."""
    cdef char path[h.PATH_BYTES]
    cdef h.statx_t found
    cdef uint64_t parent
    cdef char *name
    cdef const char *above = path
    cdef int flags = h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT
    if not place_of(t, inode, inode.fd, path):
        return False
    name = strrchr(path, c'/')
    name[0] = 0
    if name == path:
        above = b"/"
    if h.statx(h.AT_FDCWD, above, flags, ATTR_MASK, &found) < 0:
        return False
    parent = find_nodeid(t, &found)
    name += 1
    return parent != 0 and note_name(t, parent, birth_of(st), name, strlen(name), note)


cdef bint make_note(tables_t *t, const inode_t *inode, note_t *note) noexcept nogil:
    """What brings a referenced inode back. An unlinked one could not come back."""
    cdef h.statx_t st
    memset(note, 0, sizeof(note[0]))
    if h.statx(inode.fd, b"", h.AT_EMPTY_PATH, ATTR_MASK | h.STATX_BTIME, &st) < 0 or st.stx_nlink == 0:
        return False
    return note_handle(t, inode, note) or note_place(t, inode, &st, note)


cdef bint close_noted(tables_t *t, uint32_t index, uint64_t state, note_t *note) noexcept nogil:
    """Take the anchor of an inode if nobody but its lookups and the caller refers to it. Owns the note."""
    cdef inode_t *inode = &t.inodes[index]
    cdef pthread_mutex_t *lock = lock_of(t, inode)
    cdef bint alone
    pthread_mutex_lock(lock)
    # Without lookups the other reference is that of somebody who works with the anchor.
    alone = inode.nlookup > 0 and cas_u64(&inode.state, state, state | BUSY)
    if alone:
        note_drop(t, &inode.note)
        inode.note = note[0]
        if note.how == BY_NAME:
            add_u64(&t.n_by_name, 1)
        anchor_close(t, index)
        store_release_u64(&inode.state, state)
    pthread_mutex_unlock(lock)
    if not alone:
        note_drop(t, note)
    return alone


cdef bint evict_one(tables_t *t, uint32_t index, int *failures) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    cdef uint64_t state = load_acquire_u64(&inode.state)
    cdef note_t note
    cdef uint8_t used = load_relaxed_u8(&inode.used)
    cdef bint gone
    if (state & (BUSY | REFERENCES)) != 1:
        return False
    if used:
        store_relaxed_u8(&inode.used, used - 1)
        return False
    # Only referenced while it is noted, which may take its time: who needs it need not wait.
    if not cas_u64(&inode.state, state, state + 1):
        return False
    gone = inode.fd >= 0 and make_note(t, inode, &note)
    if not gone:
        store_relaxed_u8(&inode.used, LIVES_OF_FAILED)
        failures[0] += 1
    else:
        gone = close_noted(t, index, state + 1, &note)
    inode_put(t, index)
    return gone


cdef int evict(tables_t *t, int n) noexcept nogil:
    cdef int closed = 0, rounds = 0, failures = 0
    cdef uint64_t bits, held
    pthread_mutex_lock(&t.evict)
    while closed < n and rounds < ROUNDS and failures < FAILURES_MAX:
        t.hand += 1
        if t.hand >= t.inodes_top:
            t.hand = FUSE_ROOT_ID
            rounds += 1
            continue
        bits = load_acquire_u64(&t.anchored[t.hand >> 6]) >> (t.hand & 63)
        if bits == 0:
            t.hand |= 63
            continue
        t.hand += lowest_bit(bits)
        closed += evict_one(t, t.hand, &failures)
    t.evict_at = t.fds_max
    held = load_acquire_u64(&t.n_anchors) + load_acquire_u64(&t.n_descriptors)
    if closed == 0 and held >= t.fds_max:
        t.evict_at = held + AGAIN_AFTER
    pthread_mutex_unlock(&t.evict)
    add_u64(&t.evicted, closed)
    return closed


cdef bint out_of_descriptors(tables_t *t, int error) noexcept nogil:
    """Whether it is worth trying the system call that failed once more."""
    return (error == EMFILE or error == ENFILE) and evict(t, EVICT_BATCH) > 0


# --- coming back ---

cdef bint is_same(tables_t *t, const inode_t *inode, int fd) noexcept nogil:
    cdef const named_t *named = <const named_t *>inode.note.bytes
    cdef vfsd_handle handle
    cdef h.statx_t st
    if inode.note.how == BY_NAME:
        return (h.statx(fd, b"", h.AT_EMPTY_PATH, ATTR_MASK | h.STATX_BTIME, &st) == 0
                and is_inode(inode, &st) and birth_of(&st) == named.born)
    return (handle_of(fd, &handle) == 0 and handle.handle_type == inode.note.handle_type
            and handle.handle_bytes == inode.note.handle_bytes
            and memcmp(handle.bytes, inode.note.bytes, handle.handle_bytes) == 0)


cdef int by_handle(tables_t *t, const inode_t *inode) noexcept nogil:
    cdef vfsd_handle handle
    cdef int fd, rc
    handle.handle_bytes = inode.note.handle_bytes
    handle.handle_type = inode.note.handle_type
    memcpy(handle.bytes, inode.note.bytes, inode.note.handle_bytes)
    while True:
        fd = h.open_by_handle_at(
            t.mounts[inode.note.how - 1].fd, <h.file_handle *>&handle, h.O_PATH | h.O_CLOEXEC)
        if fd >= 0:
            return fd
        rc = errno
        if not out_of_descriptors(t, rc):
            return -rc


cdef int by_number(tables_t *t, const inode_t *inode, int directory) noexcept nogil:
    """The same inode by another name in its directory: the host has renamed it there."""
    cdef char entries[SEARCH_BYTES]
    cdef const h.linux_dirent64 *entry
    cdef ssize_t n, at
    cdef uint32_t seen = 0
    cdef int found = -1, listed = -1, rc
    while listed < 0:
        listed = h.openat(directory, b".", h.O_RDONLY | h.O_DIRECTORY | h.O_CLOEXEC)
        rc = errno
        if listed < 0 and not out_of_descriptors(t, rc):
            return -rc
    while found < 0 and seen < SEARCH_MAX:
        n = h.syscall(h.SYS_getdents64, listed, entries, sizeof(entries))
        at = 0
        while at < n and found < 0:
            entry = <const h.linux_dirent64 *>(entries + at)
            at += entry.d_reclen
            seen += 1
            if entry.d_ino == inode.ino:
                found = h.openat(listed, <const char *>entry + sizeof(entry[0]), h.O_PATH | h.O_NOFOLLOW | h.O_CLOEXEC)
            if found >= 0 and not is_same(t, inode, found):
                h.close(found)
                found = -1
        if n <= 0:
            break
    h.close(listed)
    return found if found >= 0 else -ESTALE


cdef int by_name(tables_t *t, const inode_t *inode, int depth) noexcept nogil:
    cdef const named_t *named = <const named_t *>inode.note.bytes
    cdef int64_t parent = inode_get(t, named.parent)
    cdef int directory, fd = -1, rc
    if parent < 0:
        return <int>parent
    directory = anchor_of(t, parent, depth + 1)
    rc = directory
    while fd < 0 and rc >= 0:
        fd = h.openat(directory, noted_name(t, &inode.note), h.O_PATH | h.O_NOFOLLOW | h.O_CLOEXEC)
        if fd < 0:
            rc = -errno
            if out_of_descriptors(t, -rc):
                rc = 0
    if fd >= 0 and not is_same(t, inode, fd):
        h.close(fd)
        rc = -ENOENT
    # Linux looks a file's path up again upon ESTALE; but not the directory a program is in, nor what
    # it has open without having told us.
    if rc == -ENOENT and directory >= 0 and (t.zero_open or inode.mode == h.S_IFDIR):
        rc = by_number(t, inode, directory)
        fd = rc
    inode_put(t, parent)
    return rc if rc < 0 else fd


cdef int by_open_file(tables_t *t, uint32_t index) noexcept nogil:
    """The same inode as the guest has it open: a removed one can be had from nowhere else."""
    cdef char number[h.FD_BYTES]
    cdef h.statx_t st
    cdef int64_t handle = 0
    cdef int fd = -1, file = -1
    while fd < 0:
        handle = handle_next(t, index, <uint32_t>handle, &file)
        if handle < 0:
            return -ESTALE
        if h.statx(file, b"", h.AT_EMPTY_PATH, ATTR_MASK, &st) == 0 and is_inode(&t.inodes[index], &st):
            fd = h.openat(t.proc_fd, h.fd_name(file, number), h.O_PATH | h.O_CLOEXEC)
        handle_put(t, <uint32_t>handle)
    return fd


cdef inline bint is_passing(int error) noexcept nogil:
    """An errno that says nothing about whether the inode is still there."""
    return (error == EMFILE or error == ENFILE or error == ENOMEM or error == EINTR or error == EIO
            or error == EACCES or error == EPERM)


cdef int anchor_back(tables_t *t, uint32_t index, int depth) noexcept nogil:
    cdef inode_t *inode = &t.inodes[index]
    cdef int fd, other
    if depth > DEPTH_MAX:
        return -ESTALE
    make_room(t)
    fd = by_name(t, inode, depth) if inode.note.how == BY_NAME else by_handle(t, inode)
    if fd < 0:
        other = by_open_file(t, index)
        if other >= 0:
            fd = other
    if fd >= 0:
        return anchor_set(t, index, fd)
    if fd == -EMFILE:
        fd = -ENFILE
    return fd if is_passing(-fd) else -ESTALE


cdef int anchor_of(tables_t *t, uint32_t index, int depth) noexcept nogil:
    cdef int fd = load_acquire_int(&t.inodes[index].fd)
    note_used(&t.inodes[index])
    return fd if fd >= 0 else anchor_back(t, index, depth)


cdef int inode_fd(tables_t *t, uint32_t index) noexcept nogil:
    return anchor_of(t, index, 0)


cdef void let_go_if_stale(tables_t *t, uint32_t index) noexcept nogil:
    """An anchor keeps a number from being reused, but not on a server of files, which does not know of it: where
    another client removes files it soon gives new ones the same numbers.
    """
    cdef int fd = load_acquire_int(&t.inodes[index].fd)
    cdef h.statx_t st
    if (fd >= 0 and h.statx(fd, b"", h.AT_EMPTY_PATH | h.AT_STATX_FORCE_SYNC, h.STATX_INO, &st) < 0
            and errno == ESTALE):
        unhash(t, index)


cdef void inode_was_stale(void *fs, uint64_t nodeid) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef int64_t index = inode_get(t, nodeid)
    if index >= 0:
        let_go_if_stale(t, <uint32_t>index)
        inode_put(t, <uint32_t>index)


cdef int inode_pin_name(tables_t *t, int parent, const char *name, uint32_t *index) noexcept nogil:
    cdef h.statx_t st
    cdef int64_t found
    cdef int fd
    index[0] = 0
    if h.statx(parent, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, ATTR_MASK, &st) < 0:
        return 0
    found = inode_get(t, find_nodeid(t, &st))
    if found < 0:
        return 0
    fd = inode_fd(t, <uint32_t>found)
    if fd == -ENFILE or fd == -ENOMEM:
        inode_put(t, <uint32_t>found)
        return fd
    index[0] = <uint32_t>found
    return 0
