"""Looking at a ring before its thread sleeps: how long, and who else wants the CPU."""

from libc.stdint cimport uint64_t

from vfsd.queue._state cimport queue_t

# Poll the ring for so long. True: there is more. False and q.polling.ns == 0: others want the CPU.
cdef bint poll(queue_t *q, uint64_t ns) noexcept nogil
# Poll the ring for a while before sleeping. True: there is more.
cdef bint look_for_more(queue_t *q) noexcept nogil
# After sleep: poll longer, or less, from now on.
cdef void adapt(queue_t *q, uint64_t now) noexcept nogil
