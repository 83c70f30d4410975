"""Who waits for a lock, and the thread that tries again (see the .pxd)."""

cimport cython
from libc.errno cimport EAGAIN, EBADF, EINTR, ENOLCK, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vfsd.sys._threads cimport (
    cond_init_monotonic, cond_wait_ns, pthread_cond_destroy, pthread_cond_signal, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, sched_yield,
)
from vfsd.fuse.dispatch cimport WAITS, WOULD_WAIT
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._handles cimport handle_get, handle_put
from vfsd.hostfs.lock._deadlocks cimport deadlock, deadlock_among_servers
from vfsd.hostfs.lock._holds cimport (
    BUCKETS, OFFSET_MAX, as_host, attempt, conflict, drop_file, drop_hold, drop_owner, file_of, file_t,
    hold_of, hold_t, identify, owner_of, owner_t, publish_holds, range_t, waiter_t, wake_waker,
    withdraw_holds,
)
from vfsd.hostfs.lock._published cimport (
    ROW_WAIT, Segment, forget_published, look_at_others, publish, row_t, set_waits, withdraw, word_load, word_wait,
)
from vfsd.hostfs.table._slots cimport add_u64, load_acquire_u64

import threading

cdef extern from "_shared.h" nogil:
    uint64_t monotonic_ns()

cdef extern from "<errno.h>":
    int EDEADLK

__all__ = ("Locks",)

# One thread tries for everybody, so a waiter costs some hundred bytes and no thread. It is told of
# what our own guests give up; what the host's processes give up nobody tells, so there it looks
# again, at first soon, then less often.
cdef uint64_t RETRY_MIN_NS = 1000000
cdef uint64_t RETRY_MAX_NS = 32000000
# However much the guests of other servers give up, waiters are not tried more often.
cdef uint64_t PASS_NS = 300000

cdef uint32_t NO_PID = <uint32_t>-1  # the owner is no process of this guest's, as for F_OFD_GETLK

cdef enum:
    TRIES_A_TURN = 64   # waiters tried before other requests are let in


# --- waiting ---

cdef int enqueue(locks_t *l, file_t *file, owner_t *owner, const want_t *w, parked_t *parked) noexcept nogil:
    cdef waiter_t *waiter = <waiter_t *>calloc(1, sizeof(waiter_t))
    if waiter == NULL:
        return -ENOLCK
    waiter.want = w[0]
    waiter.handle = handle_get(w.guest, w.fh, &waiter.want.fd)
    if waiter.handle < 0:
        free(waiter)
        return -EBADF
    waiter.file = file
    waiter.owner = owner
    waiter.parked = parked
    waiter.previous = l.last
    if l.last != NULL:
        l.last.next = waiter
    else:
        l.first = waiter
    l.last = waiter
    waiter.same_owner = owner.waiters
    owner.waiters = waiter
    waiter.since = monotonic_ns()
    owner.users += 1
    file.waiters += 1
    l.n_waiters += 1
    add_u64(&w.guest.n_locks, 1)
    parked.by = l
    parked.waiter = waiter
    parked.cancel = cancel
    if not w.flock:
        publish_wait(l, waiter)
    if w.by_host or waiter.suspect:
        set_waits(&l.published, True)
        l.by_host = True
        l.retry_ns = RETRY_MIN_NS
        wake_waker(l)
    return WAITS


cdef void publish_wait(locks_t *l, waiter_t *waiter) noexcept nogil:
    """Before others are looked at: of two servers that do so at once, one at least sees the other's."""
    cdef row_t row
    memset(&row, 0, sizeof(row))
    row.kind = ROW_WAIT
    row.type = waiter.want.type
    row.owner = waiter.owner.id
    row.dev = waiter.want.dev
    row.ino = waiter.want.ino
    row.start = waiter.want.start
    row.end = waiter.want.end
    row.stamp = waiter.since
    waiter.row = publish(&l.published, &row)
    if waiter.same_owner == NULL:
        publish_holds(l, waiter.owner)
    # With somebody of others waiting, it is looked for again as time goes by.
    waiter.suspect = look_at_others(&l.published) > 0 and seen_in_deadlock(l, waiter)
    l.by_host |= l.published.n_seen > 0


