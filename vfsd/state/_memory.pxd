"""Memory that a keeper and its servers, one after the other, have at the same addresses.

It is mapped before the first server is forked, so pointers into it hold in each of them.
"""

from libc.errno cimport errno

from vfsd.sys cimport _syscalls as h

import os

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)
    int MADV_REMOVE


cdef inline void *reserve(size_t size) except NULL:
    """Zeroed address space; memory is taken page by page as it is touched. OSError."""
    cdef void *at = h.mmap(NULL, size, h.PROT_READ | h.PROT_WRITE,
                           h.MAP_SHARED | h.MAP_ANONYMOUS | h.MAP_NORESERVE, -1, 0)
    if at == h.MAP_FAILED:
        raise OSError(errno, os.strerror(errno))
    return at


cdef inline void release(void **at, size_t size) noexcept:
    if at[0] != NULL:
        h.munmap(at[0], size)
        at[0] = NULL


cdef inline void make_empty(void *at, size_t size) noexcept nogil:
    """Zeroed again, without memory. `size`: as of reserve()."""
    madvise(at, size, MADV_REMOVE)
