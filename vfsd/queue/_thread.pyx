"""The threads of one virtqueue: wait, pop, dispatch, push, call (docs/architecture.md, "One request, end to end")."""

from libc.errno cimport EFAULT, EIO
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd cimport _ring as ring
from vfsd.queue._bounce cimport serve_bounced
from vfsd.queue._coalescing cimport coalesce, note_caller, nothing_pending
from vfsd.queue._jobs cimport make_job, run_job
from vfsd.memory._regions cimport POPULATE_MIN, memory_drop, memory_keep, memory_populate, memory_t
from vfsd.queue._notify cimport notify_error, notify_wait, notify_wake
from vfsd.queue._parked cimport complete_ready, park
from vfsd.queue._polling cimport adapt, look_for_more
from vfsd.queue._pool cimport pool_borrow, pool_return, pool_submit
from vfsd.queue._replies cimport (
    NOT_ON_RING, begin_on_ring, call_guest, call_if_wanted, complete_request, complete_unanswered, end_on_ring, push,
)
from vfsd._ring cimport CHAIN_TORN, chain_t
from vfsd.state._journal cimport (
    FAIL_TAKEN, ONE_TRY, STAGE_DONE, STAGE_MASK, STAGE_TAKEN, TRIES_MASK, journal_take, reach, record_t,
)
from vfsd.sys._clock cimport clock_ns
from vfsd.sys._threads cimport pthread_cond_broadcast, pthread_mutex_lock, pthread_mutex_unlock
from vfsd.queue._state cimport BATCH, REQUEST_MAX, closing, job_t, queue_t, worker_t
from vfsd.queue._watcher cimport is_slow, run_timed, watch_begins, watch_caught, watch_returned
from vfsd.fuse.dispatch cimport (
    WAIT, WOULD_BLOCK, WOULD_WAIT, file_system_of, request_blocks, request_parse, request_run, request_t, span_t,
)

import logging

from vfsd._ring import CHAIN_ERRORS
from vfsd.fuse.opcodes import NAME as OPCODE_NAME

__all__ = ()

log = logging.getLogger("vfsd.queue")

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    int load_relaxed_int(const int *p)
    void store_relaxed_int(int *p, int v)
    void light_fence()
    uint16_t load_relaxed_u16(const uint16_t *p)
    void store_release_u64(uint64_t *p, uint64_t v)
    uint64_t load_relaxed_u64(const uint64_t *p)
    void count_u64(uint64_t *p, uint64_t v)

cdef extern from "_syscalls.h" nogil:
    void heavy_fence()

cdef enum:
    CALL_EVERY = 1 << 19  # bytes in the middle of a batch: the guest has work while the rest is copied

# Who has the ring after a chain.
cdef enum served_t:
    KEPT   # this thread
    LENT   # the queue's other one
    TAKEN  # another, since the request kept this one for long

# --- one request ---

cdef served_t serve_chain(queue_t *q, worker_t *w, chain_t *chain, bint last, bint again) noexcept nogil:
    """One request from parse to used element, or to the pool. again: a server that has died may have done it."""
    cdef request_t r
    cdef span_t readable, writable
    cdef job_t *job
    cdef bint foreseen
    cdef int rc
    if chain.may_shrink:
        q.coalescing.others_wait = True
        serve_bounced(q, chain)
        return KEPT
    readable.iov = chain.readable
    readable.n = chain.n_readable
    readable.bytes = chain.readable_bytes
    writable.iov = chain.writable
    writable.n = chain.n_writable
    writable.bytes = chain.writable_bytes
    if not request_parse(q.dispatch, readable, writable, &r):
        q.coalescing.others_wait = True
        complete_unanswered(q, chain.head)
        return KEPT
    r.record = &q.journal.records[chain.head]
    r.again = again
    if again and r.record.stage & TRIES_MASK > ONE_TRY:
        r.error = -EIO  # two servers have died of it
        report_fatal(r.header.opcode)
    else:
        reach(q.dispatch.failpoint, FAIL_TAKEN, r.header.opcode)
    note_caller(&q.coalescing, &r)
    if chain.unmapped:
        r.error = -EFAULT
    rc = WOULD_BLOCK
    foreseen = is_slow(q, &r)
    if not foreseen and not request_blocks(q.dispatch, &r):
        if not r.error and POPULATE_MIN <= chain.writable_bytes <= REQUEST_MAX:
            memory_populate(q.ring.memory, chain.writable, chain.n_writable)
        rc = run_in_place(q, w, &r)
        if load_relaxed_int(&w.taken) and ring_is_lost(q, w):
            complete_late(q, w, chain, &r, rc)
            return TAKEN
    if rc == WOULD_BLOCK:
        job = make_job(q, chain, &r, foreseen)
        if job != NULL:
            if last and lend(q):
                run_job(&job.task)
                return LENT
            if not pool_submit(q.pool, &job.task):
                return run_job_in_place(q, w, job)
            return KEPT
        call_if_wanted(q)
        r.mode = WAIT
        rc = run_in_place(q, w, &r)
        if load_relaxed_int(&w.taken) and ring_is_lost(q, w):
            complete_late(q, w, chain, &r, rc)
            return TAKEN
    if rc == WOULD_WAIT:
        park(q, q.ring.memory, chain, &r)
    else:
        complete_request(q, &r, chain.head, chain.readable_bytes, rc)
    return KEPT