cdef bint seen_in_deadlock(locks_t *l, waiter_t *waiter) noexcept nogil:
    return deadlock_among_servers(l, waiter.owner, &waiter.want, waiter.since)


cdef void finish(locks_t *l, waiter_t *waiter, int rc) noexcept nogil:
    """End a wait and have it answered."""
    cdef waiter_t **link = &waiter.owner.waiters
    while link[0] != waiter:
        link = &link[0].same_owner
    link[0] = waiter.same_owner
    if waiter.previous != NULL:
        waiter.previous.next = waiter.next
    else:
        l.first = waiter.next
    if waiter.next != NULL:
        waiter.next.previous = waiter.previous
    else:
        l.last = waiter.previous
    if l.cursor == waiter:
        l.cursor = waiter.next
    withdraw(&l.published, waiter.row)
    if waiter.owner.waiters == NULL:
        withdraw_holds(l, waiter.owner)
    waiter.owner.users -= 1
    waiter.file.waiters -= 1
    l.n_waiters -= 1
    handle_put(waiter.want.guest, <uint32_t>waiter.handle)
    add_u64(&waiter.want.guest.n_locks, <uint64_t>-1)
    waiter.parked.waiter = NULL
    waiter.parked.complete(waiter.parked, rc)
    drop_owner(l, waiter.owner)
    drop_file(l, waiter.file)
    free(waiter)


cdef void cancel(parked_t *parked) noexcept nogil:
    cdef locks_t *l = <locks_t *>parked.by
    pthread_mutex_lock(&l.lock)
    if parked.waiter != NULL:
        finish(l, <waiter_t *>parked.waiter, -ENOLCK)
    pthread_mutex_unlock(&l.lock)


cdef bint try_waiter(locks_t *l, waiter_t *waiter) noexcept nogil:
    """True: it goes on waiting."""
    cdef want_t *w = &waiter.want
    cdef int rc = attempt(l, waiter.file, waiter.owner, w)
    if rc == -EAGAIN and not w.flock and not w.by_host and deadlock(l, waiter.file, waiter.owner, w):
        rc = -EDEADLK
    if rc != -EAGAIN:
        finish(l, waiter, rc)
        return False
    return not ends_in_deadlock(l, waiter)


cdef bint ends_in_deadlock(locks_t *l, waiter_t *waiter) noexcept nogil:
    """True: it was part of one with other servers' guests the last time, and is."""
    cdef bint suspect = waiter.suspect
    waiter.suspect = not waiter.want.flock and seen_in_deadlock(l, waiter)
    if suspect and waiter.suspect:
        finish(l, waiter, -EDEADLK)
        return True
    return False


cdef bint as_refused(const waiter_t *last, const waiter_t *waiter) noexcept nogil:
    """Whether the host has just refused `last` as much, or less."""
    cdef const want_t *a = &last.want
    cdef const want_t *b = &waiter.want
    return (last.file == waiter.file and a.flock == b.flock and a.start == b.start and a.end == b.end
            and (a.type == b.type or b.type == h.F_WRLCK))


