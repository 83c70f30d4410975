"""What a queue gives back: the used element, its counters, the call.

Here is what runs for every request, so that it is compiled into its caller.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd._ring cimport ring_push, ring_wants_call
from vfsd.sys._threads cimport pthread_mutex_lock, pthread_mutex_unlock
from vfsd.queue._state cimport op_count_t, queue_t
from vfsd.fuse.dispatch cimport OPCODES_MAX, request_reply, request_t

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void count_u64(uint64_t *p, uint64_t v)

cdef extern from "_syscalls.h" nogil:
    int c_close "sys_close"(int fd)


# Call the guest, if it has given a descriptor for it.
cdef void call_guest(queue_t *q) noexcept nogil


cdef inline bint lock_used(queue_t *q) noexcept nogil:
    """Take the used ring and the counters: whether there is anybody to take them from.

    Only the thread that has the ring makes jobs: while there are none it is alone.
    """
    if load_acquire_int(&q.jobs_live) == 0:
        return False
    pthread_mutex_lock(&q.used_lock)
    return True


cdef inline void unlock_used(queue_t *q, bint locked) noexcept nogil:
    if locked:
        pthread_mutex_unlock(&q.used_lock)


cdef inline void finish(queue_t *q, request_t *r, uint32_t head, uint64_t bytes_in, int rc) noexcept nogil:
    """Write the reply, count, give the chain back."""
    give_back(q, r, head, bytes_in, request_reply(r, rc), rc)


cdef inline void give_back(queue_t *q, request_t *r, uint32_t head, uint64_t bytes_in, uint32_t written,
                           int rc) noexcept nogil:
    cdef uint32_t opcode = r.header.opcode
    cdef op_count_t *count = &q.ops[opcode if opcode < OPCODES_MAX else OPCODES_MAX]
    cdef bint locked = lock_used(q)
    count_u64(&count.requests, 1)
    count_u64(&count.bytes_in, bytes_in)
    count_u64(&count.bytes_out, written)
    if rc < 0:
        count_u64(&count.errors, 1)
    ring_push(&q.ring, <uint16_t>head, written)
    unlock_used(q, locked)
    if r.close_fd >= 0:
        c_close(r.close_fd)


cdef inline void give_back_unanswered(queue_t *q, uint16_t head) noexcept nogil:
    """A chain that has no room for a reply, or is no request."""
    cdef bint locked = lock_used(q)
    count_u64(&q.unanswered, 1)
    ring_push(&q.ring, head, 0)
    unlock_used(q, locked)


cdef inline void call_if_wanted(queue_t *q) noexcept nogil:
    cdef bint locked = lock_used(q)
    cdef bint wanted = ring_wants_call(&q.ring)
    unlock_used(q, locked)
    if wanted:
        call_guest(q)