cdef served_t serve_again(queue_t *q, worker_t *w) noexcept nogil:
    """A request that a server had taken which has died."""
    cdef uint16_t head = q.again[q.at_again]
    cdef record_t *record = &q.journal.records[head]
    cdef chain_t *chain = &w.chains[0]
    cdef int how, rc
    q.at_again += 1
    if record.stage & STAGE_MASK == STAGE_DONE:
        how = begin_on_ring(q)
        if how != NOT_ON_RING:
            push(q, head, <uint32_t>(record.stage >> 32), 0)
            end_on_ring(q, how)
        return KEPT
    rc = ring.ring_chain_of(&q.ring, chain, head)
    if rc < 0:
        break_ring(q, rc)
        return KEPT
    store_release_u64(&record.stage, STAGE_TAKEN | ((record.stage & TRIES_MASK) + ONE_TRY))
    return serve_chain(q, w, chain, False, True)


cdef inline int run_in_place(queue_t *q, worker_t *w, request_t *r) noexcept nogil:
    """Run it in the thread that has the ring, which may be taken from it meanwhile."""
    cdef int measure, rc
    w.nodeid = r.header.nodeid
    store_release_int(&w.in_request, 1)
    measure = load_relaxed_int(&w.measure)
    if measure:
        store_relaxed_int(&w.measure, measure - 1)
        rc = run_timed(q, r)
    else:
        rc = request_run(q.dispatch, r)
    store_release_int(&w.in_request, 0)
    light_fence()  # the other side: take_ring()
    return rc


cdef bint ring_is_lost(queue_t *q, worker_t *w) noexcept nogil:
    cdef bint lost
    pthread_mutex_lock(&q.gate)
    lost = q.holder != w
    store_relaxed_int(&w.taken, 0)
    pthread_mutex_unlock(&q.gate)
    return lost


cdef void complete_late(queue_t *q, worker_t *w, chain_t *chain, request_t *r, int rc) noexcept nogil:
    """A request has kept its thread for so long that the ring is another's: go on as a job would."""
    if rc == WOULD_BLOCK:
        r.mode = WAIT
        rc = request_run(q.dispatch, r)
    if rc == WOULD_WAIT:
        park(q, w.memory, chain, r)
    else:
        complete_request(q, r, chain.head, chain.readable_bytes, rc)
    call_if_wanted(q)
    end_late(q, w)


cdef void end_late(queue_t *q, worker_t *w) noexcept nogil:
    """Give back what take_ring() has left to the thread."""
    watch_returned(q.watch, w.caught_on)
    memory_drop(w.memory)
    w.memory = NULL
    pthread_mutex_lock(&q.gate)
    store_release_int(&q.jobs_live, q.jobs_live - 1)
    if q.jobs_live == 0:
        pthread_cond_broadcast(&q.gate_changed)
    pthread_mutex_unlock(&q.gate)


cdef served_t run_job_in_place(queue_t *q, worker_t *w, job_t *job) noexcept nogil:
    """A job for which the pool has no thread, nor can have one."""
    call_if_wanted(q)
    w.nodeid = job.request.header.nodeid
    store_release_int(&w.in_request, 1)
    run_job(&job.task)
    store_release_int(&w.in_request, 0)
    light_fence()  # the other side: take_ring()
    if load_relaxed_int(&w.taken) and ring_is_lost(q, w):
        end_late(q, w)
        return TAKEN
    return KEPT