cdef void try_again(locks_t *l) noexcept nogil:
    """A pass over the waiters: those on files with weaker locks, and those whom the host refused.

    A file where more is given up meanwhile is left to the next pass, which begins with its first waiter.
    """
    cdef uint64_t since = l.tried
    cdef uint64_t until = l.changes
    cdef uint32_t turn = TRIES_A_TURN
    cdef waiter_t *waiter
    cdef waiter_t *last = NULL
    l.tried = until
    l.last_pass = monotonic_ns()
    if l.published.changes != NULL:
        l.seen_changes = word_load(l.published.changes)
    # As long as others wait too, there may be a deadlock with them.
    l.by_host = look_at_others(&l.published) > 0
    l.cursor = l.first
    while l.cursor != NULL:
        waiter = l.cursor
        l.cursor = waiter.next
        if waiter.file.weakened > until or (waiter.file.weakened <= since and not waiter.want.by_host):
            ends_in_deadlock(l, waiter)
            continue
        if last != NULL and as_refused(last, waiter):
            waiter.want.by_host = True
            ends_in_deadlock(l, waiter)
        elif try_waiter(l, waiter) and waiter.want.by_host:
            l.by_host = True
            last = waiter
        turn -= 1
        if turn == 0:
            turn = TRIES_A_TURN
            last = NULL
            pthread_mutex_unlock(&l.lock)
            sched_yield()
            pthread_mutex_lock(&l.lock)


cdef void wake(locks_t *l) noexcept nogil:
    """The waking thread."""
    pthread_mutex_lock(&l.lock)
    while not l.stop:
        if l.tried != l.changes:
            l.retry_ns = RETRY_MIN_NS
            try_again(l)
        elif not l.by_host or l.first == NULL:
            set_waits(&l.published, False)
            pthread_cond_wait(&l.changed, &l.lock)
        elif sleep_until_due(l):
            try_again(l)
    pthread_mutex_unlock(&l.lock)


cdef bint sleep_until_due(locks_t *l) noexcept nogil:
    """For retry_ns, or until another server's guest gives something up. False: something else comes first."""
    cdef uint64_t passed
    if l.published.changes == NULL:
        if not cond_wait_ns(&l.changed, &l.lock, l.retry_ns):
            return False
        l.retry_ns = min(RETRY_MAX_NS, 2 * l.retry_ns)
        return True
    l.asleep = True
    pthread_mutex_unlock(&l.lock)
    word_wait(l.published.changes, l.seen_changes, l.retry_ns)
    pthread_mutex_lock(&l.lock)
    l.asleep = False
    if l.stop or l.tried != l.changes:
        return False
    if word_load(l.published.changes) == l.seen_changes:
        l.retry_ns = min(RETRY_MAX_NS, 2 * l.retry_ns)
        return True
    l.retry_ns = RETRY_MIN_NS
    passed = monotonic_ns() - l.last_pass
    return passed >= PASS_NS or cond_wait_ns(&l.changed, &l.lock, PASS_NS - passed)


# --- what others call ---

cdef int set_locked(locks_t *l, want_t *w, bint waits, parked_t *parked) noexcept nogil:
    cdef bint make = w.type != h.F_UNLCK
    cdef file_t *file = file_of(l, w, make)
    cdef owner_t *owner = owner_of(l, w, make)
    cdef int rc
    if file == NULL or owner == NULL:
        rc = -ENOLCK if make else 0
    else:
        rc = attempt(l, file, owner, w)
        if rc == -EAGAIN and waits:
            if not w.flock and not w.by_host and deadlock(l, file, owner, w):
                rc = -EDEADLK
            else:
                rc = WOULD_WAIT if parked == NULL else enqueue(l, file, owner, w, parked)
    if file != NULL:
        drop_file(l, file)
    if owner != NULL:
        drop_owner(l, owner)
    return rc


cdef int lock_set(want_t *w, bint waits, parked_t *parked) noexcept nogil:
    cdef locks_t *l = <locks_t *>w.guest.locks
    cdef int rc = identify(w)
    if rc < 0:
        return rc
    # Before the handle is looked at once more: who releases it sees one or the other.
    add_u64(&w.guest.n_locks, 1)
    pthread_mutex_lock(&l.lock)
    rc = set_locked(l, w, waits, parked)
    pthread_mutex_unlock(&l.lock)
    add_u64(&w.guest.n_locks, <uint64_t>-1)
    return rc


