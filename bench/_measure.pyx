"""Histograms and the contents of files for Python: as the load generators count and check."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t
from libc.string cimport memset

include "_common.pxi"

__all__ = ("BUCKETS", "PAGE", "block_at", "count", "fill", "first_wrong", "tags_wrong")

BUCKETS = <int>HIST_BUCKETS
PAGE = <int>PAGE_BYTES


def count(values):
    """Durations in ns, each 0 to 2^64-1: (n, sum, min, max, 64-bit counts of every bucket)."""
    cdef hist_t h
    memset(&h, 0, sizeof(h))
    for value in values:
        hist_add(&h, value)
    return h.n, h.sum, h.min, h.max, PyBytes_FromStringAndSize(<char *>h.counts, HIST_BUCKETS * 8)


def block_at(uint64_t i, unsigned bits):
    """Which of 2^bits blocks a scattered order has at place i."""
    return scattered(i, bits)


def fill(unsigned char[::1] data not None, uint64_t seed, uint64_t page):
    """Make `data`, whole pages, the file's contents from that page on."""
    cdef Py_ssize_t at
    for at in range(0, data.shape[0] // PAGE_BYTES * PAGE_BYTES, 4096):
        page_fill(<char *>&data[at], seed, page)
        page += 1


def first_wrong(const unsigned char[::1] data not None, uint64_t seed, uint64_t page):
    """The first byte of the first page that is not the file's contents from `page` on; -1 if none."""
    cdef Py_ssize_t at
    for at in range(0, data.shape[0] // PAGE_BYTES * PAGE_BYTES, 4096):
        if not page_right(<const char *>&data[at], seed, page):
            return at
        page += 1
    return -1


def tags_wrong(const unsigned char[::1] data not None, uint64_t seed, uint64_t page):
    """The same, looking only at the first and last word of each page."""
    cdef Py_ssize_t at
    for at in range(0, data.shape[0] // PAGE_BYTES * PAGE_BYTES, 4096):
        if not page_tags_right(<const char *>&data[at], seed, page):
            return at
        page += 1
    return -1
