"""Threads for what may block, so that no queue waits for it (docs/architecture.md, "Threads")."""

from vfsd.fuse.dispatch cimport part_t
from vfsd.sys._threads cimport pthread_cond_t, pthread_mutex_t


# A piece of work, part of the caller's own structure, which is the caller's again once run is called.
cdef struct task_t:
    void (*run)(task_t *task) noexcept nogil
    task_t *next


cdef struct pool_t:
    task_t *first
    task_t *last
    unsigned int waiting   # tasks nobody has taken
    unsigned int idle      # threads with nothing to do
    unsigned int threads
    unsigned int borrowed  # threads of queues, which count as well
    unsigned int threads_max
    bint stop
    void *owner            # the Pool: borrowed
    pthread_mutex_t lock
    pthread_cond_t work
    pthread_cond_t ended   # by CLOCK_MONOTONIC
    pthread_cond_t helped


# Have a thread run the task, a new one if all are busy and there may be more. Never waits for it. False: there is
# no thread, and none can be had.
cdef bint pool_submit(pool_t *p, task_t *task) noexcept nogil

# See dispatch_t.spread. pool: a pool_t.
cdef void pool_spread(void *pool, part_t part, void *work, unsigned int n) noexcept nogil

# For a thread that a queue adds to its two: False when there are as many as there may be, one of them the pool's own.
cdef bint pool_borrow(pool_t *p) noexcept nogil
# Whether it would find one.
cdef bint pool_lends(pool_t *p) noexcept nogil
# It has ended, or could not be had.
cdef void pool_return(pool_t *p) noexcept nogil


cdef class Pool:
    cdef pool_t p
    cdef unsigned int made  # threads so far
    cdef str name

    cdef int add_thread(self) except -1
