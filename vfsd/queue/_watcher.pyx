"""The watcher's thread (see the .pxd)."""

cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd.fuse.dispatch cimport FILE_SYSTEMS, OPCODES_MAX, file_system_of, request_run, request_t
from vfsd.queue._state cimport queue_t, watch_t
from vfsd.sys._clock cimport clock_ns
from vfsd.sys._threads cimport (
    cond_init_monotonic, cond_wait_ns, pthread_cond_destroy, pthread_cond_signal, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

import logging
import threading

from vfsd.fuse.opcodes import NUMBER

__all__ = ("Watcher",)

log = logging.getLogger("vfsd.queue")

cdef extern from "_atomics.h" nogil:
    int add_int(int *p, int v)
    int load_acquire_int(const int *p)
    uint64_t load_acquire_u64(const uint64_t *p)
    void store_release_int(int *p, int v)
    void store_relaxed_int(int *p, int v)
    uint16_t load_relaxed_u16(const uint16_t *p)
    void store_release_u64(uint64_t *p, uint64_t v)

cdef extern from "<sys/resource.h>" nogil:
    struct rusage:
        long ru_nvcsw   # times it has slept
        long ru_nivcsw  # times another one has had its CPU
    int getrusage(int who, rusage *usage)
    int RUSAGE_SELF
    int RUSAGE_THREAD

cdef enum:
    LOOK_NS = 2000000         # between two looks at queues that are at work
    LOOKS_IDLE = 64           # in vain, then it sleeps until a queue has something to do
    FEW = 40                  # requests from one look to the next: each takes at least 50 us
    TIMED = 8                 # requests then
    TIMED_CONTENDED = 2
    SLOW_NS = 50000           # what takes as long, asleep, costs more than a hop to another thread
    SLOW_FOR_NS = 2000000000  # then it is tried in place again
    CONTENDED_NS = 20000000   # after a preemption: what is under way may wait for a CPU alone
    CONTENDED_LOOKS = 5       # at a request, then, before the ring is taken

cdef set IN_PLACE = {NUMBER[name] for name in ("FORGET", "BATCH_FORGET", "INTERRUPT", "SETLKW")}
for opcode in range(OPCODES_MAX):
    in_place[opcode] = opcode in IN_PLACE


# --- what queue threads and the control thread call ---

cdef void watch_add(watch_t *w, queue_t *q) noexcept nogil:
    pthread_mutex_lock(&w.lock)
    q.next_watched = w.first
    w.first = q
    pthread_mutex_unlock(&w.lock)


cdef void watch_remove(watch_t *w, queue_t *q) noexcept nogil:
    cdef queue_t **link = &w.first
    pthread_mutex_lock(&w.lock)
    while link[0] != NULL and link[0] != q:
        link = &link[0].next_watched
    if link[0] != NULL:
        link[0] = q.next_watched
    pthread_mutex_unlock(&w.lock)


cdef void watch_wake(watch_t *w) noexcept nogil:
    pthread_mutex_lock(&w.sleep_lock)
    store_release_int(&w.asleep, 0)
    pthread_cond_signal(&w.wake)
    pthread_mutex_unlock(&w.sleep_lock)


cdef void watch_caught(watch_t *w, int fs) noexcept nogil:
    add_int(&w.caught[fs], 1)
    store_release_int(&w.any_slow, 1)


cdef void watch_returned(watch_t *w, int fs) noexcept nogil:
    add_int(&w.caught[fs], -1)


cdef int run_timed(queue_t *q, request_t *r) noexcept nogil:
    """A thread that was preempted has been slow itself, but not its operation: that sleeps."""
    cdef uint32_t opcode = r.header.opcode
    cdef uint64_t began = clock_ns(), ended
    cdef rusage before, after
    cdef int rc
    getrusage(RUSAGE_THREAD, &before)
    rc = request_run(q.dispatch, r)
    ended = clock_ns()
    if ended - began >= SLOW_NS and opcode < OPCODES_MAX and not in_place[opcode]:
        getrusage(RUSAGE_THREAD, &after)
        if after.ru_nvcsw != before.ru_nvcsw:
            store_release_u64(&q.watch.slow_until[file_system_of(q.dispatch, r.header.nodeid)][opcode],
                              ended + SLOW_FOR_NS)
            store_release_int(&q.watch.any_slow, 1)
    return rc


# --- its own thread ---

cdef bint look_at(watch_t *w, queue_t *q) noexcept nogil:
    """Whether it is at work, or has been since the last look."""
    cdef uint16_t at
    cdef bint contended = w.now_ns < w.contended_until
    cdef uint32_t wanted = CONTENDED_LOOKS if contended else 1
    cdef bint busy, in_request = False
    pthread_mutex_lock(&q.gate)
    at = load_relaxed_u16(&q.journal.next_avail)
    busy = q.holder != NULL
    if busy:
        in_request = load_acquire_int(&q.holder.in_request)
        if in_request and <uint16_t>(at - q.seen_avail) < FEW:
            store_relaxed_int(&q.holder.measure, TIMED_CONTENDED if contended else TIMED)
    pthread_mutex_unlock(&q.gate)
    busy = busy or at != q.seen_avail
    q.seen_again = q.seen_again + 1 if in_request and q.seen_request and at == q.seen_avail else 0
    q.seen_request = in_request
    q.seen_avail = at
    if q.seen_again >= wanted:
        q.take_ring(q)
    return busy


cdef void look_for_contention(watch_t *w) noexcept nogil:
    cdef rusage usage
    getrusage(RUSAGE_SELF, &usage)
    if <uint64_t>usage.ru_nivcsw != w.preemptions:
        w.preemptions = usage.ru_nivcsw
        w.contended_until = w.now_ns + CONTENDED_NS


cdef bint look(watch_t *w) noexcept nogil:
    """At all queues: whether any is at work. What was slow long ago is forgotten."""
    cdef queue_t *q
    cdef bint busy = False, slow = False
    cdef int fs, i
    pthread_mutex_lock(&w.lock)
    q = w.first
    while q != NULL:
        busy = look_at(w, q) or busy
        q = q.next_watched
    pthread_mutex_unlock(&w.lock)
    if load_acquire_int(&w.any_slow):
        for fs in range(FILE_SYSTEMS):
            for i in range(OPCODES_MAX):
                slow = slow or load_acquire_u64(&w.slow_until[fs][i]) > w.now_ns
            slow = slow or load_acquire_int(&w.caught[fs]) > 0
        store_release_int(&w.any_slow, slow)
    return busy


cdef void watch(watch_t *w) noexcept nogil:
    cdef int idle = 0
    pthread_mutex_lock(&w.sleep_lock)
    while not w.stop:
        if idle >= LOOKS_IDLE:
            # Said first, then looked once more: a queue that begins later sees it.
            store_release_int(&w.asleep, 1)
            pthread_mutex_unlock(&w.sleep_lock)
            idle = 0 if look(w) else idle
            pthread_mutex_lock(&w.sleep_lock)
            while idle and load_acquire_int(&w.asleep) and not w.stop:
                pthread_cond_wait(&w.wake, &w.sleep_lock)
            store_release_int(&w.asleep, 0)
            idle = 0
        cond_wait_ns(&w.wake, &w.sleep_lock, LOOK_NS)
        pthread_mutex_unlock(&w.sleep_lock)
        store_release_u64(&w.now_ns, clock_ns())
        look_for_contention(w)
        idle = 0 if look(w) else idle + 1
        pthread_mutex_lock(&w.sleep_lock)
    pthread_mutex_unlock(&w.sleep_lock)


@cython.final
cdef class Watcher:
    """Of all queues of one connection."""

    def __cinit__(self):
        self.w.owner = <void *>self
        self.w.asleep = 1
        pthread_mutex_init(&self.w.lock, NULL)
        pthread_mutex_init(&self.w.sleep_lock, NULL)
        cond_init_monotonic(&self.w.wake)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.w.lock)
        pthread_mutex_destroy(&self.w.sleep_lock)
        pthread_cond_destroy(&self.w.wake)

    def start(self):
        """Begin to watch, once. Without a thread requests keep their queue, which is said."""
        if self.thread is not None:
            return
        thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as problem:
            log.warning("no thread to watch for slow requests: %s", problem)
        else:
            self.thread = thread

    def _run(self):
        with nogil:
            watch(&self.w)

    def close(self):
        """End the thread; no queue is started any more."""
        if self.thread is None:
            return
        with nogil:
            pthread_mutex_lock(&self.w.sleep_lock)
            self.w.stop = True
            store_release_int(&self.w.asleep, 0)
            pthread_cond_signal(&self.w.wake)
            pthread_mutex_unlock(&self.w.sleep_lock)
        self.thread.join()
