# The clock, the histogram and the contents of files, for every load generator (_common.h).

from libc.stdint cimport uint64_t

cdef extern from "_common.h" nogil:
    enum:
        HIST_BUCKETS
        PAGE_BYTES
    ctypedef struct hist_t:
        uint64_t n
        uint64_t sum
        uint64_t min
        uint64_t max
        uint64_t *counts
    uint64_t now_ns()
    unsigned hist_index(uint64_t ns)
    void hist_add(hist_t *h, uint64_t ns)
    uint64_t scattered(uint64_t i, unsigned bits)
    void page_tags(char *data, uint64_t seed, uint64_t page)
    void page_fill(char *data, uint64_t seed, uint64_t page)
    bint page_tags_right(const char *data, uint64_t seed, uint64_t page)
    bint page_right(const char *data, uint64_t seed, uint64_t page)
    void put_hex8(char *at, uint64_t number)
