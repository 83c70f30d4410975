"""Requests with buffers in files that may end any time: what they work on is a copy."""

from vfsd._ring cimport chain_t
from vfsd.queue._state cimport queue_t

# One request of such a chain, from parse to used element.
cdef void serve_bounced(queue_t *q, chain_t *chain) noexcept nogil
cdef void bounce_free(queue_t *q) noexcept nogil
