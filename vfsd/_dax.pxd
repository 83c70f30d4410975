"""The DAX window: which of its ranges hold which part of which file, for the daemon and the guest.

A window of n ranges of the same size. A range is free, claimed (taken by somebody, holds nothing),
or mapped: part of a mapping, which is a run of ranges that hold as long a part of one inode. A
mapping is known by the number of its first range. The guest's ranges are 2 MiB and its mappings one
range each; the daemon's are pages and its mappings as long as the guest asked for.

Tier 1 (the cdef functions below) takes no GIL, allocates nothing and raises nothing: >= 0 is success,
< 0 is -errno. File offsets and lengths are in ranges. Nothing here locks: whoever shares a table
between threads without the GIL has a lock of his own around each call.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vfsd._dax_intervals cimport mapping_t

cdef enum:
    RANGES_MAX = 1 << 28


cdef struct dax_t:
    uint32_t n             # ranges
    uint32_t n_free        # ranges
    uint32_t n_mapped      # mappings
    uint32_t n_busy        # mappings with references
    uint64_t allocated     # ranges handed out by dax_alloc, since the beginning
    uint64_t stolen        # mappings taken by dax_steal
    uint64_t split         # mappings cut in two
    uint64_t merged        # pairs of mappings made one
    uint32_t root
    uint32_t oldest
    uint32_t newest
    uint32_t hint          # where dax_alloc looks first
    uint64_t seed
    mapping_t *nodes       # n + 1: node i + 1 is the mapping that begins with range i
    uint32_t *first        # node of the mapping that a range is part of, 0: none
    uint64_t *free         # bitmaps, one bit a range: neither claimed nor mapped
    uint64_t *busy         # part of a mapping with references
    uint64_t *writable     # part of a writable mapping


# --- both sides. Constant time, or the logarithm of the number of mappings, unless it says otherwise.

# The range of the window that holds that file offset of the inode; -ENOENT. Where file offsets are
# mapped more than once: one of the ranges.
cdef int64_t dax_find(dax_t *d, uint64_t inode, uint64_t foffset) noexcept nogil
# The mapping that a range is part of; -ENOENT, -EINVAL outside.
cdef int64_t dax_at(dax_t *d, uint64_t index) noexcept nogil
# The first mapping with a range in [start, end), for walking over them; -ENOENT. Time grows with the
# ranges passed, 64 at a time while they are free.
cdef int64_t dax_next(dax_t *d, uint64_t start, uint64_t end) noexcept nogil
# The first mapping of the inode, in the order of the file, at or behind (foffset, range); -ENOENT.
cdef int64_t dax_next_of(dax_t *d, uint64_t inode, uint64_t foffset, uint64_t index) noexcept nogil
# n ranges, free or claimed, hold the inode from foffset on. 0; -EINVAL outside or empty, -EEXIST
# one of them is mapped. Time grows with n.
cdef int dax_map(dax_t *d, uint64_t index, uint64_t n, uint64_t inode, uint64_t foffset,
                 bint writable) noexcept nogil
# The mapping that begins there is gone; its ranges are free, or claimed if keep. 0; -ENOENT, -EBUSY.
cdef int dax_unmap(dax_t *d, uint64_t index, bint keep) noexcept nogil
# The mapping around that range becomes two, the second begins there. 0, also when it does already;
# -ENOENT, -EBUSY.
cdef int dax_split(dax_t *d, uint64_t index) noexcept nogil
# The mapping and the one before it become one, if they adjoin in the window and in the file, and are
# equally writable. 1 done, 0 not so; -ENOENT no mapping begins there, -EBUSY.
cdef int dax_merge(dax_t *d, uint64_t index) noexcept nogil
# Reads that became writes: the mapping is writable from now on. 0; -ENOENT.
cdef int dax_set_writable(dax_t *d, uint64_t index) noexcept nogil

# --- the guest: ranges come and go one by one

# A free range, now claimed, in turn; -ENOSPC.
cdef int64_t dax_alloc(dax_t *d) noexcept nogil
# A claimed range is free again. 0; -EINVAL: it was not claimed.
cdef int dax_release(dax_t *d, uint64_t index) noexcept nogil
# One more, or one less, that uses the mapping which begins there. 0; -ENOENT; put: -EINVAL not used.
cdef int dax_get(dax_t *d, uint64_t index) noexcept nogil
cdef int dax_put(dax_t *d, uint64_t index) noexcept nogil
# The first idle mapping of the inode in the order of the file is unmapped, its ranges are claimed: its
# first range; -ENOENT it has none, -EBUSY none is idle. Time grows with the busy ones before it.
cdef int64_t dax_steal(dax_t *d, uint64_t inode) noexcept nogil
# The mapping made or touched longest ago that is idle; -ENOENT. Time grows with the busy ones.
cdef int64_t dax_oldest_idle(dax_t *d) noexcept nogil
# As if it had been made now. 0; -ENOENT.
cdef int dax_touch(dax_t *d, uint64_t index) noexcept nogil


cdef class Window:
    cdef dax_t d
    cdef readonly uint64_t size        # bytes
    cdef readonly uint64_t range_size  # bytes
    cdef uint32_t shift
    cdef uint64_t[::1] free_words
    cdef uint64_t[::1] busy_words
    cdef uint64_t[::1] writable_words
    cdef uint32_t[::1] first_nodes

    cdef uint64_t ranges(self, uint64_t offset, str what) except? -1
    cdef object mapping(self, int64_t index)
