"""Who holds what: files, owners, their locks on the host, and one try to take one."""

from libc.errno cimport EACCES, EAGAIN, EBADF, ENOLCK, errno
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vfsd.hostfs.lock._published cimport (
    OWNER_ROWS_MAX, ROW_HOLD, publish, row_t, tell_weaker, withdraw, word_change,
)
from vfsd.sys._threads cimport pthread_cond_signal
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._anchors cimport make_room, out_of_descriptors
from vfsd.hostfs.ops._caller cimport FD_BYTES, fd_name
from vfsd.hostfs.table._handles cimport descriptor_put, descriptor_take, handle_get, handle_put
from vfsd.hostfs.table._slots cimport HELD_FLOCK, HELD_MAX, HELD_NOTHING, HELD_POSIX, add_u64, held_t, store_release_u32


# --- finding and making ---

cdef inline uint32_t bucket_of(uint64_t a, uint64_t b) noexcept nogil:
    return <uint32_t>(((a ^ (b << 23) ^ (b >> 41)) * <uint64_t>0x9E3779B97F4A7C15) >> 54)


cdef int identify(want_t *w) noexcept nogil:
    """Which file w.fd stands for: 0 or -errno."""
    cdef h.statx_t st
    if h.statx(w.fd, b"", h.AT_EMPTY_PATH, h.STATX_INO, &st) < 0:
        return -errno
    w.dev = h.makedev(st.stx_dev_major, st.stx_dev_minor)
    w.ino = st.stx_ino
    return 0


cdef file_t *file_of(locks_t *l, const want_t *w, bint make) noexcept nogil:
    """NULL when nobody has locks on it, or without memory."""
    cdef file_t **bucket = &l.files[bucket_of(w.ino, w.dev)]
    cdef file_t *file = bucket[0]
    while file != NULL and (file.ino != w.ino or file.dev != w.dev):
        file = file.next
    if file == NULL and make:
        file = <file_t *>calloc(1, sizeof(file_t))
        if file != NULL:
            file.dev = w.dev
            file.ino = w.ino
            file.next = bucket[0]
            bucket[0] = file
    return file


cdef owner_t *owner_of(locks_t *l, const want_t *w, bint make) noexcept nogil:
    cdef owner_t **bucket = &l.owners[bucket_of(w.number, <uint64_t>w.guest)]
    cdef owner_t *owner = bucket[0]
    while owner != NULL and (owner.number != w.number or owner.guest != w.guest or owner.flock != w.flock):
        owner = owner.next
    if owner == NULL and make:
        owner = <owner_t *>calloc(1, sizeof(owner_t))
        if owner != NULL:
            owner.guest = w.guest
            owner.number = w.number
            owner.flock = w.flock
            l.owner_ids += 1
            owner.id = l.owner_ids
            owner.next = bucket[0]
            bucket[0] = owner
    return owner


cdef hold_t *hold_of(file_t *file, const owner_t *owner) noexcept nogil:
    cdef hold_t *hold
    if file == NULL or owner == NULL:
        return NULL
    hold = file.holds
    while hold != NULL and hold.owner != owner:
        hold = hold.next
    return hold


cdef void drop_file(locks_t *l, file_t *file) noexcept nogil:
    """Forget a file without holds and waiters."""
    cdef file_t **link = &l.files[bucket_of(file.ino, file.dev)]
    if file.holds != NULL or file.waiters:
        return
    while link[0] != file:
        link = &link[0].next
    link[0] = file.next
    free(file)


cdef void drop_owner(locks_t *l, owner_t *owner) noexcept nogil:
    """Forget an owner without holds and waiters."""
    cdef owner_t **link = &l.owners[bucket_of(owner.number, <uint64_t>owner.guest)]
    if owner.users:
        return
    while link[0] != owner:
        link = &link[0].next
    link[0] = owner.next
    free(owner)


# --- what is held ---

cdef void note_weaker(locks_t *l, file_t *file) noexcept nogil:
    if file.waiters:
        l.changes += 1
        file.weakened = l.changes
        wake_waker(l)
    tell_weaker(&l.published)


