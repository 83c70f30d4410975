"""One virtqueue and its thread (docs/architecture.md, "One request, end to end")."""

cimport cython
from libc.errno cimport EFAULT, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vfsd cimport _ring as ring
from vfsd.queue._bounce cimport bounce_free, serve_fragile
from vfsd.queue._coalescing cimport call_later, calls_init, calls_made, note_caller
from vfsd.queue._jobs cimport jobs_free, jobs_init, make_job, run_job
from vfsd.memory._regions cimport POPULATE_MIN, GuestMemory, memory_populate
from vfsd.queue._parked cimport answer_ready, cancel_parked, park, parks_free, parks_init
from vfsd.queue._polling cimport adapt, clock_ns, look_for_more
from vfsd.queue._pool cimport Pool, pool_submit
from vfsd.queue._replies cimport call_guest, call_if_wanted, finish, give_back_unanswered
from vfsd._ring cimport chain_t
from vfsd.sys._threads cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from vfsd.queue._state cimport (
    BATCH, CALL_BYTES_MAX, REQUEST_MAX, closing, job_t, op_count_t, queue_t, wait_open, wake_queue,
)
from vfsd.fuse.dispatch cimport (
    OPCODES_MAX, WOULD_BLOCK, WOULD_WAIT, Dispatch, request_blocks, request_parse, request_run,
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
    uint64_t load_relaxed_u64(const uint64_t *p)
    void count_u64(uint64_t *p, uint64_t v)

cdef extern from "<sys/epoll.h>" nogil:
    struct epoll_event:
        uint32_t events
        uint64_t u64 "data.u64"
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int n, int timeout)
    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    int EPOLL_CTL_DEL
    unsigned int EPOLLIN
    unsigned int EPOLLET

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void *data, size_t n, int flags)
    int MSG_DONTWAIT

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t n)
    int c_close "close"(int fd)

cdef enum:
    WAKE = 0
    KICK = 1
    CALL_EVERY = 1 << 19  # bytes in the middle of a batch: the guest has work while the rest is copied
    IOV_SLACK = 1024  # iovecs beyond one per element: a batch, and elements that cross regions

cdef uint64_t ONE = 1
COUNTS = ("requests", "errors", "bytes_in", "bytes_out")
EVENT = b"\1\0\0\0\0\0\0\0"  # what calls the guest through an eventfd: adds one


# --- one request ---

cdef bint serve_chain(queue_t *q, chain_t *chain, bint last) noexcept nogil:
    """One request from parse to used element, or to the pool. False: this thread has lent the ring."""
    cdef request_t r
    cdef span_t readable, writable
    cdef job_t *job
    cdef int rc
    if chain.fragile:
        q.uncalled.awaited = True
        serve_fragile(q, chain)
        return True
    readable.iov = chain.readable
    readable.n = chain.n_readable
    readable.bytes = chain.readable_bytes
    writable.iov = chain.writable
    writable.n = chain.n_writable
    writable.bytes = chain.writable_bytes
    if not request_parse(q.dispatch, readable, writable, &r):
        q.uncalled.awaited = True
        give_back_unanswered(q, chain.head)
        return True
    note_caller(&q.uncalled, &r)
    if chain.unmapped:
        r.error = -EFAULT
    rc = WOULD_BLOCK
    if not request_blocks(q.dispatch, &r):
        if not r.error and POPULATE_MIN <= chain.writable_bytes <= REQUEST_MAX:
            memory_populate(q.ring.memory, chain.writable, chain.n_writable)
        if r.in_python:
            call_if_wanted(q)
        rc = request_run(q.dispatch, &r)
        r.resumed = rc == WOULD_BLOCK
    if rc == WOULD_BLOCK:
        job = make_job(q, chain, &r)
        if job != NULL:
            if last and lend(q):
                run_job(&job.task)
                return False
            pool_submit(q.pool, &job.task)
            return True
        call_if_wanted(q)
        r.may_wait = True
        r.queue = q
        r.leave = leave_inline
        r.enter = enter_inline
        rc = request_run(q.dispatch, &r)
    if rc == WOULD_WAIT:
        park(q, chain, &r)
    else:
        finish(q, &r, chain.head, chain.readable_bytes, rc)
    return True


cdef void leave_inline(request_t *r) noexcept nogil:
    cdef queue_t *q = <queue_t *>r.queue
    pthread_mutex_lock(&q.gate)
    q.away = True
    pthread_cond_broadcast(&q.gate_changed)
    pthread_mutex_unlock(&q.gate)


