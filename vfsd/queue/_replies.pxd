"""What a queue gives back: the used element, its counters, the call.

Here is what runs for every request, so that it is compiled into its caller.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd._ring cimport ring_push, ring_wants_call
from vfsd.queue._notify cimport notify_call
from vfsd.sys._threads cimport pthread_mutex_lock, pthread_mutex_unlock
from vfsd.queue._state cimport op_count_t, queue_t
from vfsd.state._journal cimport (
    FAIL_CLEARED, FAIL_DONE, FAIL_PUSHED, FAIL_RAN, journal_done, journal_pushed, reach,
)
from vfsd.fuse.dispatch cimport OPCODES_MAX, request_reply, request_t

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    int load_relaxed_int(const int *p)
    void store_relaxed_int(int *p, int v)
    void store_release_int(int *p, int v)
    void count_u64(uint64_t *p, uint64_t v)
    void light_fence()

cdef extern from "_syscalls.h" nogil:
    int c_close "sys_close"(int fd)

# How to end what begin_on_ring began.
cdef enum:
    NOT_ON_RING
    ALONE_ON_RING
    LOCKED_ON_RING


cdef inline int begin_on_ring(queue_t *q) noexcept nogil:
    """Take the ring, its counters and what is to be written to the guest. NOT_ON_RING: it is another's by now.

    Only the thread that has the ring makes jobs: while there are none it is alone, and only has to see to it
    that the ring is not abandoned in the middle (Queue.stop, which passes the other side of the fence).
    """
    if load_acquire_int(&q.jobs_live):
        pthread_mutex_lock(&q.used_lock)
        if not load_relaxed_int(&q.abandoned):
            return LOCKED_ON_RING
        pthread_mutex_unlock(&q.used_lock)
        return NOT_ON_RING
    store_relaxed_int(&q.on_ring, 1)
    light_fence()
    if not load_relaxed_int(&q.abandoned):
        return ALONE_ON_RING
    store_release_int(&q.on_ring, 0)
    return NOT_ON_RING


cdef inline void end_on_ring(queue_t *q, int how) noexcept nogil:
    if how == LOCKED_ON_RING:
        pthread_mutex_unlock(&q.used_lock)
    elif how == ALONE_ON_RING:
        store_release_int(&q.on_ring, 0)


cdef inline void count_request(queue_t *q, request_t *r, uint64_t bytes_in, uint32_t written, int rc) noexcept nogil:
    cdef uint32_t opcode = r.header.opcode
    cdef op_count_t *count = &q.counters.ops[opcode if opcode < OPCODES_MAX else OPCODES_MAX]
    count_u64(&count.requests, 1)
    count_u64(&count.bytes_in, bytes_in)
    count_u64(&count.bytes_out, written)
    if rc < 0:
        count_u64(&count.errors, 1)


cdef inline void push(queue_t *q, uint16_t head, uint32_t written, uint32_t opcode) noexcept nogil:
    """Give a chain back, between begin_on_ring and end_on_ring. opcode: 0 where none is known."""
    reach(q.dispatch.failpoint, FAIL_RAN, opcode)
    journal_done(q.journal, head, written, <uint16_t>(q.ring.used_idx + 1))
    reach(q.dispatch.failpoint, FAIL_DONE, opcode)
    ring_push(&q.ring, head, written)
    reach(q.dispatch.failpoint, FAIL_PUSHED, opcode)
    journal_pushed(q.journal, head)
    reach(q.dispatch.failpoint, FAIL_CLEARED, opcode)


cdef inline void complete_request(queue_t *q, request_t *r, uint32_t head, uint64_t bytes_in, int rc) noexcept nogil:
    """Write the reply, count, give the chain back."""
    cdef int how = begin_on_ring(q)
    cdef uint32_t written
    if how != NOT_ON_RING:
        written = request_reply(r, rc)
        count_request(q, r, bytes_in, written, rc)
        push(q, <uint16_t>head, written, r.header.opcode)
        end_on_ring(q, how)
    if r.close_fd >= 0:
        c_close(r.close_fd)


cdef inline void complete_unanswered(queue_t *q, uint16_t head) noexcept nogil:
    """Give back a chain that has no room for a reply, or is no request."""
    cdef int how = begin_on_ring(q)
    if how != NOT_ON_RING:
        count_u64(&q.counters.unanswered, 1)
        push(q, head, 0, 0)
        end_on_ring(q, how)


cdef inline void call_guest(queue_t *q) noexcept nogil:
    notify_call(q.notify, &q.stop)


cdef inline void call_if_wanted(queue_t *q) noexcept nogil:
    cdef int how = begin_on_ring(q)
    cdef bint wanted
    if how == NOT_ON_RING:
        return
    wanted = ring_wants_call(&q.ring)
    end_on_ring(q, how)
    if wanted:
        call_guest(q)
