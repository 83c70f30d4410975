"""Time, in nanoseconds."""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <time.h>
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
