"""The tables after the death of the server that worked with them.

One word of each slot is the truth: an inode is there while it is referenced and looked up, a handle while it is
open and referenced. All else (chains, free lists, counters, bitmaps, locks) is made anew from these.
"""

from libc.stdint cimport int64_t, uint64_t

from vfsd.hostfs.table._slots cimport tables_t

# Bits of descriptors, by number.
cdef struct fd_set_t:
    uint64_t *bits
    int64_t n

# Make them whole. No thread works with them. Without memory for long names, those are lost: -ENOMEM.
cdef int tables_recover(tables_t *t) noexcept nogil
# Before that: close the handle, and take back the lookup, of a request that has not been answered. 0: none.
cdef void drop_unanswered(tables_t *t, uint64_t fh, uint64_t nodeid) noexcept nogil
# Every descriptor that the tables name.
cdef void tables_descriptors(const tables_t *t, fd_set_t *known) noexcept nogil
# Close every descriptor of this process that is not known. Those from known.n on are none.
cdef void close_unknown(const fd_set_t *known) noexcept nogil


cdef inline void note_fd(fd_set_t *known, int fd) noexcept nogil:
    if 0 <= fd < known.n:
        known.bits[fd >> 6] |= <uint64_t>1 << (fd & 63)