cdef void enter_inline(request_t *r) noexcept nogil:
    cdef queue_t *q = <queue_t *>r.queue
    pthread_mutex_lock(&q.gate)
    wait_open(q)
    q.away = False
    pthread_mutex_unlock(&q.gate)


cdef bint lend(queue_t *q) noexcept nogil:
    """Leave the ring to this queue's other thread, to wait oneself. False: it is not asleep, or there is more.

    A kick wakes it; so a request that comes alone costs no hop to the pool, and one that comes
    after it does not wait.
    """
    if q.sleepers == 0 and (q.threads > 1 or not add_standby(q)):
        return False
    call_if_wanted(q)
    if ring.ring_enable_kick(&q.ring):
        ring.ring_disable_kick(&q.ring)
        return False
    leave(q)
    return True


cdef bint add_standby(queue_t *q) noexcept with gil:
    try:
        (<Queue>q.owner).add_thread()
    except RuntimeError:
        log.exception("no second thread for a queue: what blocks goes to the pool")
        return False
    return True


# --- the queue thread's loop ---

cdef bint work(queue_t *q) noexcept nogil:
    """Answer all that is on the ring, then ask for a kick. Ends early when the gate is to close.

    False: this thread has lent the ring, and is not the one to leave it.
    """
    cdef uint64_t moved
    cdef int n, i
    if load_acquire_int(&q.any_ready):
        answer_ready(q)
    if q.broken:
        return True
    if q.owes_call:
        call_guest(q)
    calls_made(&q.uncalled)
    ring.ring_disable_kick(&q.ring)
    while not closing(q):
        q.removals = q.ring.memory.removals
        n = ring.ring_pop_batch(&q.ring, q.chains, BATCH)
        moved = 0
        for i in range(n):
            if not serve_chain(q, &q.chains[i], i == n - 1):
                return False
            moved += q.chains[i].readable_bytes + q.chains[i].writable_bytes
            if moved >= CALL_EVERY and i < n - 1:
                call_if_wanted(q)
                moved = 0
        if load_acquire_int(&q.any_ready):
            answer_ready(q)
        if n > 0 and call_later(q, n, moved):
            continue
        call_if_wanted(q)
        if n < 0:
            break_ring(q, n)
            return True
        if n == 0 and not look_for_more(q) and not closing(q):
            if not ring.ring_enable_kick(&q.ring):
                return True
            ring.ring_disable_kick(&q.ring)
    call_if_wanted(q)
    return True


cdef void break_ring(queue_t *q, int code) noexcept nogil:
    """The guest broke this ring: nothing more is taken from it until it is started anew."""
    q.broken = code
    count_u64(&q.ring_errors[-code], 1)
    if q.err_fd >= 0:
        c_write(q.err_fd, &ONE, sizeof(ONE))
    report_broken(q, code)


cdef void report_broken(queue_t *q, int code) noexcept with gil:
    log.warning("a guest broke a ring, the queue is stopped: %s", CHAIN_ERRORS[code])


cdef int enter(queue_t *q) noexcept nogil:
    """Through the gate, waiting while it is closed: 1 the ring is this thread's, 0 another has it, -1 the end."""
    cdef int rc = 1
    pthread_mutex_lock(&q.gate)
    wait_open(q)
    if q.stop:
        rc = -1
    elif q.working:
        rc = 0
        q.missed = True
        q.sleepers += 1
    else:
        q.working = True
    pthread_mutex_unlock(&q.gate)
    return rc


cdef bint leave(queue_t *q) noexcept nogil:
    """Back out. True: the gate closed in the middle, there may be work left.

    A kick after the last look at the ring may have woken the other thread while this one still had it.
    """
    cdef bint again, missed
    pthread_mutex_lock(&q.gate)
    q.working = False
    missed = q.missed
    q.missed = False
    again = q.pauses > 0 or q.stop
    if again:
        pthread_cond_broadcast(&q.gate_changed)
    pthread_mutex_unlock(&q.gate)
    if missed:
        wake_queue(q)
    return again


cdef void count_sleepers(queue_t *q, int n) noexcept nogil:
    pthread_mutex_lock(&q.gate)
    q.sleepers += n
    pthread_mutex_unlock(&q.gate)


cdef void wait_kick(queue_t *q) noexcept nogil:
    cdef epoll_event events[2]
    cdef char drain[256]
    cdef int i, n = epoll_wait(q.epoll_fd, events, 2, -1)
    for i in range(n):
        if events[i].u64 == KICK:
            count_u64(&q.kicks, 1)
            # Edge triggered: an eventfd need not be read, a socket would fill up.
            if q.kick_is_socket:
                while recv(q.kick_fd, drain, sizeof(drain), MSG_DONTWAIT) == sizeof(drain):
                    pass


