"""Who waits for whom: among the owners of this server, and with those of the share's other servers."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.lock._holds cimport file_of, file_t, hold_t, locks_t, owner_t, range_t, waiter_t, want_t
from vfsd.hostfs.lock._published cimport ROW_HOLD, ROW_WAIT, row_t

cdef enum:
    SEARCH_MAX = 4096   # locks looked at for a deadlock; beyond that there is none (Linux: 10 owners)
    OTHERS_MAX = 64     # owners of other servers in one search
    ROWS_LOOKED_AT_MAX = 1 << 16


cdef bint deadlock(locks_t *l, file_t *file, owner_t *origin, const want_t *w) noexcept nogil:
    """Whether somebody in its way waits, over however many others, for the owner itself.

    posix_locks_deadlock() of fs/locks.c; flock has no such check there either. The host's own
    processes are not in it.
    """
    cdef owner_t *owner
    cdef owner_t *to_visit = NULL
    cdef waiter_t *waiter
    cdef uint32_t left = SEARCH_MAX
    l.visit += 1
    look_behind(l, file, origin, w, &to_visit, &left)
    while to_visit != NULL:
        owner = to_visit
        to_visit = owner.to_visit
        if owner == origin:
            return True
        waiter = owner.waiters
        while waiter != NULL:
            look_behind(l, waiter.file, owner, &waiter.want, &to_visit, &left)
            waiter = waiter.same_owner
    return False


cdef void look_behind(locks_t *l, file_t *file, const owner_t *owner, const want_t *w, owner_t **to_visit,
                      uint32_t *left) noexcept nogil:
    """Add everybody who holds what stands against w."""
    cdef hold_t *hold = file.holds
    cdef range_t *part
    while hold != NULL:
        if hold.owner != owner and not hold.owner.flock and hold.owner.visited != l.visit:
            part = hold.ranges
            while part != NULL and part.start <= w.end and left[0]:
                left[0] -= 1
                if part.end >= w.start and (part.type == h.F_WRLCK or w.type == h.F_WRLCK):
                    hold.owner.visited = l.visit
                    hold.owner.to_visit = to_visit[0]
                    to_visit[0] = hold.owner
                    break
                part = part.next
        hold = hold.next


# --- with other servers ---

cdef struct search_t:
    owner_t *to_visit
    const row_t *others[OTHERS_MAX]     # a row of each owner that was met
    uint32_t n_others
    uint32_t left
    uint64_t since


cdef bint deadlock_among_servers(locks_t *l, owner_t *origin, const want_t *w, uint64_t since) noexcept nogil:
    cdef search_t s
    cdef owner_t *owner
    cdef waiter_t *waiter
    cdef const row_t *row
    cdef uint32_t visited = 0, i
    if l.published.n_seen == 0:
        return False
    memset(&s, 0, sizeof(s))
    s.left = ROWS_LOOKED_AT_MAX
    s.since = since
    l.visit += 1
    look_behind_anywhere(l, &s, w, origin, NULL)
    while s.to_visit != NULL or visited < s.n_others:
        if s.to_visit != NULL:
            owner = s.to_visit
            s.to_visit = owner.to_visit
            if owner == origin:
                return True
            waiter = owner.waiters
            while waiter != NULL:
                if waiter.since < since:
                    look_behind_anywhere(l, &s, &waiter.want, owner, NULL)
                waiter = waiter.same_owner
            continue
        for i in range(l.published.n_seen):
            row = &l.published.seen[i]
            if row.kind == ROW_WAIT and same_owner(row, s.others[visited]) and older(l, row, since):
                look_behind_row(l, &s, row)
        visited += 1
    return False


cdef inline bint same_owner(const row_t *a, const row_t *b) noexcept nogil:
    return a.partition == b.partition and a.owner == b.owner


cdef inline bint older(const locks_t *l, const row_t *row, uint64_t since) noexcept nogil:
    return row.stamp < since or (row.stamp == since and row.partition < l.published.index)


cdef void look_behind_row(locks_t *l, search_t *s, const row_t *row) noexcept nogil:
    cdef want_t w
    memset(&w, 0, sizeof(w))
    w.dev = row.dev
    w.ino = row.ino
    w.start = row.start
    w.end = row.end
    w.type = row.type
    look_behind_anywhere(l, s, &w, NULL, row)


cdef void look_behind_anywhere(locks_t *l, search_t *s, const want_t *w, const owner_t *owner,
                               const row_t *other) noexcept nogil:
    """Add everybody who holds what stands against w, which owner, or another server's, waits for."""
    cdef file_t *file = file_of(l, w, False)
    cdef const row_t *row
    cdef uint32_t i
    if file != NULL:
        look_behind(l, file, owner, w, &s.to_visit, &s.left)
    for i in range(l.published.n_seen):
        if s.left == 0:
            return
        s.left -= 1
        row = &l.published.seen[i]
        if (row.kind == ROW_HOLD and row.ino == w.ino and row.dev == w.dev and row.start <= w.end
                and row.end >= w.start and (row.type == h.F_WRLCK or w.type == h.F_WRLCK)
                and (other == NULL or not same_owner(row, other))):
            meet(s, row)


cdef void meet(search_t *s, const row_t *row) noexcept nogil:
    cdef uint32_t i
    for i in range(s.n_others):
        if same_owner(s.others[i], row):
            return
    if s.n_others < OTHERS_MAX:
        s.others[s.n_others] = row
        s.n_others += 1