cdef void wake_waker(locks_t *l) noexcept nogil:
    if l.asleep:
        word_change(l.published.changes)
    else:
        pthread_cond_signal(&l.changed)


cdef void publish_holds(locks_t *l, owner_t *owner) noexcept nogil:
    cdef hold_t *hold = owner.holds
    cdef range_t *part
    cdef row_t row
    cdef uint16_t number
    cdef uint32_t left = OWNER_ROWS_MAX
    withdraw_holds(l, owner)
    memset(&row, 0, sizeof(row))
    row.kind = ROW_HOLD
    row.owner = owner.id
    while hold != NULL:
        row.dev = hold.file.dev
        row.ino = hold.file.ino
        part = hold.ranges
        while part != NULL and left:
            left -= 1
            row.type = part.type
            row.start = part.start
            row.end = part.end
            number = publish(&l.published, &row)
            if number:
                l.published.next[number] = owner.rows
                owner.rows = number
            part = part.next
        hold = hold.same_owner


cdef void withdraw_holds(locks_t *l, owner_t *owner) noexcept nogil:
    cdef uint16_t next_row
    while owner.rows:
        next_row = l.published.next[owner.rows]
        withdraw(&l.published, owner.rows)
        owner.rows = next_row


cdef void note_held(const hold_t *hold, const want_t *w) noexcept nogil:
    """For the next server. What a descriptor holds is then asked of the host."""
    cdef tables_t *t = hold.owner.guest
    cdef held_t *held = &t.held[hold.fd]
    held.number = hold.owner.number
    held.through = hold.through
    held.pid = w.pid
    held.reads_only = hold.reads_only
    if t.held_top <= <uint32_t>hold.fd:
        t.held_top = <uint32_t>hold.fd + 1
    store_release_u32(&held.kind, HELD_FLOCK if hold.owner.flock else HELD_POSIX)


cdef void forget_held(tables_t *t, int fd) noexcept nogil:
    store_release_u32(&t.held[fd].kind, HELD_NOTHING)


cdef hold_t *add_hold(locks_t *l, file_t *file, owner_t *owner, int fd, int64_t handle) noexcept nogil:
    """A hold on nothing yet; NULL without memory."""
    cdef hold_t *hold = <hold_t *>calloc(1, sizeof(hold_t))
    if hold == NULL:
        return NULL
    hold.owner = owner
    hold.file = file
    hold.fd = fd
    hold.handle = handle
    hold.next = file.holds
    file.holds = hold
    hold.same_owner = owner.holds
    owner.holds = hold
    owner.users += 1
    l.n_holds += 1
    add_u64(&owner.guest.n_locks, 1)
    return hold


cdef void drop_hold(locks_t *l, hold_t *hold) noexcept nogil:
    """Give up all an owner has on a file."""
    cdef tables_t *guest = hold.owner.guest
    cdef hold_t **link = &hold.file.holds
    cdef range_t *part = hold.ranges
    cdef range_t *next_part
    forget_held(guest, hold.fd)
    if hold.handle < 0:
        close_owner(guest, hold.fd)
    else:
        h.flock(hold.fd, h.LOCK_UN)
        handle_put(guest, <uint32_t>hold.handle)
    if part != NULL:
        note_weaker(l, hold.file)
    while part != NULL:
        next_part = part.next
        free(part)
        guest.n_ranges -= 1
        part = next_part
    while link[0] != hold:
        link = &link[0].next
    link[0] = hold.next
    link = &hold.owner.holds
    while link[0] != hold:
        link = &link[0].same_owner
    link[0] = hold.same_owner
    if hold.owner.waiters != NULL:
        publish_holds(l, hold.owner)
    hold.owner.users -= 1
    l.n_holds -= 1
    add_u64(&guest.n_locks, <uint64_t>-1)
    free(hold)


