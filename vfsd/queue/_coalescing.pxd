"""When the guest is called for several replies at once."""

from libc.stdint cimport uint32_t, uint64_t

from vfsd.queue._state cimport coalescing_t, queue_t
from vfsd.fuse.dispatch cimport request_t


# No reply waits for its call: whoever has left the ring last has seen to that.
cdef void nothing_pending(coalescing_t *c) noexcept nogil
# After n replies that moved so many bytes: whether there is more on the ring, and the call is for later.
# Whoever leaves the ring calls for what is left.
cdef bint coalesce(queue_t *q, uint32_t n, uint64_t moved) noexcept nogil


cdef inline void note_caller(coalescing_t *c, const request_t *r) noexcept nogil:
    """Of each request that is to be answered."""
    if r.streams:
        c.last_pid = r.header.pid
        if c.last_pid == c.pid:
            c.to_others = 0
            if c.pending:
                c.asked_more = True
            return
    c.others_wait = True