cdef void serve(queue_t *q) noexcept nogil:
    cdef bint slept = False
    cdef int rc
    while True:
        rc = enter(q)
        if rc < 0:
            wake_queue(q)  # an event wakes one thread: the next one's
            return
        if rc > 0:
            if slept:
                adapt(q, clock_ns())
            slept = False
            if not work(q):
                continue
            q.idle_since = clock_ns()
            if leave(q):
                continue
            count_sleepers(q, 1)
        wait_kick(q)
        count_sleepers(q, -1)
        slept = True


# --- the control thread ---

cdef bint is_socket(int fd) except -1:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


@cython.final
cdef class Queue:
    """One virtqueue of one connection and the thread that serves it, or two that take turns.

    All methods are for the control thread. Descriptors handed over are the queue's own from then
    on. index: 0 is hiprio. dispatch: where requests go. pool: runs what may block. poll_us: the most
    to poll before sleeping. lingers: nobody waits for its requests, they are gathered for a moment.
    """

    def __cinit__(self, int index, str name, Dispatch dispatch not None, Pool pool not None, int poll_us=0,
                  bint lingers=False):
        self.index = index
        self.threads = []
        self.q.owner = <void *>self
        self.q.lingers = lingers
        self.name = name
        self.dispatch = dispatch
        self.pool = pool
        self.q.pool = &pool.p
        self.q.poll_max_ns = self.q.poll_ns = 1000 * poll_us
        self.q.dispatch = &dispatch.table
        self.q.kick_fd = self.q.call_fd = self.q.err_fd = -1
        self.q.wake_fd = self.q.epoll_fd = self.q.bounce_fd = -1
        pthread_mutex_init(&self.q.gate, NULL)
        pthread_mutex_init(&self.q.park_lock, NULL)
        pthread_mutex_init(&self.q.used_lock, NULL)
        pthread_cond_init(&self.q.gate_changed, NULL)
        self.q.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.q.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.q.wake_fd < 0 or self.q.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.watch(self.q.wake_fd, WAKE)

    def __dealloc__(self):
        for fd in (self.q.kick_fd, self.q.call_fd, self.q.err_fd, self.q.wake_fd, self.q.epoll_fd):
            if fd >= 0:
                c_close(fd)
        bounce_free(&self.q)
        jobs_free(&self.q)
        parks_free(&self.q)
        free(self.iov)
        pthread_mutex_destroy(&self.q.park_lock)
        pthread_mutex_destroy(&self.q.used_lock)
        pthread_cond_destroy(&self.q.gate_changed)
        pthread_mutex_destroy(&self.q.gate)

    cdef int watch(self, int fd, int what) except -1:
        cdef epoll_event event
        event.events = EPOLLIN | EPOLLET
        event.u64 = what
        if epoll_ctl(self.q.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        return 0

    def start(self, GuestMemory memory not None, uint32_t num, uint64_t desc, uint64_t avail,
              uint64_t used, uint16_t base, bint event_idx):
        """Set the ring up (user addresses) and start the thread; it looks at the ring at once.

        ValueError: a size that is no power of two, or a part of the ring outside memory.
        """
        cdef uint32_t iov_max = num + IOV_SLACK
        assert not self.started
        free(self.iov)
        self.iov = <iovec *>calloc(iov_max, sizeof(iovec))
        if self.iov == NULL or not jobs_init(&self.q, num, iov_max) or not parks_init(&self.q, num):
            raise MemoryError
        if ring.ring_init(&self.q.ring, &memory.table, num, desc, avail, used, base, event_idx,
                          self.iov, iov_max) < 0:
            raise ValueError(
                f"ring of {num} at descriptors {desc:#x}, avail {avail:#x}, used {used:#x}"
                " is no power of two, unaligned or outside memory")
        self.memory = memory
        self.num = num
        calls_init(&self.q.uncalled)
        self.q.broken = 0
        self.q.stop = 0
        self.started = True
        self.add_thread()

    cdef int add_thread(self) except -1:
        thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        thread.start()
        self.threads.append(thread)
        self.q.threads += 1
        return 0

    def _run(self):
        """The thread's body."""
        with nogil:
            serve(&self.q)

    def stop(self):
        """Finish what is in flight, end the thread, give the next avail index. Not started: 0.

        What waits for somebody is answered ENOLCK.
        """
        if not self.started:
            return 0
        pthread_mutex_lock(&self.q.gate)
        store_release_int(&self.q.stop, 1)
        pthread_cond_broadcast(&self.q.gate_changed)
        pthread_mutex_unlock(&self.q.gate)
        self.wake()
        while self.threads:  # one of them may be adding another
            self.threads.pop().join()
        self.q.threads = 0
        self.wait_jobs()
        with nogil:
            cancel_parked(&self.q)
        self.memory = None
        self.started = False
        return self.q.ring.last_avail

    @property
    def broken(self):
        """0, or the ring code (negative) that stopped this queue until it is started anew."""
        return self.q.broken

    cdef void wake(self) noexcept:
        wake_queue(&self.q)

    def kick(self):
        """Look at the ring (in-band kicks)."""
        self.wake()

    cdef void wait_jobs(self, bint jobs=True) noexcept:
        with nogil:
            pthread_mutex_lock(&self.q.gate)
            while (self.q.working and not self.q.away) or (jobs and self.q.jobs_out) or (self.q.stop and self.q.jobs_away):
                pthread_cond_wait(&self.q.gate_changed, &self.q.gate)
            pthread_mutex_unlock(&self.q.gate)

    def pause(self, bint jobs=True):
        """Return when no request of this queue is being worked on; none is begun until resume().

        jobs: wait for those that have been handed over too; without, only nobody looks at memory.
        """
        pthread_mutex_lock(&self.q.gate)
        store_release_int(&self.q.pauses, self.q.pauses + 1)
        pthread_mutex_unlock(&self.q.gate)
        self.wait_jobs(jobs)

    def resume(self):
        """End one pause(); the thread looks at the ring again."""
        pthread_mutex_lock(&self.q.gate)
        store_release_int(&self.q.pauses, self.q.pauses - 1)
        pthread_cond_broadcast(&self.q.gate_changed)
        pthread_mutex_unlock(&self.q.gate)
        self.wake()

    def set_kick(self, int fd):
        """Be kicked by this descriptor, eventfd or socket; -1: by kick() alone."""
        cdef bint socket = fd >= 0 and is_socket(fd)
        self.pause()
        try:
            if self.q.kick_fd >= 0:
                epoll_ctl(self.q.epoll_fd, EPOLL_CTL_DEL, self.q.kick_fd, NULL)
                c_close(self.q.kick_fd)
            self.q.kick_fd = fd
            self.q.kick_is_socket = socket
            if fd >= 0:
                self.watch(fd, KICK)
        finally:
            self.resume()

    def set_call(self, int fd, bytes message=EVENT):
        """Call the guest by writing `message` to this descriptor; -1: no calls.

        EVENT for an eventfd or its like; a whole VRING_CALL message for the back-end channel.
        """
        cdef bint socket = fd >= 0 and is_socket(fd)
        cdef const char *text = message
        assert len(message) <= CALL_BYTES_MAX
        self.pause()
        if self.q.call_fd >= 0:
            c_close(self.q.call_fd)
        self.q.call_fd = fd
        self.q.call_is_socket = socket
        self.q.call_may_block = fd >= 0 and os.get_blocking(fd)
        self.q.call_len = len(message)
        memcpy(self.q.call_bytes, text, len(message))
        self.resume()

    def set_err(self, int fd):
        """Tell the front end of a broken ring by this descriptor; -1: do not."""
        self.pause()
        if self.q.err_fd >= 0:
            c_close(self.q.err_fd)
        self.q.err_fd = fd
        self.resume()

    def close(self):
        """stop(), and close every descriptor. Idempotent; then only counters() works."""
        if self.q.epoll_fd < 0:
            return
        self.stop()
        self.set_kick(-1)
        self.set_call(-1)
        self.set_err(-1)
        c_close(self.q.wake_fd)
        c_close(self.q.epoll_fd)
        self.q.wake_fd = self.q.epoll_fd = -1

    def counters(self):
        """Since the beginning, by opcode name: requests, errors, bytes_in, bytes_out.

        "ring": kicks, calls, chains given back unanswered, and each ring error by its text.
        """
        cdef op_count_t *count
        found = {}
        for opcode in range(OPCODES_MAX + 1):
            count = &self.q.ops[opcode]
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
            "kicks": load_relaxed_u64(&self.q.kicks),
            "calls": load_relaxed_u64(&self.q.calls),
            "unanswered": load_relaxed_u64(&self.q.unanswered),
        }
        for code, text in CHAIN_ERRORS.items():
            found["ring"][text] = load_relaxed_u64(&self.q.ring_errors[-<int>code])
        return found