cdef range_t *conflict(file_t *file, const owner_t *owner, const want_t *w, hold_t **by) noexcept nogil:
    """A lock of another owner of ours that stands against it, or NULL."""
    cdef hold_t *hold = file.holds
    cdef range_t *part
    while hold != NULL:
        if hold.owner != owner and hold.owner.flock == w.flock:
            part = hold.ranges
            while part != NULL and part.start <= w.end:
                if part.end >= w.start and (part.type == h.F_WRLCK or w.type == h.F_WRLCK):
                    by[0] = hold
                    return part
                part = part.next
        hold = hold.next
    return NULL


cdef bint record(hold_t *hold, const want_t *w, range_t **spare) noexcept nogil:
    """Write down what the host has granted; uses up to two spare ranges. True: others may gain by it."""
    cdef range_t **link = &hold.ranges
    cdef range_t *part
    cdef range_t *before = NULL
    cdef bint weaker = False
    while link[0] != NULL and link[0].end < w.start:
        before = link[0]
        link = &before.next
    while link[0] != NULL and link[0].start <= w.end:
        part = link[0]
        weaker |= w.type == h.F_UNLCK or (w.type == h.F_RDLCK and part.type == h.F_WRLCK)
        if part.start < w.start:
            if part.end > w.end:  # it becomes two
                spare[1][0] = part[0]
                spare[1].start = w.end + 1
                part.next = spare[1]
                spare[1] = NULL
            part.end = w.start - 1
            before = part
            link = &part.next
        elif part.end > w.end:
            part.start = w.end + 1
        else:
            link[0] = part.next
            part.next = NULL
            hold.owner.guest.n_ranges -= 1
            free(part)
    if w.type == h.F_UNLCK:
        return weaker
    part = spare[0]
    spare[0] = NULL
    part.start = w.start
    part.end = w.end
    part.type = w.type
    part.pid = w.pid
    part.next = link[0]
    link[0] = part
    join(hold, part)
    if before != NULL:
        join(hold, before)
    return weaker


cdef void join(hold_t *hold, range_t *part) noexcept nogil:
    """Make one of two that touch."""
    cdef range_t *after = part.next
    if after != NULL and after.type == part.type and part.end + 1 == after.start:
        part.end = after.end
        part.next = after.next
        hold.owner.guest.n_ranges -= 1
        free(after)


# --- one try ---

cdef int refused(want_t *w, int error) noexcept nogil:
    """The host's no."""
    if error == EAGAIN or error == EACCES:
        w.by_host = True
        return -EAGAIN
    return -error


cdef int try_flock(locks_t *l, file_t *file, owner_t *owner, want_t *w) noexcept nogil:
    cdef hold_t *hold = hold_of(file, owner)
    cdef hold_t *by = NULL
    cdef int rc
    if w.type == h.F_UNLCK:
        if hold != NULL:
            drop_hold(l, hold)
        return 0
    if hold != NULL and hold.ranges.type == w.type:
        return 0
    if conflict(file, owner, w, &by) != NULL:
        # As on the host: a conversion gives up what was held before it tries (flock(2)).
        if hold != NULL:
            drop_hold(l, hold)
        return -EAGAIN
    if h.flock(w.fd, (h.LOCK_EX if w.type == h.F_WRLCK else h.LOCK_SH) | h.LOCK_NB) < 0:
        rc = refused(w, errno)
        if hold != NULL:
            drop_hold(l, hold)
        return rc
    if hold != NULL:
        hold.ranges.type = w.type
        hold.ranges.pid = w.pid
        if w.type == h.F_RDLCK:
            note_weaker(l, file)
        return 0
    return keep_flock(l, file, owner, w)


cdef int keep_flock(locks_t *l, file_t *file, owner_t *owner, want_t *w) noexcept nogil:
    """Write down a flock the host has granted to a handle that had none."""
    cdef hold_t *hold = NULL
    cdef int fd = -1
    cdef int64_t handle = handle_get(w.guest, w.fh, &fd)
    cdef range_t *whole = <range_t *>calloc(1, sizeof(range_t))
    if handle >= 0 and whole != NULL:
        hold = add_hold(l, file, owner, fd, handle)
    if hold == NULL:
        h.flock(w.fd, h.LOCK_UN)
        free(whole)
        if handle < 0:
            return -EBADF
        handle_put(w.guest, <uint32_t>handle)
        return -ENOLCK
    whole.end = OFFSET_MAX
    whole.type = w.type
    whole.pid = w.pid
    hold.ranges = whole
    w.guest.n_ranges += 1
    note_held(hold, w)
    return 0


