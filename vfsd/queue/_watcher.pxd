"""Sees to it that a request which keeps its thread keeps nothing else (docs/architecture.md, "Threads").

A queue's thread runs requests in place. The watcher looks at it now and then while it is at work. A request that is
under way for two looks has the ring taken from its thread. Where few are done from one look to the next, some are
timed; an operation that proves to be slow on its file system goes to the pool beforehand for a while. So neither the
clock nor the kernel is asked anything for each request.
"""

from libc.stdint cimport uint32_t, uint64_t

from vfsd.fuse.dispatch cimport OPCODES_MAX, file_system_of, request_t
from vfsd.queue._pool cimport pool_lends
from vfsd.queue._state cimport queue_t, watch_t

cdef extern from "_atomics.h" nogil:
    int load_relaxed_int(const int *p)
    uint64_t load_relaxed_u64(const uint64_t *p)


# What comes back later by itself, and what nobody waits for, is left in place. By opcode.
cdef unsigned char in_place[OPCODES_MAX]

# A run of a queue, from its start until nothing of it is to begin any more.
cdef void watch_add(watch_t *w, queue_t *q) noexcept nogil
cdef void watch_remove(watch_t *w, queue_t *q) noexcept nogil
cdef void watch_wake(watch_t *w) noexcept nogil
# Run a request, and note whether its operation is slow on that file system.
cdef int run_timed(queue_t *q, request_t *r) noexcept nogil


cdef inline void watch_begins(watch_t *w) noexcept nogil:
    """A thread has the ring. (The gate it has passed orders this after that.)"""
    if load_relaxed_int(&w.asleep):
        watch_wake(w)


cdef inline bint is_slow(queue_t *q, const request_t *r) noexcept nogil:
    """Whether it goes to the pool without a try: the operation has been slow lately on that file system, or
    something hangs there and no thread could take over from one more.
    """
    cdef watch_t *w = q.watch
    cdef uint32_t fs
    if not load_relaxed_int(&w.any_slow) or r.error or r.header.opcode >= OPCODES_MAX:
        return False
    fs = file_system_of(q.dispatch, r.header.nodeid)
    if load_relaxed_u64(&w.slow_until[fs][r.header.opcode]) > load_relaxed_u64(&w.now_ns):
        return True
    return load_relaxed_int(&w.caught[fs]) > 0 and not in_place[r.header.opcode] and not pool_lends(q.pool)


# A ring has been taken from a request on that file system; it has returned.
cdef void watch_caught(watch_t *w, int fs) noexcept nogil
cdef void watch_returned(watch_t *w, int fs) noexcept nogil

cdef class Watcher:
    cdef watch_t w
    cdef object thread  # None: not started
