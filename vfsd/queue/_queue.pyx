"""One virtqueue and its thread (docs/architecture.md, "One request, end to end")."""

cimport cython
from libc.errno cimport EFAULT, EIO, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vfsd cimport _ring as ring
from vfsd.queue._bounce cimport bounce_free, serve_bounced
from vfsd.queue._coalescing cimport coalesce, note_caller, nothing_pending
from vfsd.queue._jobs cimport jobs_free, jobs_init, make_job, run_job
from vfsd.memory._regions cimport (
    POPULATE_MIN, GuestMemory, iovec, memory_drop, memory_keep, memory_populate, memory_t,
)
from vfsd.queue._notify cimport (
    CALL_CHANNEL, CALL_EVENTFD, CALL_EVENTFD_BLOCKING, CALL_MESSAGE_MAX, CALL_NONE, CALL_SOCKET, notify_error,
    notify_free, notify_init, notify_set_call, notify_set_err, notify_set_kick, notify_t, notify_wait,
    notify_wake,
)
from vfsd.queue._parked cimport cancel_parked, complete_ready, park, parks_free, parks_init
from vfsd.queue._polling cimport adapt, look_for_more
from vfsd.queue._pool cimport Pool, pool_borrow, pool_return, pool_spread, pool_submit
from vfsd.queue._replies cimport (
    NOT_ON_RING, begin_on_ring, call_guest, call_if_wanted, complete_request, complete_unanswered, end_on_ring, push,
)
from vfsd._ring cimport CHAIN_TORN, chain_t, ring_t
from vfsd.state._journal cimport (
    FAIL_TAKEN, STAGE_DONE, STAGE_MASK, STAGE_TAKEN, TRIES_MASK, ONE_TRY, State, journal_begin, journal_recover, journal_take, reach, record_t,
)
from vfsd.sys._clock cimport clock_ns
from vfsd.sys._threads cimport (
    cond_init_monotonic, cond_wait_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, sched_yield,
)
from vfsd.queue._state cimport (
    BATCH, REQUEST_MAX, closing, counters_t, job_t, op_count_t, queue_t, worker_t,
)
from vfsd.queue._watcher cimport (
    Watcher, is_slow, run_timed, watch_add, watch_begins, watch_caught, watch_remove, watch_returned,
)
from vfsd.fuse.dispatch cimport (
    OPCODES_MAX, WAIT, WOULD_BLOCK, WOULD_WAIT, Dispatch, file_system_of, request_blocks, request_parse, request_run,
    request_t, span_t,
)

import logging
import os
import stat
import threading

from vfsd._ring import CHAIN_ERRORS
from vfsd.fuse.opcodes import NAME as OPCODE_NAME

__all__ = ("Queue",)

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
    OWN_THREADS = 2  # of a queue: one serves the ring and one stands by; further ones count as the pool's
    IOV_SLACK = 1024  # iovecs beyond one per element: a batch, and elements that cross regions

# Who has the ring after a chain.
cdef enum served_t:
    KEPT   # this thread
    LENT   # the queue's other one
    TAKEN  # another, since the request kept this one for long

COUNTS = ("requests", "errors", "bytes_in", "bytes_out")

# Runs whose threads or jobs are caught in a request: here until they return.
cdef list abandoned_runs = []


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
    return may and start_standby(q)


cdef void count_ended(queue_t *q) noexcept nogil:
    """A thread of the queue's is no more, or has not come to be."""
    pthread_mutex_lock(&q.gate)
    q.threads -= 1
    if q.threads >= OWN_THREADS:
        pool_return(q.pool)
    pthread_cond_broadcast(&q.gate_changed)
    pthread_mutex_unlock(&q.gate)


cdef bint start_standby(queue_t *q) noexcept with gil:
    try:
        (<Run>q.owner).add_thread()
    except (RuntimeError, MemoryError) as problem:
        log.warning("no second thread for a queue: %s", problem)
        return False
    return True


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


# --- the control thread ---

cdef class Queue


