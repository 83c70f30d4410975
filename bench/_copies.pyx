"""Copies out of memory that a file is mapped into: a guest's with DAX, and the host's; and by pread(2)."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.errno cimport errno
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdlib cimport free

import os

include "_common.pxi"

__all__ = ("measure", "measure_reads")

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t n)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *into, size_t n, long offset)

cdef enum:
    TOGETHER = 64  # small copies that are timed together, because the clock takes as long as one


# Where blocks come from: memory, or a descriptor if it is NULL.
cdef struct source_t:
    const char *memory
    int fd
    size_t block
    uint64_t blocks
    unsigned bits
    bint scatter
    uint64_t seed


cdef int64_t batch(const source_t *s, char *into, uint64_t first, unsigned n) noexcept nogil:
    """Copies n blocks; how many of their pages were wrong, -1 with errno."""
    cdef uint64_t i, at
    cdef int64_t wrong = 0
    cdef size_t page
    for i in range(first, first + n):
        at = i & (s.blocks - 1)
        if s.scatter:
            at = scattered(at, s.bits)
        if s.memory != NULL:
            memcpy(into, s.memory + at * s.block, s.block)
        elif pread(s.fd, into, s.block, <long>(at * s.block)) != <ssize_t>s.block:
            return -1
        for page in range(0, s.block, 4096):
            if not page_tags_right(into + page, s.seed, (at * s.block + page) // 4096):
                wrong += 1
    return wrong


cdef run(source_t *s, size_t size, double seconds):
    cdef hist_t h
    cdef uint64_t start = 0, now = 0, end, done = 0, each
    cdef int64_t wrong = 0, bad = 0
    cdef unsigned i
    cdef int error = 0
    cdef unsigned n = TOGETHER if s.block == 4096 and s.memory != NULL else 1
    cdef char *into
    if s.block == 0 or s.block % 4096 or size < s.block:
        raise ValueError("blocks are whole pages")
    s.bits = (size // s.block).bit_length() - 1
    s.blocks = <uint64_t>1 << s.bits
    into = <char *>aligned_alloc(4096, s.block)
    if into == NULL:
        raise MemoryError
    memset(&h, 0, sizeof(h))
    with nogil:
        start = now = now_ns()
        end = start + <uint64_t>(seconds * 1e9)
        while now < end and bad >= 0:
            bad = batch(s, into, done, n)
            error = errno
            wrong += bad
            done += n
            each = now
            now = now_ns()
            each = (now - each) // n
            i = 0
            while i < n:
                hist_add(&h, each)
                i += 1
        free(into)
    if bad < 0:
        raise OSError(error, os.strerror(error))
    counts = PyBytes_FromStringAndSize(<char *>h.counts, HIST_BUCKETS * 8)
    return now - start, wrong, (h.n, h.sum, h.min, h.max, counts)


def measure(memory, size_t block, bint scattered_order, double seconds, uint64_t seed):
    """Copy blocks for so long: (ns, wrong pages, histogram as _measure.count gives it)."""
    cdef Py_buffer b
    cdef source_t s
    PyObject_GetBuffer(memory, &b, PyBUF_SIMPLE)
    try:
        s.memory, s.fd = <const char *>b.buf, -1
        s.block, s.scatter, s.seed = block, scattered_order, seed
        return run(&s, <size_t>b.len, seconds)
    finally:
        PyBuffer_Release(&b)


def measure_reads(int fd, size_t block, bint scattered_order, double seconds, uint64_t seed):
    """The same by pread(2), into memory that is aligned for O_DIRECT. OSError."""
    cdef source_t s
    s.memory, s.fd = NULL, fd
    s.block, s.scatter, s.seed = block, scattered_order, seed
    return run(&s, <size_t>os.fstat(fd).st_size, seconds)