cdef bint take_ring(queue_t *q) noexcept nogil:
    """By the watcher: have another thread go on behind the request that was under way at its last look.

    False: it is under way no more.
    """
    cdef worker_t *w
    cdef bint caught = False, sleeps
    pthread_mutex_lock(&q.gate)
    w = q.holder
    sleeps = q.sleepers > 0
    if w != NULL and not q.stop:
        store_relaxed_int(&w.taken, 1)
        heavy_fence()
        caught = load_acquire_int(&w.in_request) and load_relaxed_u16(&q.journal.next_avail) == q.seen_avail
        if caught:
            w.memory = memory_keep(q.ring.memory)
            w.caught_on = <int>file_system_of(q.dispatch, w.nodeid)
            watch_caught(q.watch, w.caught_on)
            q.ring.last_avail = q.seen_avail
            store_release_int(&q.jobs_live, q.jobs_live + 1)
            q.holder = NULL
            q.missed = False
            q.call_due = True
        else:
            store_relaxed_int(&w.taken, 0)
    pthread_mutex_unlock(&q.gate)
    if caught and not (sleeps or add_standby(q)):
        # Whoever is caught goes on when its request returns.
        return True
    if caught:
        notify_wake(q.notify)
    return caught


cdef bint lend(queue_t *q) noexcept nogil:
    """Leave the ring to this queue's other thread, to wait oneself. False: it is not asleep, or there is more.

    A kick wakes it; so a request that comes alone costs no hop to the pool, and one that comes
    after it does not wait.
    """
    cdef bint sleeps, alone
    pthread_mutex_lock(&q.gate)
    sleeps = q.sleepers > 0
    alone = q.threads == 1
    pthread_mutex_unlock(&q.gate)
    if not sleeps and not (alone and add_standby(q)):
        return False
    call_if_wanted(q)
    if ask_for_kicks(q):
        refuse_kicks(q)
        return False
    leave(q)
    return True


cdef bint add_standby(queue_t *q) noexcept nogil:
    """False: there are as many threads as may be, or none can be had."""
    cdef bint may
    pthread_mutex_lock(&q.gate)
    may = q.threads < OWN_THREADS or pool_borrow(q.pool)
    if may:
        q.threads += 1
    pthread_mutex_unlock(&q.gate)
    return may and q.start_thread(q)


cdef void count_ended(queue_t *q) noexcept nogil:
    """A thread of the queue's is no more, or has not come to be."""
    pthread_mutex_lock(&q.gate)
    q.threads -= 1
    if q.threads >= OWN_THREADS:
        pool_return(q.pool)
    pthread_cond_broadcast(&q.gate_changed)
    pthread_mutex_unlock(&q.gate)


# --- the queue thread's loop ---

cdef void refuse_kicks(queue_t *q) noexcept nogil:
    cdef int how = begin_on_ring(q)
    if how != NOT_ON_RING:
        ring.ring_disable_kick(&q.ring)
        end_on_ring(q, how)


cdef bint ask_for_kicks(queue_t *q) noexcept nogil:
    """Whether there is more already."""
    cdef int how = begin_on_ring(q)
    cdef bint more
    if how == NOT_ON_RING:
        return False
    more = ring.ring_enable_kick(&q.ring)
    end_on_ring(q, how)
    return more


cdef served_t work(queue_t *q, worker_t *w) noexcept nogil:
    """Answer all that is on the ring, then ask for a kick. Ends early when the ring is to stop."""
    cdef uint64_t moved
    cdef uint16_t first
    cdef int n, i
    cdef served_t served
    if load_acquire_int(&q.any_ready):
        complete_ready(q)
    if q.broken:
        return KEPT
    if q.call_due:
        q.call_due = False
        call_if_wanted(q)
    if q.must_call:
        q.must_call = False
        call_guest(q)
    if load_acquire_int(&q.notify.call_owed):
        call_guest(q)
    nothing_pending(&q.coalescing)
    refuse_kicks(q)
    while q.at_again < q.n_again and not closing(q):
        served = serve_again(q, w)
        if served != KEPT or q.broken:
            return served
    while not closing(q):
        first = q.ring.last_avail
        n = ring.ring_pop_batch(&q.ring, w.chains, BATCH)
        # Looked for after avail.idx: what the guest has put on the ring since may lie in the new memory.
        if load_acquire_int(&q.any_new_memory):
            q.ring.last_avail = first
            use_new_memory(q)
            continue
        moved = 0
        for i in range(n):
            if closing(q):
                break
            journal_take(q.journal, w.chains[i].head, <uint16_t>(first + i + 1))
            if load_acquire_int(&q.ring.memory.watched_by.torn):
                break_ring(q, CHAIN_TORN)
                return KEPT
            served = serve_chain(q, w, &w.chains[i], i == n - 1, False)
            if served != KEPT:
                return served
            moved += w.chains[i].readable_bytes + w.chains[i].writable_bytes
            if moved >= CALL_EVERY and i < n - 1:
                call_if_wanted(q)
                moved = 0
        if load_acquire_int(&q.any_ready):
            complete_ready(q)
        if n > 0 and coalesce(q, n, moved):
            continue
        call_if_wanted(q)
        if n < 0:
            break_ring(q, n)
            return KEPT
        if n == 0 and not look_for_more(q) and not closing(q):
            if not ask_for_kicks(q):
                return KEPT
            refuse_kicks(q)
    call_if_wanted(q)
    return KEPT