@cython.final
cdef class Run:
    """A queue from one start of its ring to the stop, with all that its threads work with.

    What is caught in a request when the ring has to stop keeps the run, and so the memory that the request
    refers to. It never touches the ring again, nor a later run of the same queue.
    """

    cdef queue_t q
    cdef Queue queue
    cdef int made  # threads so far

    def __cinit__(self, Queue queue not None):
        self.queue = queue
        self.q.owner = <void *>self
        self.q.dispatch = &queue.dispatch.table
        self.q.pool = &queue.pool.p
        self.q.notify = &queue.notify
        self.q.counters = &queue.counted
        self.q.watch = &queue.watcher.w
        self.q.take_ring = take_ring
        self.q.polling.max_ns = self.q.polling.ns = queue.poll_ns
        self.q.polling.gathers = queue.gathers
        self.q.bounce_fd = -1
        self.q.journal = queue.state.journal(queue.index)
        pthread_mutex_init(&self.q.gate, NULL)
        pthread_mutex_init(&self.q.park_lock, NULL)
        pthread_mutex_init(&self.q.used_lock, NULL)
        cond_init_monotonic(&self.q.gate_changed)

    def __dealloc__(self):
        bounce_free(&self.q)
        free(self.q.again)
        jobs_free(&self.q)
        parks_free(&self.q)
        memory_drop(self.q.ring.memory)
        memory_drop(self.q.new_memory)
        pthread_mutex_destroy(&self.q.park_lock)
        pthread_mutex_destroy(&self.q.used_lock)
        pthread_cond_destroy(&self.q.gate_changed)
        pthread_mutex_destroy(&self.q.gate)

    cdef int set_up(self, memory_t *memory, uint32_t num, uint64_t desc, uint64_t avail, uint64_t used,
                    uint16_t base, bint event_idx) except -1:
        cdef uint32_t iov_max = num + IOV_SLACK
        cdef bint taken_over = self.queue.takes_over()
        if taken_over:
            base = self.q.journal.next_avail
        self.q.iov_max = iov_max
        if not jobs_init(&self.q, num, iov_max) or not parks_init(&self.q, num):
            raise MemoryError
        if ring.ring_init(&self.q.ring, memory, num, desc, avail, used, base, event_idx, NULL, iov_max) < 0:
            raise ValueError(
                f"ring of {num} at descriptors {desc:#x}, avail {avail:#x}, used {used:#x}"
                " is no power of two, unaligned or outside memory")
        memory_keep(memory)
        if taken_over:
            self.take_over()
        else:
            journal_begin(self.q.journal, num, base)
        self.q.threads = 1
        self.add_thread()
        if not self.q.polling.gathers:  # without it a queue works too, and what is gathered nobody waits for
            self.queue.watcher.start()
        with nogil:  # the watcher may need the GIL for a thread
            watch_add(self.q.watch, &self.q)
        return 0

    cdef int take_over(self) except -1:
        """A server has died that served this ring."""
        cdef ring_t *r = &self.q.ring
        self.q.again = <uint16_t *>calloc(r.num, sizeof(uint16_t))
        if self.q.again == NULL:
            raise MemoryError
        self.q.n_again = journal_recover(self.q.journal, r.num, r.used_idx, r.avail, self.queue.state.crashed, self.q.again)
        r.last_avail = r.avail_idx = self.q.journal.next_avail
        self.q.call_due = self.q.must_call = True
        return 0

    cdef int add_thread(self) except -1:
        """Of those counted in `threads`. RuntimeError: none can be had."""
        try:
            self.made += 1
            threading.Thread(target=self._run, name=self.queue.name, daemon=True).start()
        except BaseException:
            count_ended(&self.q)
            raise
        return 0

    def _run(self):
        """The thread's body."""
        cdef worker_t *w = <worker_t *>calloc(1, sizeof(worker_t))
        if w != NULL:
            w.iov = <iovec *>calloc(self.q.iov_max, sizeof(iovec))
        if w == NULL or w.iov == NULL:
            log.error("%s: no memory for a thread", self.queue.name)
        else:
            with nogil:
                serve(&self.q, w)
        if w != NULL:
            free(w.iov)
        free(w)
        count_ended(&self.q)

    cdef int use_memory(self, memory_t *memory) except -1:
        """ValueError: a part of the ring is not in it."""
        cdef memory_t *unused
        if ring.ring_lies_in(&self.q.ring, memory) < 0:
            raise ValueError("its ring is in no memory region")
        pthread_mutex_lock(&self.q.gate)
        unused = self.q.new_memory
        self.q.new_memory = memory_keep(memory)
        store_release_int(&self.q.any_new_memory, 1)
        if self.q.holder == NULL:
            move_ring(&self.q)
        pthread_mutex_unlock(&self.q.gate)
        memory_drop(unused)
        return 0

    cdef void begin_stop(self) noexcept:
        pthread_mutex_lock(&self.q.gate)
        store_release_int(&self.q.stop, 1)
        pthread_mutex_unlock(&self.q.gate)
        notify_wake(self.q.notify)

    cdef bint is_idle(self) noexcept nogil:
        """Under the gate."""
        return self.q.threads == 0 and self.q.jobs_live == 0

    cdef bint finish_stop(self, uint64_t deadline) noexcept:
        """False: something is still caught in a request at the deadline, and the ring is abandoned."""
        cdef uint64_t now
        cdef bint idle
        with nogil:
            watch_remove(self.q.watch, &self.q)
            pthread_mutex_lock(&self.q.gate)
            while not self.is_idle():
                now = clock_ns()
                if now >= deadline:
                    break
                cond_wait_ns(&self.q.gate_changed, &self.q.gate, deadline - now)
            idle = self.is_idle()
            pthread_mutex_unlock(&self.q.gate)
            if not idle:
                self.abandon()
            cancel_parked(&self.q)
        return idle

    cdef void abandon(self) noexcept nogil:
        """Return when nobody writes to the ring, nor will."""
        store_release_int(&self.q.abandoned, 1)
        heavy_fence()
        while load_acquire_int(&self.q.on_ring):
            sched_yield()
        pthread_mutex_lock(&self.q.used_lock)
        pthread_mutex_unlock(&self.q.used_lock)


