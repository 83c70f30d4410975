"""Requests that wait for a guest or a process: parked, without a thread, until they are answered."""

from libc.stdint cimport uint32_t

from vfsd._ring cimport chain_t
from vfsd.memory._regions cimport memory_t
from vfsd.queue._state cimport queue_t
from vfsd.fuse.dispatch cimport request_t

# Room for as many waits as the ring has heads. False: no memory. Memory is taken as it is touched.
cdef bint parks_init(queue_t *q, uint32_t num) noexcept nogil
cdef void parks_free(queue_t *q) noexcept nogil
# Run a request that said WOULD_WAIT once more, now allowed to be completed later.
# memory: where its buffers lie.
cdef void park(queue_t *q, memory_t *memory, chain_t *chain, request_t *r) noexcept nogil
# Answer what any_ready tells of. By the thread that has the ring.
cdef void complete_ready(queue_t *q) noexcept nogil
# The ring has stopped: answer all that wait.
cdef void cancel_parked(queue_t *q) noexcept nogil
