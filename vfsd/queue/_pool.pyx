"""The offload pool: threads come as they are needed, up to a limit, and end when they are not needed."""

cimport cython

from libc.stdint cimport uint64_t

from vfsd.sys._clock cimport clock_ns
from vfsd.sys._threads cimport (
    cond_init_monotonic, cond_wait_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init,
    pthread_cond_signal, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

import logging
import threading

__all__ = ("Pool",)

log = logging.getLogger("vfsd.queue")

cdef enum:
    IDLE_S = 5  # after which a thread ends
    HELPERS_MAX = 31

cdef struct spreading_t:  # work that several threads do
    pool_t *pool
    part_t part
    void *work
    unsigned int left     # helpers that have not ended; under the pool's lock

cdef struct helper_t:
    task_t task
    spreading_t *of

cdef bint pool_submit(pool_t *p, task_t *task) noexcept nogil:
    cdef bint grow, taken = True
    task.next = NULL
    pthread_mutex_lock(&p.lock)
    if p.first == NULL:
        p.first = task
    else:
        p.last.next = task
    p.last = task
    p.waiting += 1
    grow = p.waiting > p.idle and p.threads + p.borrowed < p.threads_max
    if grow:
        p.threads += 1
    pthread_cond_signal(&p.work)
    pthread_mutex_unlock(&p.lock)
    if grow and not add_thread(p):
        pthread_mutex_lock(&p.lock)
        p.threads -= 1
        taken = p.threads > 0 or not take_back(p, task)
        pthread_mutex_unlock(&p.lock)
    return taken


cdef inline bint lends(const pool_t *p) noexcept nogil:
    return max(p.threads, 1) + p.borrowed < p.threads_max


cdef bint pool_lends(pool_t *p) noexcept nogil:
    cdef bint there
    pthread_mutex_lock(&p.lock)
    there = lends(p)
    pthread_mutex_unlock(&p.lock)
    return there


cdef bint pool_borrow(pool_t *p) noexcept nogil:
    cdef bint there
    pthread_mutex_lock(&p.lock)
    there = lends(p)
    p.borrowed += there
    pthread_mutex_unlock(&p.lock)
    return there


cdef void pool_return(pool_t *p) noexcept nogil:
    pthread_mutex_lock(&p.lock)
    p.borrowed -= 1
    pthread_mutex_unlock(&p.lock)


cdef void help(task_t *task) noexcept nogil:
    cdef spreading_t *s = (<helper_t *>task).of
    cdef pool_t *p = s.pool
    s.part(s.work)
    pthread_mutex_lock(&p.lock)
    s.left -= 1
    if s.left == 0:
        pthread_cond_broadcast(&p.helped)
    pthread_mutex_unlock(&p.lock)


cdef void pool_spread(void *pool, part_t part, void *work, unsigned int n) noexcept nogil:
    cdef pool_t *p = <pool_t *>pool
    cdef helper_t helpers[HELPERS_MAX]
    cdef spreading_t s
    cdef unsigned int i, n_helpers = min(max(n, 1) - 1, <unsigned int>HELPERS_MAX)
    s.pool, s.part, s.work = p, part, work
    s.left = n_helpers
    for i in range(n_helpers):
        helpers[i].task.run = help
        helpers[i].of = &s
        if not pool_submit(p, &helpers[i].task):
            break
    else:
        i = n_helpers
    part(work)
    pthread_mutex_lock(&p.lock)
    s.left -= n_helpers - i
    n_helpers = i
    for i in range(n_helpers):
        if take_back(p, &helpers[i].task):
            s.left -= 1
    while s.left:
        pthread_cond_wait(&p.helped, &p.lock)
    pthread_mutex_unlock(&p.lock)


cdef bint take_back(pool_t *p, task_t *task) noexcept nogil:
    """A task nobody has taken. False: somebody has. Under the lock."""
    cdef task_t **at = &p.first
    cdef task_t *before = NULL
    while at[0] != NULL and at[0] != task:
        before = at[0]
        at = &before.next
    if at[0] == NULL:
        return False
    at[0] = task.next
    if p.last == task:
        p.last = before
    p.waiting -= 1
    return True


cdef bint add_thread(pool_t *p) noexcept with gil:
    """False: none can be had, and those there are have more to do."""
    cdef Pool pool = <Pool>p.owner
    try:
        pool.add_thread()
    except (RuntimeError, MemoryError) as problem:
        log.warning("no further thread for %s: %s", pool.name, problem)
        return False
    return True


cdef void work(pool_t *p) noexcept nogil:
    cdef task_t *task
    cdef bint idle = False
    pthread_mutex_lock(&p.lock)
    while True:
        while p.first == NULL and not p.stop and not idle:
            p.idle += 1
            idle = cond_wait_ns(&p.work, &p.lock, IDLE_S * <uint64_t>1000000000)
            p.idle -= 1
        idle = False
        task = p.first
        if task == NULL:
            p.threads -= 1
            if p.threads == 0:
                pthread_cond_broadcast(&p.ended)
            pthread_mutex_unlock(&p.lock)
            return
        p.first = task.next
        p.waiting -= 1
        pthread_mutex_unlock(&p.lock)
        task.run(task)
        pthread_mutex_lock(&p.lock)


@cython.final
cdef class Pool:
    """Up to threads_max threads that run tasks; none until the first task comes."""

    def __cinit__(self, str name, unsigned int threads_max):
        self.name = name
        self.p.owner = <void *>self
        self.p.threads_max = threads_max
        pthread_mutex_init(&self.p.lock, NULL)
        cond_init_monotonic(&self.p.ended)
        cond_init_monotonic(&self.p.work)
        pthread_cond_init(&self.p.helped, NULL)

    def __dealloc__(self):
        pthread_cond_destroy(&self.p.work)
        pthread_cond_destroy(&self.p.ended)
        pthread_cond_destroy(&self.p.helped)
        pthread_mutex_destroy(&self.p.lock)

    cdef int add_thread(self) except -1:
        self.made += 1
        threading.Thread(target=self._run, name=f"{self.name}.{self.made}", daemon=True).start()
        return 0

    def _run(self):
        with nogil:
            work(&self.p)

    def close(self, double timeout_s):
        """Run what has been submitted and end the threads. Nothing may be submitted any more.

        False: some have not ended in that time. They will, when what they work on does.
        """
        cdef uint64_t deadline = clock_ns() + <uint64_t>(1e9 * timeout_s), now
        cdef bint ended
        with nogil:
            pthread_mutex_lock(&self.p.lock)
            self.p.stop = True
            pthread_cond_broadcast(&self.p.work)
            while self.p.threads:
                now = clock_ns()
                if now >= deadline:
                    break
                cond_wait_ns(&self.p.ended, &self.p.lock, deadline - now)
            ended = self.p.threads == 0
            pthread_mutex_unlock(&self.p.lock)
        return ended
