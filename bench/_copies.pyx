"""Copies out of memory that a file is mapped into: a guest's with DAX, and the host's."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdlib cimport free, malloc

include "_common.pxi"

__all__ = ("measure",)

cdef enum:
    TOGETHER = 64  # small copies that are timed together, because the clock takes as long as one


cdef uint64_t batch(const char *memory, char *into, size_t block, uint64_t blocks, unsigned bits,
                    bint scatter, uint64_t first, unsigned n, uint64_t seed) noexcept nogil:
    """Copies n blocks; how many of their pages were wrong."""
    cdef uint64_t i, at, wrong = 0
    cdef size_t page
    for i in range(first, first + n):
        at = i & (blocks - 1)
        if scatter:
            at = scattered(at, bits)
        memcpy(into, memory + at * block, block)
        for page in range(0, block, 4096):
            if not page_tags_right(into + page, seed, (at * block + page) // 4096):
                wrong += 1
    return wrong


def measure(memory, size_t block, bint scattered_order, double seconds, uint64_t seed):
    """Copy blocks for so long: (ns, wrong pages, histogram as _measure.count gives it)."""
    cdef Py_buffer b
    cdef hist_t h
    cdef uint64_t blocks = 0, start = 0, now = 0, end, wrong = 0, done = 0, each
    cdef unsigned bits, i
    cdef unsigned n = TOGETHER if block == 4096 else 1
    cdef char *into = <char *>malloc(block)
    if into == NULL:
        raise MemoryError
    memset(&h, 0, sizeof(h))
    PyObject_GetBuffer(memory, &b, PyBUF_SIMPLE)
    try:
        if block == 0 or block % 4096 or <size_t>b.len < block:
            raise ValueError("blocks are whole pages")
        bits = (<size_t>b.len // block).bit_length() - 1
        blocks = <uint64_t>1 << bits
        with nogil:
            start = now = now_ns()
            end = start + <uint64_t>(seconds * 1e9)
            while now < end:
                wrong += batch(<const char *>b.buf, into, block, blocks, bits, scattered_order, done, n, seed)
                done += n
                each = now
                now = now_ns()
                each = (now - each) // n
                i = 0
                while i < n:
                    hist_add(&h, each)
                    i += 1
    finally:
        PyBuffer_Release(&b)
        free(into)
    counts = PyBytes_FromStringAndSize(<char *>h.counts, HIST_BUCKETS * 8)
    return now - start, wrong, (h.n, h.sum, h.min, h.max, counts)