cdef int open_owner(const want_t *w, int flags) noexcept nogil:
    """A descriptor of w's file that is a lock owner of its own: it or -ENOLCK."""
    cdef char name[FD_BYTES]
    cdef int fd, rc
    if descriptor_take(w.guest) < 0:
        return -ENOLCK
    make_room(w.guest)
    fd_name(w.fd, name)
    while True:
        fd = h.openat(w.guest.proc_fd, name, flags | h.O_CLOEXEC | h.O_NONBLOCK)
        if 0 <= fd < HELD_MAX:
            return fd
        rc = errno
        if fd >= 0:
            h.close(fd)
            rc = ENOLCK
        if not out_of_descriptors(w.guest, rc):
            descriptor_put(w.guest)
            return -ENOLCK


cdef void close_owner(tables_t *guest, int fd) noexcept nogil:
    h.close(fd)
    descriptor_put(guest)


cdef void as_host(const want_t *w, h.flock_t *fl) noexcept nogil:
    memset(fl, 0, sizeof(h.flock_t))
    fl.l_type = <short>w.type
    fl.l_whence = h.SEEK_SET
    fl.l_start = <int64_t>w.start
    fl.l_len = 0 if w.end == OFFSET_MAX else <int64_t>(w.end - w.start + 1)


cdef int first_hold(locks_t *l, file_t *file, owner_t *owner, want_t *w, hold_t **made) noexcept nogil:
    """A hold for an owner without one, unless the host would refuse: then no descriptor is opened."""
    cdef h.flock_t fl
    cdef int fd
    as_host(w, &fl)
    if h.fcntl(w.fd, h.F_OFD_GETLK, &fl) < 0:
        return -errno
    if fl.l_type != h.F_UNLCK:
        return refused(w, EAGAIN)
    # For both kinds, where the guest may write: the next lock may be of the other.
    fd = open_owner(w, h.O_RDONLY if w.reads_only else h.O_RDWR)
    if fd < 0 and not w.reads_only:
        fd = open_owner(w, h.O_WRONLY)
    if fd < 0:
        return fd
    made[0] = add_hold(l, file, owner, fd, -1)
    if made[0] == NULL:
        close_owner(w.guest, fd)
        return -ENOLCK
    made[0].reads_only = w.reads_only
    note_held(made[0], w)
    return 0


cdef int widen(hold_t *hold, want_t *w) noexcept nogil:
    """Move a hold of read locks to a descriptor that can take write locks: 0 or -errno."""
    cdef h.flock_t fl
    cdef want_t same = w[0]
    cdef range_t *part = hold.ranges
    cdef int was, rc = 0, fd = open_owner(w, h.O_RDWR)
    if fd < 0:
        return fd
    # Both have them for a moment, which read locks allow: nobody can come in between.
    while part != NULL and rc == 0:
        same.start = part.start
        same.end = part.end
        same.type = part.type
        as_host(&same, &fl)
        rc = -errno if h.fcntl(fd, h.F_OFD_SETLK, &fl) < 0 else 0
        part = part.next
    if rc < 0:
        close_owner(w.guest, fd)
        return rc
    was = hold.fd
    hold.fd = fd
    hold.reads_only = False
    note_held(hold, w)
    forget_held(w.guest, was)
    close_owner(w.guest, was)
    return 0


cdef bint splits(const hold_t *hold, const want_t *w) noexcept nogil:
    cdef range_t *part = hold.ranges
    while part != NULL and (part.start >= w.start or part.end <= w.end):
        part = part.next
    return part != NULL