cdef int test_host(const hold_t *hold, want_t *w) noexcept nogil:
    """As a lock owner of its own, or its locks would stand against it."""
    cdef h.flock_t fl
    as_host(w, &fl)
    if h.fcntl(w.fd if hold == NULL else hold.fd, h.F_OFD_GETLK, &fl) < 0:
        return -errno
    w.type = fl.l_type
    if fl.l_type != h.F_UNLCK:
        w.start = fl.l_start
        w.end = OFFSET_MAX if fl.l_len == 0 else <uint64_t>(fl.l_start + fl.l_len - 1)
        w.pid = NO_PID
    return 0


cdef int lock_test(want_t *w) noexcept nogil:
    cdef locks_t *l = <locks_t *>w.guest.locks
    cdef file_t *file
    cdef owner_t *owner
    cdef hold_t *by = NULL
    cdef range_t *part = NULL
    cdef int rc = identify(w)
    if rc < 0:
        return rc
    pthread_mutex_lock(&l.lock)
    file = file_of(l, w, False)
    owner = owner_of(l, w, False)
    if file != NULL:
        part = conflict(file, owner, w, &by)
    if part != NULL:
        w.type = part.type
        w.start = part.start
        w.end = part.end
        w.pid = part.pid if by.owner.guest == w.guest else NO_PID
    else:
        rc = test_host(hold_of(file, owner), w)
    pthread_mutex_unlock(&l.lock)
    return rc


cdef void end_waits(locks_t *l, tables_t *guest, uint64_t fh, const owner_t *owner, int rc) noexcept nogil:
    """Of a guest; fh 0: through every handle; owner NULL: of all.

    rc is not -EINTR: without a signal Linux would hand ERESTARTSYS to the program (fuse_setlk).
    """
    cdef waiter_t *waiter = l.first
    cdef waiter_t *next_waiter
    while waiter != NULL:
        next_waiter = waiter.next
        if (waiter.want.guest == guest and (fh == 0 or waiter.want.fh == fh)
                and (owner == NULL or waiter.owner == owner)):
            finish(l, waiter, rc)
        waiter = next_waiter


cdef void locks_flush(tables_t *guest, uint64_t fh, int fd, uint64_t owner_number) noexcept nogil:
    cdef locks_t *l = <locks_t *>guest.locks
    cdef want_t w
    cdef file_t *file
    cdef owner_t *owner
    cdef hold_t *hold
    if load_acquire_u64(&guest.n_locks) == 0:
        return
    memset(&w, 0, sizeof(w))
    w.guest = guest
    w.number = owner_number
    w.fd = fd
    if identify(&w) < 0:
        return
    pthread_mutex_lock(&l.lock)
    owner = owner_of(l, &w, False)
    if owner != NULL:
        owner.users += 1
        end_waits(l, guest, fh, owner, -EBADF)  # as fcntl(2) when a close has won
        file = file_of(l, &w, False)
        hold = hold_of(file, owner)
        if hold != NULL:
            drop_hold(l, hold)
            drop_file(l, file)
        owner.users -= 1
        drop_owner(l, owner)
    pthread_mutex_unlock(&l.lock)


cdef void locks_interrupt(tables_t *guest, uint64_t unique) noexcept nogil:
    cdef locks_t *l = <locks_t *>guest.locks
    cdef waiter_t *waiter
    if load_acquire_u64(&guest.n_locks) == 0:
        return
    pthread_mutex_lock(&l.lock)
    waiter = l.first
    while waiter != NULL and (waiter.want.guest != guest or waiter.want.unique != unique):
        waiter = waiter.next
    if waiter != NULL:
        finish(l, waiter, -EINTR)
    pthread_mutex_unlock(&l.lock)


