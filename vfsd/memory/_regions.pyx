"""A guest's memory, mapped into this process, and its addresses."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport INT64_MAX, UINT64_MAX, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.mman cimport (
    MAP_FAILED, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.unistd cimport _SC_PAGESIZE, sysconf


cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_t "statfs":
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs_t *buf)


cdef extern from "_atomics.h" nogil:
    uint64_t load_relaxed_u64(const uint64_t *p)
    void set_bits_u64(uint64_t *p, uint64_t bits)


cdef extern from *:
    """
    #include <sys/mman.h>
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23  /* Linux 5.14; EINVAL before */
    #endif
    """
    int MADV_POPULATE_WRITE


cdef extern from "_guard.h" nogil:
    struct guard_area:
        pass
    int guard_install()
    guard_area *guard_watch(char *start, size_t size, size_t page, int prot, int sock)
    void guard_forget(guard_area *a)
    uint64_t guard_torn(guard_area *a)


cdef long HUGETLBFS_MAGIC = 0x958458f6

globals().update(REGIONS_MAX=REGIONS_MAX)


cdef char *memory_from_uva(const memory_t *m, uint64_t uva, uint64_t size, uint32_t align) noexcept nogil:
    cdef uint32_t i
    for i in range(m.n):
        if uva - m.regions[i].uva < m.regions[i].size:
            return region_part(m, <int>i, uva - m.regions[i].uva, size, align)
    return NULL


cdef bint first_time(uint64_t *bits, uint64_t first, uint64_t last) noexcept nogil:
    """Set these bits. True: some were not."""
    cdef uint64_t word, mask
    cdef bint found = False
    for word in range(first >> 6, (last >> 6) + 1):
        mask = UINT64_MAX
        if word == first >> 6:
            mask &= UINT64_MAX << (first & 63)
        if word == last >> 6:
            mask &= UINT64_MAX >> (63 - (last & 63))
        if load_relaxed_u64(&bits[word]) & mask != mask:
            set_bits_u64(&bits[word], mask)
            found = True
    return found


cdef void populate(const region_t *region, uint64_t offset, uint64_t size) noexcept nogil:
    """Where it fails, as it does where there is no memory, the access will, or will not."""
    cdef uint64_t skew = <uintptr_t>region.host % region.page
    cdef uint64_t first = (offset + skew) // region.page, last = (offset + skew + size - 1) // region.page
    if first_time(region.populated, first, last):
        madvise(region.host - skew + first * region.page, (last - first + 1) * region.page, MADV_POPULATE_WRITE)


cdef void memory_populate(const memory_t *m, const iovec *iov, uint32_t n) noexcept nogil:
    cdef uint64_t offset
    cdef uint32_t i, k
    for i in range(n):
        if iov[i].iov_len < POPULATE_MIN:
            continue
        for k in range(m.n):
            offset = <uintptr_t>iov[i].iov_base - <uintptr_t>m.regions[k].host
            if offset < m.regions[k].size:
                if m.regions[k].populated != NULL:
                    populate(&m.regions[k], offset, min(iov[i].iov_len, m.regions[k].size - offset))
                break


@cython.final
cdef class GuestMemory:
    """Memory regions of a guest, mapped into this process.

    The table may only be changed while no ring uses it: a ring holds host addresses of its
    parts, and a chain popped from it those of its data. remove and clear raise BufferError
    while a memoryview of a DeviceRing exists.
    """

    def __cinit__(self):
        self.sock = -1

    def __dealloc__(self):
        while self.table.n:
            self.unmap(self.table.n - 1)

    def __len__(self):
        return self.table.n

    def set_partial(self, bint partial):
        """Whether the guest may have memory that is not mapped here: an address outside of every region
        then ends that chain early, not the ring."""
        self.table.partial = partial

    def guard(self, int sock):
        """Let no missing page of what is added from now on end this process: it is replaced by zeroes.

        That can happen where a file was cut off after it was mapped, or where there is no memory for it.
        sock: is shut for reading then; stays open until clear(). OSError when there can be no handler.
        """
        if guard_install() < 0:
            PyErr_SetFromErrno(OSError)
        self.sock = sock

    @property
    def torn(self):
        """Pages of the guarded memory that were missing and have been replaced."""
        cdef uint64_t pages = self.lost
        cdef uint32_t i
        for i in range(self.table.n):
            if self.watched[i] != NULL:
                pages += guard_torn(<guard_area *>self.watched[i])
        return pages

    def add(self, int fd, uint64_t gpa, uint64_t size, uint64_t uva, uint64_t offset, bint fragile=False):
        """Map size bytes of fd from offset. The descriptor stays the caller's: close it any time.

        fragile: the file may be shorter, or writable for others only. No ring may lie there.
        """
        cdef memory_t *m = &self.table
        cdef uint64_t page, start, length
        cdef uint32_t i
        cdef void *base
        cdef void *area = NULL
        cdef uint64_t *populated = NULL
        self.check_free(gpa, size, uva)
        if offset > <uint64_t>INT64_MAX or size > <uint64_t>INT64_MAX - offset:
            raise ValueError(f"memory region: offset {offset:#x} + size {size:#x} overflows")
        page = file_page(fd, 0 if fragile else offset + size)
        start = offset // page * page
        length = (offset - start + size + page - 1) // page * page
        base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <int64_t>start)
        if base == MAP_FAILED and fragile:
            base = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, <int64_t>start)
        if base == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        if self.sock >= 0 and not fragile:
            area = self.watch(<char *>base, length, page)
        if not fragile and page == <uint64_t>sysconf(_SC_PAGESIZE):
            # Without it, for want of memory, pages are mapped one by one.
            populated = <uint64_t *>calloc(length // page // 64 + 1, sizeof(uint64_t))
        i = m.n
        while i > 0 and m.regions[i - 1].gpa > gpa:
            m.regions[i] = m.regions[i - 1]
            self.mapped[i] = self.mapped[i - 1]
            self.watched[i] = self.watched[i - 1]
            i -= 1
        m.regions[i] = region_t(gpa, size, uva, <char *>base + (offset - start), fragile, page, populated)
        self.mapped[i].iov_base = base
        self.mapped[i].iov_len = length
        self.watched[i] = area
        m.n += 1

    cdef void *watch(self, char *base, uint64_t length, uint64_t page) except NULL:
        cdef guard_area *area = guard_watch(base, length, page, PROT_READ | PROT_WRITE, self.sock)
        if area == NULL:
            munmap(base, length)
            raise MemoryError
        return area

    cdef int check_free(self, uint64_t gpa, uint64_t size, uint64_t uva) except -1:
        cdef uint32_t i
        if size == 0:
            raise ValueError(f"memory region at {gpa:#x} has size 0")
        if size > UINT64_MAX - gpa:
            raise ValueError(f"memory region: guest address {gpa:#x} + size {size:#x} overflows")
        if size > UINT64_MAX - uva:
            raise ValueError(f"memory region: user address {uva:#x} + size {size:#x} overflows")
        if self.table.n == REGIONS_MAX:
            raise ValueError(f"more than {REGIONS_MAX} memory regions")
        for i in range(self.table.n):
            if overlaps(gpa, self.table.regions[i].gpa, size, self.table.regions[i].size):
                raise ValueError(f"memory region at guest address {gpa:#x} overlaps another")
            if overlaps(uva, self.table.regions[i].uva, size, self.table.regions[i].size):
                raise ValueError(f"memory region at user address {uva:#x} overlaps another")
        return 0

    def remove(self, uint64_t gpa, uint64_t size, uint64_t uva):
        """Unmap the region with exactly these numbers."""
        cdef memory_t *m = &self.table
        cdef int i = memory_find(m, gpa, 0)
        if i < 0 or m.regions[i].gpa != gpa or m.regions[i].size != size or m.regions[i].uva != uva:
            raise ValueError(f"no memory region at {gpa:#x}, size {size:#x}, user address {uva:#x}")
        self.check_unused()
        self.unmap(<uint32_t>i)

    def clear(self):
        """Unmap all regions."""
        self.check_unused()
        while self.table.n:
            self.unmap(self.table.n - 1)

    cdef int check_unused(self) except -1:
        if self.views:
            raise BufferError("guest memory is in use by a memoryview")
        return 0

    cdef void unmap(self, uint32_t i) noexcept:
        if self.watched[i] != NULL:
            self.lost += guard_torn(<guard_area *>self.watched[i])
            guard_forget(<guard_area *>self.watched[i])
        munmap(self.mapped[i].iov_base, self.mapped[i].iov_len)
        free(self.table.regions[i].populated)
        self.table.n -= 1
        self.table.removals += 1
        for i in range(i, self.table.n):
            self.table.regions[i] = self.table.regions[i + 1]
            self.mapped[i] = self.mapped[i + 1]
            self.watched[i] = self.watched[i + 1]

    def regions(self):
        """(gpa, size, uva) of each region, by gpa."""
        cdef list result = []
        cdef uint32_t i
        for i in range(self.table.n):
            result.append((self.table.regions[i].gpa, self.table.regions[i].size, self.table.regions[i].uva))
        return result

    def read(self, uint64_t gpa, uint64_t size):
        """Copy of size bytes at gpa; may cross regions that follow each other."""
        cdef bytes data
        self.copy(gpa, NULL, size, False)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        self.copy(gpa, PyBytes_AS_STRING(data), size, False)
        return data

    def write(self, uint64_t gpa, bytes data not None):
        """Copy data to gpa; all or nothing."""
        self.copy(gpa, NULL, <uint64_t>len(data), True)
        self.copy(gpa, PyBytes_AS_STRING(data), <uint64_t>len(data), True)

    cdef int copy(self, uint64_t gpa, char *data, uint64_t size, bint to_guest) except -1:
        """data NULL: only check the range."""
        cdef const memory_t *m = &self.table
        cdef uint64_t done = 0, n
        cdef char *host
        cdef int i
        while done < size:
            i = memory_find(m, gpa + done, 0) if gpa + done >= gpa else -1
            if i < 0:
                raise ValueError(f"{size} bytes at {gpa:#x} are not all in guest memory")
            n = min(size - done, m.regions[i].size - (gpa + done - m.regions[i].gpa))
            host = m.regions[i].host + (gpa + done - m.regions[i].gpa)
            if data != NULL and to_guest:
                memcpy(host, data + done, n)
            elif data != NULL:
                memcpy(data + done, host, n)
            done += n
        return 0


cdef inline bint overlaps(uint64_t a, uint64_t b, uint64_t a_size, uint64_t b_size) noexcept nogil:
    return a < b + b_size and b < a + a_size


cdef uint64_t file_page(int fd, uint64_t end) except 0:
    """What a mapping's offset and length must be multiples of; the file must reach to end."""
    cdef struct_stat st
    cdef statfs_t fs
    if fstat(fd, &st) < 0 or fstatfs(fd, &fs) < 0:
        PyErr_SetFromErrno(OSError)
    if S_ISREG(st.st_mode) and <uint64_t>st.st_size < end:
        # An access past the end would be a SIGBUS here.
        raise ValueError(f"memory region ends at {end:#x} of a file of {st.st_size:#x} bytes")
    return <uint64_t>(fs.f_bsize if fs.f_type == HUGETLBFS_MAGIC else sysconf(_SC_PAGESIZE))
