"""Looking at a ring before its thread sleeps: how long, and who else wants the CPU."""

from libc.stdint cimport uint64_t

from vfsd.queue._state cimport queue_t

cdef extern from *:
    """
    static inline uint64_t ns_by(clockid_t clock)
    {
    	struct timespec now;
    	clock_gettime(clock, &now);
    	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    static inline uint64_t clock_ns(void) { return ns_by(CLOCK_MONOTONIC); }
    /* CPU time of all threads of this process. */
    static inline uint64_t process_ns(void) { return ns_by(CLOCK_PROCESS_CPUTIME_ID); }
    """
    uint64_t clock_ns() noexcept nogil
    uint64_t process_ns() noexcept nogil


# Poll the ring for so long. True: there is more. False and q.poll_ns == 0: others want the CPU.
cdef bint poll(queue_t *q, uint64_t ns) noexcept nogil
# Poll the ring for a while before sleeping. True: there is more.
cdef bint look_for_more(queue_t *q) noexcept nogil
# After sleep: poll longer, or less, from now on.
cdef void adapt(queue_t *q, uint64_t now) noexcept nogil