cdef void forget_ended_runs() noexcept:
    cdef Run run
    for run in list(abandoned_runs):
        pthread_mutex_lock(&run.q.gate)
        ended = run.is_idle()
        pthread_mutex_unlock(&run.q.gate)
        if ended:
            abandoned_runs.remove(run)


cdef bint is_socket(int fd) except -1:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


@cython.final
cdef class Queue:
    """One virtqueue of one connection and the thread that serves it, or two that take turns.

    All methods are for the control thread, and none but stop() and close() waits for requests. Descriptors
    handed over are the queue's own from then on. index: 0 is hiprio. dispatch: where requests go. pool: runs
    what may block. watcher: gives the ring to another thread when a request
    keeps the one that has it. poll_us: the most to poll before sleeping. gathers: nobody waits for its requests, they
    are taken some at a time. state: where its requests are recorded for the next server.
    """

    cdef readonly int index
    cdef readonly str name
    cdef readonly int num     # elements of the ring
    cdef Dispatch dispatch
    cdef Pool pool
    cdef Watcher watcher
    cdef State state
    cdef bint may_take_over   # from a server that has died: at the first start
    cdef uint64_t poll_ns
    cdef bint gathers
    cdef notify_t notify      # for as long as any run may use it
    cdef counters_t counted
    cdef Run run              # None: not started

    def __cinit__(self, int index, str name, Dispatch dispatch not None, Pool pool not None,
                  Watcher watcher not None, int poll_us=0, bint gathers=False, State state=None):
        self.index = index
        self.name = name
        self.dispatch = dispatch
        self.pool = pool
        dispatch.table.spread = pool_spread
        dispatch.table.threads = &pool.p
        self.watcher = watcher
        self.state = State(index + 1) if state is None else state
        dispatch.table.failpoint = self.state.failpoint
        self.may_take_over = self.state.generation > 0
        self.poll_ns = 1000 * poll_us
        self.gathers = gathers
        if not notify_init(&self.notify):
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        notify_free(&self.notify)

    cdef bint takes_over(self):
        """Whether a start goes on with a ring that another server has served."""
        cdef bint first = self.may_take_over
        self.may_take_over = False
        return first and self.state.journal(self.index).live

    @property
    def started(self):
        """Whether it has a ring."""
        return self.run is not None

    @property
    def abandoned(self):
        """Whether a request of an earlier start has still not returned."""
        cdef Run run
        forget_ended_runs()
        for run in abandoned_runs:
            if run.queue is self:
                return True
        return False

    @property
    def broken(self):
        """0, or the ring code (negative) that stopped this queue until it is started anew."""
        return self.run.q.broken if self.run is not None else 0

    def start(self, GuestMemory memory not None, uint32_t num, uint64_t desc, uint64_t avail,
              uint64_t used, uint16_t base, bint event_idx):
        """Set the ring up (user addresses) and start the thread; it looks at the ring at once.

        ValueError: a size that is no power of two, or a part of the ring outside memory. RuntimeError: no
        thread can be had.
        """
        cdef Run run
        assert not self.started
        forget_ended_runs()
        run = Run(self)
        run.set_up(memory.table, num, desc, avail, used, base, event_idx)
        self.num = num
        self.run = run

    def use_memory(self, GuestMemory memory not None):
        """Work with the memory as it is now, from the next batch on. ValueError: the ring is not in it.

        What is under way keeps what it works with.
        """
        if self.run is not None:
            self.run.use_memory(memory.table)

    def begin_stop(self):
        """Begin no further request: what is to come before stop() where there are several queues."""
        if self.run is not None:
            self.run.begin_stop()

    def stop(self, double timeout_s):
        """Finish what is in flight, end the thread, give the next avail index. Not started: 0.

        What waits for somebody is answered ENOLCK. What has not come back after timeout_s is never answered;
        its thread and the memory that it works with are left to it.
        """
        cdef Run run = self.run
        cdef uint64_t deadline = clock_ns() + <uint64_t>(1e9 * timeout_s)
        if run is None:
            return 0
        run.begin_stop()
        self.run = None
        if not run.finish_stop(deadline):
            abandoned_runs.append(run)
            log.warning("%s: a request has not come back for %g s, its ring is stopped without", self.name, timeout_s)
        run.q.journal.stopped = 1
        return load_relaxed_u16(&run.q.journal.next_avail)

    def kick(self):
        """Look at the ring (in-band kicks)."""
        notify_wake(&self.notify)

    def set_kick(self, int fd):
        """Be kicked by this descriptor, eventfd or socket; -1: by kick() alone."""
        if notify_set_kick(&self.notify, fd, fd >= 0 and is_socket(fd)) < 0:
            raise OSError(errno, os.strerror(errno))

    def set_call(self, int fd, bytes message=None):
        """Call the guest by adding one to this descriptor, an eventfd or its like; -1: no calls.

        message: a whole VRING_CALL message instead, for the back-end channel.
        """
        cdef const char *text = NULL
        cdef int kind = CALL_NONE, n = 0
        if message is not None:
            assert len(message) <= CALL_MESSAGE_MAX
            kind, text, n = CALL_CHANNEL, message, len(message)
        elif fd >= 0 and is_socket(fd):
            kind = CALL_SOCKET
        elif fd >= 0:
            kind = CALL_EVENTFD_BLOCKING if os.get_blocking(fd) else CALL_EVENTFD
        if notify_set_call(&self.notify, fd, kind, text, n) < 0:
            raise OSError(errno, os.strerror(errno))

    def set_err(self, int fd):
        """Tell the front end of a broken ring by this descriptor; -1: do not."""
        if notify_set_err(&self.notify, fd) < 0:
            raise OSError(errno, os.strerror(errno))

    def close(self, double timeout_s):
        """stop(), and let go of every descriptor of the front end's. Idempotent; then only counters() works."""
        self.stop(timeout_s)
        self.set_kick(-1)
        self.set_call(-1)
        self.set_err(-1)

    def counters(self):
        """Since the beginning, by opcode name: requests, errors, bytes_in, bytes_out.

        "ring": kicks, calls, chains given back unanswered, and each ring error by its text.
        """
        cdef op_count_t *count
        found = {}
        for opcode in range(OPCODES_MAX + 1):
            count = &self.counted.ops[opcode]
            if load_relaxed_u64(&count.requests) == 0:
                continue
            name = OPCODE_NAME.get(opcode, "UNKNOWN")
            sums = found.setdefault(name, dict.fromkeys(COUNTS, 0))
            for field, n in zip(COUNTS, (
                load_relaxed_u64(&count.requests), load_relaxed_u64(&count.errors),
                load_relaxed_u64(&count.bytes_in), load_relaxed_u64(&count.bytes_out),
            )):
                sums[field] += n
        found["ring"] = {
            "kicks": load_relaxed_u64(&self.notify.kicks),
            "calls": load_relaxed_u64(&self.notify.calls),
            "unanswered": load_relaxed_u64(&self.counted.unanswered),
        }
        for code, text in CHAIN_ERRORS.items():
            found["ring"][text] = load_relaxed_u64(&self.counted.ring_errors[-<int>code])
        return found
