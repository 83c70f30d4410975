"""A guest's memory, mapped into this process, and its addresses."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport INT64_MAX, UINT64_MAX, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE, madvise,
    mmap, munmap,
)
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.unistd cimport _SC_PAGESIZE, sysconf


cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_t "statfs":
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs_t *buf)


cdef extern from "_atomics.h" nogil:
    int add_int(int *p, int v)
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    uint64_t load_relaxed_u64(const uint64_t *p)
    void set_bits_u64(uint64_t *p, uint64_t bits)


cdef extern from *:
    """
    #include <sys/mman.h>
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23  /* Linux 5.14; EINVAL before */
    #endif
    /* What is mapped shared at an address, mapped once more somewhere else. */
    #define same_pages_again(at, size) mremap(at, 0, size, MREMAP_MAYMOVE)
    """
    int MADV_POPULATE_WRITE
    void *same_pages_again(void *at, size_t size) nogil


cdef extern from "_guard.h" nogil:
    struct guard_area:
        pass
    int guard_install()
    guard_area *guard_watch(char *start, size_t size, int prot, guard *guard)
    void guard_forget(guard_area *a)
    int guard_cover(uintptr_t start, uintptr_t end, int prot)


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
    cdef uint64_t page = region.mapping.page
    cdef uint64_t start = <uint64_t>(region.host - region.mapping.base) + offset
    cdef uint64_t first = start // page, last = (start + size - 1) // page
    if first_time(region.mapping.populated, first, last):
        madvise(region.mapping.base + first * page, (last - first + 1) * page, MADV_POPULATE_WRITE)


cdef void memory_populate(const memory_t *m, const iovec *iov, uint32_t n) noexcept nogil:
    cdef uint64_t offset
    cdef uint32_t i, k
    for i in range(n):
        if iov[i].iov_len < POPULATE_MIN:
            continue
        for k in range(m.n):
            offset = <uintptr_t>iov[i].iov_base - <uintptr_t>m.regions[k].host
            if offset < m.regions[k].size:
                if m.regions[k].mapping.populated != NULL:
                    populate(&m.regions[k], offset, min(iov[i].iov_len, m.regions[k].size - offset))
                break


# --- mappings and tables, and who uses them ---

cdef void mapping_free(mapping_t *mapping) noexcept nogil:
    if mapping.watched != NULL:
        guard_forget(<guard_area *>mapping.watched)
    munmap(mapping.base, mapping.bytes)
    free(mapping.populated)
    free(mapping)


cdef void guard_drop(guard *g) noexcept nogil:
    if add_int(&g.users, -1) == 0:
        free(g)


cdef memory_t *table_make(uint32_t n, bint incomplete, guard *g) noexcept nogil:
    """A table with room for n regions and none of them listed. NULL: no memory."""
    cdef memory_t *m = <memory_t *>calloc(1, sizeof(memory_t) + n * sizeof(region_t))
    if m != NULL:
        m.regions = <region_t *>(m + 1)
        m.users = 1
        m.incomplete = incomplete
        m.watched_by = g
        add_int(&g.users, 1)
    return m


cdef void table_list(memory_t *m, const region_t *region) noexcept nogil:
    """Its last region so far."""
    add_int(&region.mapping.users, 1)
    m.regions[m.n] = region[0]
    m.n += 1


cdef memory_t *memory_keep(memory_t *m) noexcept nogil:
    add_int(&m.users, 1)
    return m


cdef void memory_drop(memory_t *m) noexcept nogil:
    cdef uint32_t i
    if m == NULL or add_int(&m.users, -1):
        return
    for i in range(m.n):
        if add_int(&m.regions[i].mapping.users, -1) == 0:
            mapping_free(m.regions[i].mapping)
    guard_drop(m.watched_by)
    free(m)


cdef mapping_t *mapping_make(char *base, uint64_t length, uint64_t page, guard *g, bint touched) noexcept nogil:
    """What is to be known of a fresh mapping, which is its own from now on; used by nobody. NULL: no memory.

    touched: by more than system calls.
    """
    cdef mapping_t *mapping = <mapping_t *>calloc(1, sizeof(mapping_t))
    if mapping == NULL:
        munmap(base, length)
        return NULL
    mapping.base = base
    mapping.bytes = length
    mapping.page = page
    if touched and load_acquire_int(&g.sock) >= 0:
        mapping.watched = guard_watch(base, length, PROT_READ | PROT_WRITE, g)
        if mapping.watched == NULL:
            mapping_free(mapping)
            return NULL
    if touched and page == <uint64_t>sysconf(_SC_PAGESIZE):
        # Without it, for want of memory, pages are mapped one by one.
        mapping.populated = <uint64_t *>calloc(length // page // 64 + 1, sizeof(uint64_t))
    return mapping


@cython.final
cdef class GuestMemory:
    """Memory regions of a guest, mapped into this process.

    Each change makes a new table (memory_t). What works with an old one has what it knew of the guest's
    memory for as long as it keeps it; only bytes that are moved by read() and write() need the newest.
    """

    def __cinit__(self):
        self.guard = <guard *>calloc(1, sizeof(guard))
        if self.guard == NULL:
            raise MemoryError
        self.guard.users = 1
        self.guard.sock = -1
        self.table = table_make(0, False, self.guard)
        if self.table == NULL:
            raise MemoryError

    def __dealloc__(self):
        memory_drop(self.table)
        if self.guard != NULL:
            guard_drop(self.guard)

    def __len__(self):
        return self.table.n

    def set_incomplete(self, bint incomplete):
        """Whether the guest may have memory that is not mapped here: an address outside of every region
        then ends that chain early, not the ring."""
        cdef memory_t *m = self.table
        cdef memory_t *table
        cdef uint32_t i
        if incomplete == m.incomplete:
            return
        table = table_make(m.n, incomplete, self.guard)
        if table != NULL:
            for i in range(m.n):
                table_list(table, &m.regions[i])
        self.use(table)

    def watch(self, int sock):
        """Let no missing page of what is added from now on end this process: zeroes come into its place.

        That can happen where a file was cut off after it was mapped, or where there is no memory for it.
        sock: is shut for reading then; -1: it is closed now. OSError when there can be no handler.
        """
        if guard_install() < 0:
            PyErr_SetFromErrno(OSError)
        store_release_int(&self.guard.sock, sock)

    @property
    def torn(self):
        """Whether some of the watched memory was missing."""
        return load_acquire_int(&self.guard.torn) != 0

    cdef int use(self, memory_t *table) except -1:
        """From now on; it is this object's own. NULL: there was no memory for it."""
        if table == NULL:
            raise MemoryError
        memory_drop(self.table)
        self.table = table
        return 0

    def add(self, int fd, uint64_t gpa, uint64_t size, uint64_t uva, uint64_t offset, bint may_shrink=False):
        """Map size bytes of fd from offset. The descriptor stays the caller's: close it any time.

        may_shrink: the file may be shorter, or writable for others only. No ring may lie there.
        """
        cdef region_t region
        self.check_free(gpa, size, uva)
        if offset > <uint64_t>INT64_MAX or size > <uint64_t>INT64_MAX - offset:
            raise ValueError(f"memory region: offset {offset:#x} + size {size:#x} overflows")
        region = region_t(gpa, size, uva, NULL, may_shrink, NULL)
        self.use(self.with_region(fd, &region, offset))

    cdef memory_t *with_region(self, int fd, const region_t *region, uint64_t offset) except NULL:
        """The table with one more."""
        cdef memory_t *m = self.table
        cdef memory_t *table
        cdef region_t added = region[0]
        cdef uint64_t page = file_page(fd, 0 if region.may_shrink else offset + region.size)
        cdef uint64_t start = offset // page * page
        cdef uint64_t length = (offset - start + region.size + page - 1) // page * page
        cdef uint32_t i, at = 0
        cdef void *base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <int64_t>start)
        if base == MAP_FAILED and region.may_shrink:
            base = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, <int64_t>start)
            if base == MAP_FAILED:  # nothing can be done there, but it is there
                base = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if base == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        added.host = <char *>base + (offset - start)
        added.mapping = mapping_make(<char *>base, length, page, self.guard, not region.may_shrink)
        if added.mapping == NULL:
            raise MemoryError
        table = table_make(m.n + 1, m.incomplete, self.guard)
        if table == NULL:
            mapping_free(added.mapping)
            raise MemoryError
        while at < m.n and m.regions[at].gpa < added.gpa:
            at += 1
        for i in range(at):
            table_list(table, &m.regions[i])
        table_list(table, &added)
        for i in range(at, m.n):
            table_list(table, &m.regions[i])
        return table

    cdef int check_free(self, uint64_t gpa, uint64_t size, uint64_t uva) except -1:
        cdef memory_t *m = self.table
        cdef uint32_t i
        if size == 0:
            raise ValueError(f"memory region at {gpa:#x} has size 0")
        if size > UINT64_MAX - gpa:
            raise ValueError(f"memory region: guest address {gpa:#x} + size {size:#x} overflows")
        if size > UINT64_MAX - uva:
            raise ValueError(f"memory region: user address {uva:#x} + size {size:#x} overflows")
        if m.n == REGIONS_MAX:
            raise ValueError(f"more than {REGIONS_MAX} memory regions")
        for i in range(m.n):
            if overlaps(gpa, m.regions[i].gpa, size, m.regions[i].size):
                raise ValueError(f"memory region at guest address {gpa:#x} overlaps another")
            if overlaps(uva, m.regions[i].uva, size, m.regions[i].size):
                raise ValueError(f"memory region at user address {uva:#x} overlaps another")
        return 0

    def remove(self, uint64_t gpa, uint64_t size, uint64_t uva):
        """Have no region with exactly these numbers any more."""
        cdef memory_t *m = self.table
        cdef memory_t *table
        cdef uint32_t k
        cdef int i = memory_find(m, gpa, 0)
        if i < 0 or m.regions[i].gpa != gpa or m.regions[i].size != size or m.regions[i].uva != uva:
            raise ValueError(f"no memory region at {gpa:#x}, size {size:#x}, user address {uva:#x}")
        table = table_make(m.n - 1, m.incomplete, self.guard)
        if table != NULL:
            for k in range(m.n):
                if <int>k != i:
                    table_list(table, &m.regions[k])
        self.use(table)

    def clear(self):
        """Have no regions."""
        self.use(table_make(0, self.table.incomplete, self.guard))

    def another(self):
        """Memory of the same guest to be filled, for take()."""
        other = GuestMemory()
        guard_drop(other.guard)
        other.guard = self.guard
        add_int(&self.guard.users, 1)
        other.use(table_make(0, self.table.incomplete, self.guard))
        return other

    def take(self, GuestMemory other not None):
        """Have the other's regions in place of one's own."""
        self.use(memory_keep(other.table))

    def renew(self):
        """Map everything once more, and have zeroes where it was: what still works with an old table reads and
        writes nothing of the guest's any more. False: for some of it the kernel could not."""
        cdef memory_t *m = self.table
        cdef memory_t *table = table_make(m.n, m.incomplete, self.guard)
        cdef region_t region
        cdef mapping_t *old
        cdef void *base
        cdef uint32_t i
        cdef bint whole = True
        if table == NULL:
            return False
        for i in range(m.n):
            region = m.regions[i]
            old = region.mapping
            base = same_pages_again(old.base, old.bytes)
            if base != MAP_FAILED:
                region.mapping = mapping_make(<char *>base, old.bytes, old.page, self.guard, not region.may_shrink)
            if base == MAP_FAILED or region.mapping == NULL:
                region.mapping = old
                whole = False
            else:
                region.host = region.mapping.base + (region.host - old.base)
            table_list(table, &region)
            if region.mapping != old and guard_cover(
                    <uintptr_t>old.base, <uintptr_t>old.base + old.bytes, PROT_READ | PROT_WRITE) < 0:
                whole = False
        self.use(table)
        return whole

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
        cdef const memory_t *m = self.table
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
