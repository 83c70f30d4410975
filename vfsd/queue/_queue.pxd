"""The thread of one virtqueue: wait, pop, dispatch, push, call."""

from vfsd.memory._regions cimport iovec
from vfsd.queue._state cimport queue_t


cdef class Queue:
    cdef queue_t q
    cdef readonly int index
    cdef readonly str name
    cdef readonly bint started
    cdef readonly int num     # elements of the ring
    cdef object dispatch
    cdef object pool
    cdef object memory
    cdef list threads
    cdef iovec *iov

    cdef int watch(self, int fd, int what) except -1
    cdef void wake(self) noexcept
    cdef int add_thread(self) except -1
    cdef void wait_jobs(self, bint jobs=*) noexcept
