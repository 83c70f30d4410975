"""One virtqueue, as the control thread sees it: started, stopped, its descriptors and counters."""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vfsd cimport _ring as ring
from vfsd.queue._bounce cimport bounce_free
from vfsd.queue._jobs cimport jobs_free, jobs_init
from vfsd.memory._regions cimport GuestMemory, iovec, memory_drop, memory_keep, memory_t
from vfsd.queue._notify cimport (
    CALL_CHANNEL, CALL_EVENTFD, CALL_EVENTFD_BLOCKING, CALL_MESSAGE_MAX, CALL_NONE, CALL_SOCKET, notify_free,
    notify_init, notify_set_call, notify_set_err, notify_set_kick, notify_t, notify_wake,
)
from vfsd.queue._parked cimport cancel_parked, parks_free, parks_init
from vfsd.queue._pool cimport Pool, pool_spread
from vfsd._ring cimport ring_t
from vfsd.state._journal cimport State, journal_begin, journal_recover
from vfsd.sys._clock cimport clock_ns
from vfsd.sys._threads cimport (
    cond_init_monotonic, cond_wait_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, sched_yield,
)
from vfsd.queue._state cimport counters_t, op_count_t, queue_t, worker_t
from vfsd.queue._thread cimport count_ended, move_ring, serve, take_ring
from vfsd.queue._watcher cimport Watcher, watch_add, watch_remove
from vfsd.fuse.dispatch cimport OPCODES_MAX, Dispatch

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
    uint16_t load_relaxed_u16(const uint16_t *p)
    uint64_t load_relaxed_u64(const uint64_t *p)

cdef extern from "_syscalls.h" nogil:
    void heavy_fence()

cdef enum:
    IOV_SLACK = 1024  # iovecs beyond one per element: a batch, and elements that cross regions

COUNTS = ("requests", "errors", "bytes_in", "bytes_out")

# Runs whose threads or jobs are caught in a request: here until they return.
cdef list abandoned_runs = []


cdef bint start_thread(queue_t *q) noexcept with gil:
    try:
        (<Run>q.owner).add_thread()
    except (RuntimeError, MemoryError) as problem:
        log.warning("no second thread for a queue: %s", problem)
        return False
    return True


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
        self.q.start_thread = start_thread
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