cdef void locks_release(tables_t *guest, uint64_t fh, int fd) noexcept nogil:
    """The flock goes, and so do open file description locks: their owner is the guest's open file.

    Of those Linux tells nothing else (locks_remove_file looks for locks of its own). A process's locks
    were given up when it closed the file, before this.
    """
    cdef locks_t *l = <locks_t *>guest.locks
    cdef want_t w
    cdef file_t *file = NULL
    cdef owner_t *owner
    if load_acquire_u64(&guest.n_locks) == 0:
        return
    memset(&w, 0, sizeof(w))
    w.guest = guest
    w.number = fh
    w.flock = True
    w.fd = fd
    if fd >= 0 and identify(&w) < 0:
        fd = -1
    pthread_mutex_lock(&l.lock)
    end_waits(l, guest, fh, NULL, -EBADF)
    owner = owner_of(l, &w, False)
    if owner != NULL:
        file = owner.holds.file
        drop_hold(l, owner.holds)
        drop_owner(l, owner)
    elif fd >= 0:
        file = file_of(l, &w, False)
    if file != NULL:
        drop_holds(l, file, guest, fh)
    elif fd < 0:
        drop_all(l, guest, fh)
    pthread_mutex_unlock(&l.lock)


cdef void locks_drop(tables_t *guest) noexcept nogil:
    cdef locks_t *l = <locks_t *>guest.locks
    if load_acquire_u64(&guest.n_locks) == 0:
        return
    pthread_mutex_lock(&l.lock)
    end_waits(l, guest, 0, NULL, -ENOLCK)
    drop_all(l, guest, 0)
    pthread_mutex_unlock(&l.lock)


cdef void drop_all(locks_t *l, const tables_t *guest, uint64_t fh) noexcept nogil:
    """drop_holds of every file."""
    cdef file_t *file
    cdef file_t *next_file
    cdef int i
    for i in range(BUCKETS):
        file = l.files[i]
        while file != NULL:
            next_file = file.next
            drop_holds(l, file, guest, fh)
            file = next_file


cdef void drop_holds(locks_t *l, file_t *file, const tables_t *guest, uint64_t fh) noexcept nogil:
    """What a guest holds on a file, and the file if that was all; fh not 0: only through that handle."""
    cdef hold_t *hold = file.holds
    cdef hold_t *next_hold
    cdef owner_t *owner
    while hold != NULL:
        next_hold = hold.next
        owner = hold.owner
        if owner.guest == guest and (fh == 0 or hold.through == fh):
            drop_hold(l, hold)
            drop_owner(l, owner)
        hold = next_hold
    drop_file(l, file)


@cython.final
cdef class Locks:
    """The locks of one share's guests, and the thread that wakes those who wait."""

    def __cinit__(self):
        self.segment = Segment()
        pthread_mutex_init(&self.l.lock, NULL)
        cond_init_monotonic(&self.l.changed)

    def __dealloc__(self):
        pthread_cond_destroy(&self.l.changed)
        pthread_mutex_destroy(&self.l.lock)

    def join(self, int partition):
        """In a server, before there are guests: share with those of the other partitions. OSError."""
        if partition >= 0:
            (<Segment>self.segment).join(&self.l.published, <uint32_t>partition)

    def recover(self):
        """Nothing of what a server has told others, which has died, is so any more."""
        forget_published(&self.l.published)

    def start(self):
        """Start the thread, unless it runs."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="locks", daemon=True)
            self.thread.start()

    def _run(self):
        with nogil:
            wake(&self.l)

    def close(self):
        """End the thread. No guest may hold or wait for anything. Idempotent."""
        with nogil:
            pthread_mutex_lock(&self.l.lock)
            self.l.stop = True
            wake_waker(&self.l)
            pthread_mutex_unlock(&self.l.lock)
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def counts(self):
        """Now: waiters; holds, each one owner's locks on one file."""
        cdef uint64_t waiters, holds
        with nogil:
            pthread_mutex_lock(&self.l.lock)
            waiters = self.l.n_waiters
            holds = self.l.n_holds
            pthread_mutex_unlock(&self.l.lock)
        return {"waiters": waiters, "holds": holds}
