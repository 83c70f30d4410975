"""What a queue gives back: the used element, its counters, the call.

Here is what runs for every request, so that it is compiled into its caller.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd._ring cimport ring_push, ring_wants_call
from vfsd._threads cimport pthread_mutex_lock, pthread_mutex_unlock
from vfsd._virtqueue cimport op_count_t, queue_t
from vfsd.fuse.dispatch cimport OPCODES_MAX, request_reply, request_t

cdef extern from "_atomics.h" nogil:
    void count_u64(uint64_t *p, uint64_t v)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)


# Call the guest, if it has given a descriptor for it.
cdef void call_guest(queue_t *q) noexcept nogil


cdef inline void finish(queue_t *q, request_t *r, uint32_t head, uint64_t bytes_in, int rc) noexcept nogil:
    """Write the reply, count, give the chain back."""
    give_back(q, r, head, bytes_in, request_reply(r, rc), rc)


cdef inline void give_back(queue_t *q, request_t *r, uint32_t head, uint64_t bytes_in, uint32_t written,
                           int rc) noexcept nogil:
    cdef uint32_t opcode = r.header.opcode
    cdef op_count_t *count = &q.ops[opcode if opcode < OPCODES_MAX else OPCODES_MAX]
    pthread_mutex_lock(&q.used_lock)
    count_u64(&count.requests, 1)
    count_u64(&count.bytes_in, bytes_in)
    count_u64(&count.bytes_out, written)
    if rc < 0:
        count_u64(&count.errors, 1)
    ring_push(&q.ring, <uint16_t>head, written)
    pthread_mutex_unlock(&q.used_lock)
    if r.close_fd >= 0:
        c_close(r.close_fd)


cdef inline void give_back_unanswered(queue_t *q, uint16_t head) noexcept nogil:
    """A chain that has no room for a reply, or is no request."""
    pthread_mutex_lock(&q.used_lock)
    count_u64(&q.unanswered, 1)
    ring_push(&q.ring, head, 0)
    pthread_mutex_unlock(&q.used_lock)


cdef inline void call_if_wanted(queue_t *q) noexcept nogil:
    cdef bint wanted
    pthread_mutex_lock(&q.used_lock)
    wanted = ring_wants_call(&q.ring)
    pthread_mutex_unlock(&q.used_lock)
    if wanted:
        call_guest(q)