cdef void use_new_memory(queue_t *q) noexcept nogil:
    """By the thread that has the ring, between two batches."""
    pthread_mutex_lock(&q.gate)
    move_ring(q)
    pthread_mutex_unlock(&q.gate)


cdef void move_ring(queue_t *q) noexcept nogil:
    """Under the gate, when nobody works on what was popped but jobs, which keep their memory."""
    cdef memory_t *last = q.ring.memory
    if q.new_memory == NULL:
        return
    pthread_mutex_lock(&q.used_lock)
    ring.ring_use_memory(&q.ring, q.new_memory)
    pthread_mutex_unlock(&q.used_lock)
    q.new_memory = NULL
    store_release_int(&q.any_new_memory, 0)
    memory_drop(last)


cdef void break_ring(queue_t *q, int code) noexcept nogil:
    """The guest broke this ring: nothing more is taken from it until it is started anew."""
    q.broken = code
    count_u64(&q.counters.ring_errors[-code], 1)
    notify_error(q.notify)
    report_broken(q, code)


cdef void report_fatal(uint32_t opcode) noexcept with gil:
    log.error("a request of which two servers have died is answered with an I/O error: %s",
              OPCODE_NAME.get(opcode, opcode))


cdef void report_broken(queue_t *q, int code) noexcept with gil:
    log.warning("a guest broke a ring, the queue is stopped: %s", CHAIN_ERRORS[code])


cdef int enter(queue_t *q, worker_t *w) noexcept nogil:
    """Through the gate: 1 the ring is this thread's, 0 another has it, -1 the end."""
    cdef int rc = 1
    pthread_mutex_lock(&q.gate)
    if q.stop:
        rc = -1
    elif q.holder != NULL:
        rc = 0
        q.missed = True
        q.sleepers += 1
    else:
        q.holder = w
        q.ring.iov = w.iov
    pthread_mutex_unlock(&q.gate)
    return rc


cdef void leave(queue_t *q) noexcept nogil:
    """Back out.

    A kick after the last look at the ring may have woken the other thread while this one still had it.
    """
    cdef bint missed
    pthread_mutex_lock(&q.gate)
    q.holder = NULL
    missed = q.missed
    q.missed = False
    pthread_mutex_unlock(&q.gate)
    if missed:
        notify_wake(q.notify)


cdef void count_sleepers(queue_t *q, int n) noexcept nogil:
    pthread_mutex_lock(&q.gate)
    q.sleepers += n
    pthread_mutex_unlock(&q.gate)


cdef bint to_spare(queue_t *q) noexcept nogil:
    """Whether there are more threads than one to serve the ring, and one to sleep."""
    cdef bint more
    pthread_mutex_lock(&q.gate)
    more = q.sleepers > 0 and q.threads > 2
    pthread_mutex_unlock(&q.gate)
    return more


cdef void serve(queue_t *q, worker_t *w) noexcept nogil:
    cdef bint slept = False
    cdef served_t served
    cdef int rc = enter(q, w)
    while rc >= 0:
        if rc > 0:
            watch_begins(q.watch)
            if slept:
                adapt(q, clock_ns())
            slept = False
            served = work(q, w)
            if served == TAKEN and to_spare(q):
                break
            if served != KEPT:
                rc = enter(q, w)
                continue
            q.polling.idle_since = clock_ns()
            leave(q)
            count_sleepers(q, 1)
        notify_wait(q.notify)
        count_sleepers(q, -1)
        slept = True
        rc = enter(q, w)
    notify_wake(q.notify)  # an event wakes one thread: the next one's