cdef int try_posix(locks_t *l, file_t *file, owner_t *owner, want_t *w) noexcept nogil:
    cdef hold_t *hold = hold_of(file, owner)
    cdef hold_t *by = NULL
    cdef range_t *spare[2]
    cdef h.flock_t fl
    cdef int rc = 0
    if hold == NULL and w.type == h.F_UNLCK:
        return 0
    if w.type != h.F_UNLCK and conflict(file, owner, w, &by) != NULL:
        return -EAGAIN
    if hold == NULL:
        rc = first_hold(l, file, owner, w, &hold)
    elif w.type == h.F_WRLCK and hold.reads_only:
        rc = widen(hold, w)
    if rc < 0:
        return rc
    spare[0] = <range_t *>calloc(1, sizeof(range_t))
    spare[1] = <range_t *>calloc(1, sizeof(range_t))
    as_host(w, &fl)
    if spare[0] == NULL or spare[1] == NULL:
        rc = -ENOLCK
    elif w.guest.n_ranges + 2 > RANGES_MAX and (w.type != h.F_UNLCK or splits(hold, w)):
        rc = -ENOLCK
    elif h.fcntl(hold.fd, h.F_OFD_SETLK, &fl) < 0:
        rc = refused(w, errno)
    else:
        w.guest.n_ranges += 2
        hold.through = w.fh
        note_held(hold, w)
        if record(hold, w, spare):
            note_weaker(l, file)
        if owner.waiters != NULL:
            publish_holds(l, owner)
        w.guest.n_ranges -= (spare[0] != NULL) + (spare[1] != NULL)
    free(spare[0])
    free(spare[1])
    if hold.ranges == NULL:
        drop_hold(l, hold)
    return rc


cdef int attempt(locks_t *l, file_t *file, owner_t *owner, want_t *w) noexcept nogil:
    """0 done, -EAGAIN somebody stands against it, or another -errno."""
    w.by_host = False
    return try_flock(l, file, owner, w) if w.flock else try_posix(l, file, owner, w)


# --- after the death of a server ---

cdef hold_t *regain_hold(locks_t *l, file_t *file, owner_t *owner, const want_t *w) noexcept nogil:
    """What an owner holds by that descriptor: NULL without memory, or if its handle is closed."""
    cdef const held_t *held = &w.guest.held[w.fd]
    cdef int64_t handle = -1
    cdef int fd = w.fd
    cdef hold_t *hold
    if w.flock:
        handle = handle_get(w.guest, w.number, &fd)
        if handle < 0 or fd != w.fd:
            return NULL
    hold = add_hold(l, file, owner, fd, handle)
    if hold != NULL:
        hold.through = held.through
        hold.reads_only = held.reads_only
        if handle < 0:
            add_u64(&w.guest.n_descriptors, 1)
    return hold


cdef int regain(locks_t *l, tables_t *guest, int fd, int type, uint64_t start, uint64_t end) noexcept nogil:
    cdef const held_t *held = &guest.held[fd]
    cdef range_t *spare[2]
    cdef want_t w
    cdef file_t *file
    cdef owner_t *owner
    cdef hold_t *hold = NULL
    cdef int rc = -ENOLCK
    memset(&w, 0, sizeof(w))
    w.guest = guest
    w.fd = fd
    w.number = held.number
    w.flock = held.kind == HELD_FLOCK
    w.type = type
    w.start = start
    w.end = end
    w.pid = held.pid
    if identify(&w) < 0:
        return -errno
    file = file_of(l, &w, True)
    owner = owner_of(l, &w, True)
    spare[0] = <range_t *>calloc(1, sizeof(range_t))
    spare[1] = <range_t *>calloc(1, sizeof(range_t))
    if file != NULL and owner != NULL and spare[0] != NULL and spare[1] != NULL:
        hold = hold_of(file, owner)
        if hold == NULL:
            hold = regain_hold(l, file, owner, &w)
        if hold != NULL and hold.fd == fd:  # else it was just being moved to another descriptor
            guest.n_ranges += 2
            record(hold, &w, spare)
            guest.n_ranges -= (spare[0] != NULL) + (spare[1] != NULL)
            rc = 0
    free(spare[0])
    free(spare[1])
    if file != NULL:
        drop_file(l, file)
    if owner != NULL:
        drop_owner(l, owner)
    return rc
