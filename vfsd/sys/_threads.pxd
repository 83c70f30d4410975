"""POSIX threads, for code that runs without the GIL."""

from libc.stdint cimport uint64_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *m, const void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *m)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)
    int pthread_cond_init(pthread_cond_t *c, const void *attr)
    int pthread_cond_destroy(pthread_cond_t *c)
    int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
    int pthread_cond_signal(pthread_cond_t *c)
    int pthread_cond_broadcast(pthread_cond_t *c)
    int sched_yield()

cdef extern from * nogil:
    """
    #ifndef VFSD_COND_MONOTONIC
    #define VFSD_COND_MONOTONIC
    #include <errno.h>
    #include <pthread.h>
    #include <stdint.h>
    #include <time.h>
    static inline int cond_init_monotonic(pthread_cond_t *c)
    {
    	pthread_condattr_t attr;
    	int rc;
    	pthread_condattr_init(&attr);
    	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    	rc = pthread_cond_init(c, &attr);
    	pthread_condattr_destroy(&attr);
    	return rc;
    }
    static inline int cond_wait_ns(pthread_cond_t *c, pthread_mutex_t *m, uint64_t ns)
    {
    	struct timespec at;
    	clock_gettime(CLOCK_MONOTONIC, &at);
    	ns += (uint64_t)at.tv_nsec;
    	at.tv_sec += (time_t)(ns / 1000000000u);
    	at.tv_nsec = (long)(ns % 1000000000u);
    	return pthread_cond_timedwait(c, m, &at) == ETIMEDOUT;
    }
    #endif
    """
    # A condition whose waits end by CLOCK_MONOTONIC, as cond_wait_ns wants it.
    int cond_init_monotonic(pthread_cond_t *c)
    # pthread_cond_wait for at most ns nanoseconds: whether they are over.
    bint cond_wait_ns(pthread_cond_t *c, pthread_mutex_t *m, uint64_t ns)
