"""What the threads of a queue run, and what others do to the ring that one of them has."""

from vfsd.queue._state cimport queue_t, worker_t

cdef enum:
    OWN_THREADS = 2  # of a queue: one serves the ring and one stands by; further ones count as the pool's

# A thread's life, until the queue stops or there are more than are needed.
cdef void serve(queue_t *q, worker_t *w) noexcept nogil
# By the watcher: have another thread go on behind the request that was under way at its last look. False: it is
# under way no more.
cdef bint take_ring(queue_t *q) noexcept nogil
# Work with q.new_memory from now on. Under the gate, when nobody works on what was popped but jobs, which keep their
# memory.
cdef void move_ring(queue_t *q) noexcept nogil
# A thread has ended, under the gate.
cdef void count_ended(queue_t *q) noexcept nogil
