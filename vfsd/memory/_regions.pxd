"""A guest's memory, mapped into this process, and its addresses.

Here is what runs for each descriptor, so that it is compiled into the ring's walk.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from vfsd.sys._uio cimport iovec


cdef extern from "_guard.h" nogil:
    struct guard:
        int users
        int sock
        int torn

cdef enum:
    REGIONS_MAX = 512     # 509 slots are offered; the rest is head-room for SET_MEM_TABLE
    POPULATE_MIN = 65536  # bytes of a buffer


# What is mapped of one file. Unmapped when the last table that lists it goes.
cdef struct mapping_t:
    int users
    char *base
    uint64_t bytes
    uint64_t page        # bytes: the file system's
    uint64_t *populated  # a bit for each page that memory_populate() has been at; NULL: leave it alone
    void *watched        # its guard_area, NULL: not watched


cdef struct region_t:
    uint64_t gpa   # guest physical address
    uint64_t size  # bytes
    uint64_t uva   # front end's user address
    char *host     # where it is mapped here
    bint may_shrink   # the file may end before the region does: only system calls may touch it
    mapping_t *mapping


# A guest's memory at one time. It never changes: a change is another table, and who works with the old one
# keeps it, and what it lists mapped, until he is done.
cdef struct memory_t:
    int users
    uint32_t n
    bint incomplete       # the guest has memory that is not mapped here: chain_t.unmapped
    guard *watched_by  # its `torn`: zeroes lie where memory was
    region_t *regions  # n, sorted by gpa, behind this


cdef memory_t *memory_keep(memory_t *m) noexcept nogil
cdef void memory_drop(memory_t *m) noexcept nogil

# Host address of [uva, uva + size) if one region holds it all and it is aligned to `align`, else NULL.
cdef char *memory_from_uva(const memory_t *m, uint64_t uva, uint64_t size, uint32_t align) noexcept nogil

# Map the pages of buffers of POPULATE_MIN and more that are about to be written, the first time, all at once:
# a page fault for each of them costs more.
cdef void memory_populate(const memory_t *m, const iovec *iov, uint32_t n) noexcept nogil


cdef inline int memory_find(const memory_t *m, uint64_t gpa, uint32_t hint) noexcept nogil:
    """Index of the region that holds gpa, -1 for none. hint: the region to try first."""
    cdef uint32_t low = 0, high = m.n, mid
    if hint < m.n and gpa - m.regions[hint].gpa < m.regions[hint].size:
        return <int>hint
    while low < high:
        mid = (low + high) >> 1
        if m.regions[mid].gpa <= gpa:
            low = mid + 1
        else:
            high = mid
    if low == 0 or gpa - m.regions[low - 1].gpa >= m.regions[low - 1].size:
        return -1
    return <int>(low - 1)


cdef inline char *region_part(const memory_t *m, int i, uint64_t offset, uint64_t size,
                              uint32_t align) noexcept nogil:
    cdef char *host = m.regions[i].host + offset
    if m.regions[i].may_shrink or offset >= m.regions[i].size or size > m.regions[i].size - offset:
        return NULL
    return host if <uintptr_t>host % align == 0 else NULL


cdef inline char *memory_from_gpa(const memory_t *m, uint64_t gpa, uint64_t size,
                                  uint32_t align) noexcept nogil:
    """memory_from_uva() by guest physical address."""
    cdef int i = memory_find(m, gpa, 0)
    return NULL if i < 0 else region_part(m, i, gpa - m.regions[i].gpa, size, align)


cdef class GuestMemory:
    cdef memory_t *table
    cdef guard *guard
    cdef int use(self, memory_t *table) except -1
    cdef memory_t *with_region(self, int fd, const region_t *region, uint64_t offset) except NULL
    cdef int check_free(self, uint64_t gpa, uint64_t size, uint64_t uva) except -1
    cdef int copy(self, uint64_t gpa, char *data, uint64_t size, bint to_guest) except -1
