"""The DAX window: which of its ranges hold which part of which file, for the daemon and the guest."""

cimport cython
from libc.errno cimport EBUSY, EEXIST, EINVAL, ENOENT, ENOSPC
from libc.stdint cimport UINT64_MAX
from libc.stdlib cimport calloc, free as c_free
from libc.string cimport memset

from vfsd._dax_intervals cimport interval_erase, interval_find, interval_insert, interval_next, mapping_t

import os
from typing import NamedTuple

__all__ = ("Mapping", "Window", "load_numpy")

cdef extern from *:
    """
    static inline unsigned lowest_bit(uint64_t w) { return (unsigned)__builtin_ctzll(w); }
    static inline unsigned bits_in(uint64_t w) { return (unsigned)__builtin_popcountll(w); }
    """
    unsigned int lowest_bit(uint64_t w) noexcept nogil
    unsigned int bits_in(uint64_t w) noexcept nogil

assert sizeof(mapping_t) == 48


# --- bitmaps ---

cdef inline bint bit(const uint64_t *words, uint64_t i) noexcept nogil:
    return words[i >> 6] >> (i & 63) & 1


cdef inline uint64_t mask(uint64_t start, uint64_t end) noexcept nogil:
    """Of the word that `start` lies in, the bits from it on and before `end`."""
    cdef uint64_t bits = UINT64_MAX << (start & 63)
    if (start | 63) >= end:
        bits &= UINT64_MAX >> (63 - (end - 1 & 63))
    return bits


cdef void fill(uint64_t *words, uint64_t start, uint64_t end, bint on) noexcept nogil:
    cdef uint64_t bits
    while start < end:
        bits = mask(start, end)
        if on:
            words[start >> 6] |= bits
        else:
            words[start >> 6] &= ~bits
        start = (start | 63) + 1


cdef uint32_t count(const uint64_t *words, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint32_t n = 0
    while start < end:
        n += bits_in(words[start >> 6] & mask(start, end))
        start = (start | 63) + 1
    return n


cdef uint64_t next_bit(const uint64_t *words, uint64_t start, uint64_t end, bint on) noexcept nogil:
    """The first bit that is on, or off, in [start, end); end when there is none."""
    cdef uint64_t bits
    while start < end:
        bits = (words[start >> 6] if on else ~words[start >> 6]) & mask(start, end)
        if bits:
            return (start & ~<uint64_t>63) + lowest_bit(bits)
        start = (start | 63) + 1
    return end


# --- by inode and file offset, and by age ---

cdef void insert(dax_t *d, uint32_t node) noexcept nogil:
    d.root = interval_insert(d.nodes, d.root, &d.seed, node)


cdef void erase(dax_t *d, uint32_t node) noexcept nogil:
    d.root = interval_erase(d.nodes, d.root, node)


cdef void link_newest(dax_t *d, uint32_t node) noexcept nogil:
    cdef mapping_t *m = d.nodes
    m[node].older = d.newest
    m[node].newer = 0
    if d.newest:
        m[d.newest].newer = node
    else:
        d.oldest = node
    d.newest = node


cdef void unlink_age(dax_t *d, uint32_t node) noexcept nogil:
    cdef mapping_t *m = d.nodes
    if m[node].older:
        m[m[node].older].newer = m[node].newer
    else:
        d.oldest = m[node].newer
    if m[node].newer:
        m[m[node].newer].older = m[node].older
    else:
        d.newest = m[node].older


# --- both sides ---

cdef inline uint32_t node_at(dax_t *d, uint64_t index) noexcept nogil:
    """The mapping that begins with that range, 0: none does."""
    return <uint32_t>index + 1 if index < d.n and d.nodes[index + 1].length else 0


cdef int64_t dax_find(dax_t *d, uint64_t inode, uint64_t foffset) noexcept nogil:
    cdef uint32_t node = interval_find(d.nodes, d.root, inode, foffset)
    return node - 1 + (foffset - d.nodes[node].foffset) if node else -ENOENT


cdef int64_t dax_at(dax_t *d, uint64_t index) noexcept nogil:
    if index >= d.n:
        return -EINVAL
    return <int64_t>d.first[index] - 1 if d.first[index] else -ENOENT


cdef int64_t dax_next(dax_t *d, uint64_t start, uint64_t end) noexcept nogil:
    end = min(end, <uint64_t>d.n)
    while start < end:
        start = next_bit(d.free, start, end, False)
        if start < end:
            if d.first[start]:
                return <int64_t>d.first[start] - 1
            start += 1  # claimed
    return -ENOENT


cdef int64_t dax_next_of(dax_t *d, uint64_t inode, uint64_t foffset, uint64_t index) noexcept nogil:
    cdef uint32_t from_node = <uint32_t>min(index, <uint64_t>d.n) + 1
    cdef uint32_t node = interval_next(d.nodes, d.root, inode, foffset, from_node)
    return <int64_t>node - 1 if node else -ENOENT


cdef int dax_map(dax_t *d, uint64_t index, uint64_t n, uint64_t inode, uint64_t foffset,
                 bint writable) noexcept nogil:
    cdef uint32_t node = <uint32_t>index + 1
    cdef mapping_t *m
    cdef uint64_t i
    if n == 0 or index >= d.n or n > d.n - index or foffset > UINT64_MAX - n:
        return -EINVAL
    for i in range(index, index + n):
        if d.first[i]:
            return -EEXIST
    for i in range(index, index + n):
        d.first[i] = node
    d.n_free -= count(d.free, index, index + n)
    fill(d.free, index, index + n, False)
    fill(d.writable, index, index + n, writable)
    m = &d.nodes[node]
    m.inode = inode
    m.foffset = foffset
    m.length = <uint32_t>n
    m.references = 0
    insert(d, node)
    link_newest(d, node)
    d.n_mapped += 1
    return 0


cdef void drop(dax_t *d, uint32_t node, bint keep) noexcept nogil:
    cdef mapping_t *m = &d.nodes[node]
    cdef uint64_t start = node - 1, end = start + m.length
    erase(d, node)
    unlink_age(d, node)
    memset(&d.first[start], 0, m.length * sizeof(uint32_t))
    fill(d.writable, start, end, False)
    fill(d.busy, start, end, False)
    if not keep:
        fill(d.free, start, end, True)
        d.n_free += m.length
    if m.references:
        d.n_busy -= 1
    m.references = m.length = 0
    d.n_mapped -= 1


cdef int dax_unmap(dax_t *d, uint64_t index, bint keep) noexcept nogil:
    cdef uint32_t node = node_at(d, index)
    if node == 0:
        return -ENOENT
    if d.nodes[node].references:
        return -EBUSY
    drop(d, node, keep)
    return 0


cdef int dax_split(dax_t *d, uint64_t index) noexcept nogil:
    cdef int64_t start = dax_at(d, index)
    cdef mapping_t *whole
    cdef mapping_t *rest
    cdef uint32_t node, i
    if start < 0:
        return -ENOENT
    if start == <int64_t>index:
        return 0
    node = <uint32_t>index + 1
    whole = &d.nodes[start + 1]
    rest = &d.nodes[node]
    if whole.references:
        return -EBUSY
    erase(d, <uint32_t>start + 1)
    rest.inode = whole.inode
    rest.length = whole.length - <uint32_t>(index - start)
    rest.foffset = whole.foffset + (index - start)
    rest.references = 0
    whole.length -= rest.length
    for i in range(rest.length):
        d.first[index + i] = node
    insert(d, <uint32_t>start + 1)
    insert(d, node)
    link_newest(d, node)
    d.n_mapped += 1
    d.split += 1
    return 0


cdef int dax_merge(dax_t *d, uint64_t index) noexcept nogil:
    cdef uint32_t node = node_at(d, index), low, i
    cdef mapping_t *a
    cdef mapping_t *b
    if node == 0:
        return -ENOENT
    low = d.first[index - 1] if index else 0
    if low == 0:
        return 0
    a = &d.nodes[low]
    b = &d.nodes[node]
    if (a.inode != b.inode or a.foffset + a.length != b.foffset
            or bit(d.writable, low - 1) != bit(d.writable, index)):
        return 0
    if a.references or b.references:
        return -EBUSY
    erase(d, low)
    erase(d, node)
    unlink_age(d, node)
    for i in range(b.length):
        d.first[index + i] = low
    a.length += b.length
    b.length = 0
    insert(d, low)
    d.n_mapped -= 1
    d.merged += 1
    return 1


cdef int dax_set_writable(dax_t *d, uint64_t index) noexcept nogil:
    cdef uint32_t node = node_at(d, index)
    if node == 0:
        return -ENOENT
    fill(d.writable, index, index + d.nodes[node].length, True)
    return 0


# --- the guest ---

cdef int64_t dax_alloc(dax_t *d) noexcept nogil:
    cdef uint64_t i = next_bit(d.free, d.hint, d.n, True)
    if i == d.n:
        i = next_bit(d.free, 0, d.hint, True)
        if i == d.hint:
            return -ENOSPC
    fill(d.free, i, i + 1, False)
    d.n_free -= 1
    d.hint = <uint32_t>(i + 1) % d.n
    d.allocated += 1
    return i


cdef int dax_release(dax_t *d, uint64_t index) noexcept nogil:
    if index >= d.n or bit(d.free, index) or d.first[index]:
        return -EINVAL
    fill(d.free, index, index + 1, True)
    d.n_free += 1
    return 0


cdef int dax_get(dax_t *d, uint64_t index) noexcept nogil:
    cdef uint32_t node = node_at(d, index)
    if node == 0:
        return -ENOENT
    d.nodes[node].references += 1
    if d.nodes[node].references == 1:
        fill(d.busy, index, index + d.nodes[node].length, True)
        d.n_busy += 1
    return 0


cdef int dax_put(dax_t *d, uint64_t index) noexcept nogil:
    cdef uint32_t node = node_at(d, index)
    if node == 0:
        return -ENOENT
    if d.nodes[node].references == 0:
        return -EINVAL
    d.nodes[node].references -= 1
    if d.nodes[node].references == 0:
        fill(d.busy, index, index + d.nodes[node].length, False)
        d.n_busy -= 1
    return 0


cdef int64_t idle_of(dax_t *d, uint64_t inode) noexcept nogil:
    cdef int64_t at = dax_next_of(d, inode, 0, 0), found = -ENOENT
    while at >= 0:
        if d.nodes[at + 1].references == 0:
            return at
        found = -EBUSY
        at = dax_next_of(d, inode, d.nodes[at + 1].foffset, at + 1)
    return found


cdef int64_t dax_steal(dax_t *d, uint64_t inode) noexcept nogil:
    cdef int64_t at = idle_of(d, inode)
    if at >= 0:
        drop(d, <uint32_t>at + 1, True)
        d.stolen += 1
    return at


cdef int64_t dax_oldest_idle(dax_t *d) noexcept nogil:
    cdef uint32_t node = d.oldest
    while node and d.nodes[node].references:
        node = d.nodes[node].newer
    return <int64_t>node - 1 if node else -ENOENT


cdef int dax_touch(dax_t *d, uint64_t index) noexcept nogil:
    cdef uint32_t node = node_at(d, index)
    if node == 0:
        return -ENOENT
    unlink_age(d, node)
    link_newest(d, node)
    return 0


# --- for Python ---

class Mapping(NamedTuple):
    """A run of ranges that holds a part of one inode."""

    moffset: int
    length: int
    inode: int
    foffset: int
    writable: bool


cdef object numpy():
    # Its BLAS would start threads, which a daemon that is to enter namespaces can't have.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import numpy
    return numpy


def load_numpy():
    """Have it loaded already when the first Window is made."""
    numpy()


cdef int check(int64_t rc) except -1:
    if rc < 0:
        raise OSError(<int>-rc, os.strerror(<int>-rc))
    return 0


@cython.final
cdef class Window:
    """A window of size bytes in ranges of range_size bytes; see the stub."""

    def __cinit__(self, uint64_t size, uint64_t range_size):
        cdef uint64_t n
        if range_size == 0 or range_size & (range_size - 1):
            raise ValueError(f"range size {range_size} is no power of two")
        n = size // range_size
        if n == 0 or size % range_size or n > RANGES_MAX:
            raise ValueError(f"window of {size} bytes is not 1 to {RANGES_MAX} ranges of {range_size}")
        np = numpy()
        words = (n + 63) // 64
        self.size = size
        self.range_size = range_size
        self.shift = range_size.bit_length() - 1
        self.free_words = np.zeros(words, np.uint64)
        self.busy_words = np.zeros(words, np.uint64)
        self.writable_words = np.zeros(words, np.uint64)
        self.first_nodes = np.zeros(n, np.uint32)
        self.d.n = <uint32_t>n
        self.d.n_free = <uint32_t>n
        self.d.seed = 0x9E3779B97F4A7C15
        self.d.free = &self.free_words[0]
        self.d.busy = &self.busy_words[0]
        self.d.writable = &self.writable_words[0]
        self.d.first = &self.first_nodes[0]
        self.d.nodes = <mapping_t *>calloc(n + 1, sizeof(mapping_t))
        if self.d.nodes == NULL:
            raise MemoryError
        fill(self.d.free, 0, n, True)

    def __dealloc__(self):
        c_free(self.d.nodes)

    cdef uint64_t ranges(self, uint64_t offset, str what) except? -1:
        if offset & (self.range_size - 1):
            raise ValueError(f"{what} {offset:#x} is no multiple of {self.range_size:#x}")
        return offset >> self.shift

    cdef object mapping(self, int64_t index):
        cdef mapping_t *m = &self.d.nodes[index + 1]
        return Mapping(
            index << self.shift, <uint64_t>m.length << self.shift, m.inode, m.foffset << self.shift,
            bool(bit(self.d.writable, index)),
        )

    @property
    def n_ranges(self):
        return self.d.n

    @property
    def n_free(self):
        return self.d.n_free

    @property
    def n_mapped(self):
        return self.d.n_mapped

    @property
    def n_busy(self):
        return self.d.n_busy

    def counters(self):
        return {
            "allocated": self.d.allocated, "stolen": self.d.stolen,
            "split": self.d.split, "merged": self.d.merged,
        }

    @property
    def free(self):
        return self.free_words.base

    @property
    def busy(self):
        return self.busy_words.base

    @property
    def writable(self):
        return self.writable_words.base

    def find(self, uint64_t inode, uint64_t foffset):
        cdef int64_t index = dax_find(&self.d, inode, foffset >> self.shift)
        return None if index < 0 else index << self.shift

    def at(self, uint64_t moffset):
        cdef int64_t index = dax_at(&self.d, moffset >> self.shift)
        if index == -EINVAL:
            raise ValueError(f"moffset {moffset:#x} is outside of the window")
        return None if index < 0 else self.mapping(index)

    def overlapping(self, uint64_t moffset, uint64_t length):
        cdef uint64_t start = self.ranges(moffset, "moffset"), n = self.ranges(length, "length")
        cdef int64_t at
        if start > self.d.n or n > self.d.n - start:
            raise ValueError(f"[{moffset:#x}, {moffset + length:#x}) is outside of the window")
        found = []
        at = dax_next(&self.d, start, start + n)
        while at >= 0:
            found.append(self.mapping(at))
            at = dax_next(&self.d, at + self.d.nodes[at + 1].length, start + n)
        return found

    def has(self, uint64_t inode):
        return dax_next_of(&self.d, inode, 0, 0) >= 0

    def of(self, uint64_t inode):
        cdef int64_t at = dax_next_of(&self.d, inode, 0, 0)
        found = []
        while at >= 0:
            found.append(self.mapping(at))
            at = dax_next_of(&self.d, inode, self.d.nodes[at + 1].foffset, at + 1)
        return found

    def mappings(self):
        cdef uint32_t node = self.d.oldest
        found = []
        while node:
            found.append(self.mapping(node - 1))
            node = self.d.nodes[node].newer
        return found

    def map(self, uint64_t moffset, uint64_t length, uint64_t inode, uint64_t foffset, bint writable):
        cdef int rc = dax_map(
            &self.d, self.ranges(moffset, "moffset"), self.ranges(length, "length"), inode,
            self.ranges(foffset, "foffset"), writable)
        if rc == -EINVAL:
            raise ValueError(f"{length:#x} bytes at {moffset:#x} are not in the window")
        check(rc)

    def unmap(self, uint64_t moffset, bint keep=False):
        check(dax_unmap(&self.d, self.ranges(moffset, "moffset"), keep))

    def cut(self, uint64_t moffset, uint64_t length):
        cdef uint64_t start = self.ranges(moffset, "moffset")
        cdef uint64_t end = start + self.ranges(length, "length")
        cdef int64_t at
        rests = []
        hit = self.overlapping(moffset, length)
        for m in hit:
            if self.d.nodes[(m.moffset >> self.shift) + 1].references:
                check(-EBUSY)
        if not hit:
            return rests
        at = dax_at(&self.d, start)
        if at >= 0 and at < <int64_t>start:
            dax_split(&self.d, start)
            rests.append(self.mapping(at))
        at = dax_at(&self.d, end) if end < self.d.n else -ENOENT
        if at >= 0 and at < <int64_t>end:
            dax_split(&self.d, end)
            rests.append(self.mapping(end))
        at = dax_next(&self.d, start, end)
        while at >= 0:
            drop(&self.d, <uint32_t>at + 1, False)
            at = dax_next(&self.d, at, end)
        return rests

    def split(self, uint64_t moffset):
        check(dax_split(&self.d, self.ranges(moffset, "moffset")))

    def merge(self, uint64_t moffset):
        cdef int rc = dax_merge(&self.d, self.ranges(moffset, "moffset"))
        check(rc)
        return rc == 1

    def set_writable(self, uint64_t moffset):
        check(dax_set_writable(&self.d, self.ranges(moffset, "moffset")))

    def clear(self):
        while self.d.oldest:
            drop(&self.d, self.d.oldest, False)
        fill(self.d.free, 0, self.d.n, True)
        self.d.n_free = self.d.n
        self.d.hint = 0

    def alloc(self):
        cdef int64_t index = dax_alloc(&self.d)
        return None if index < 0 else index << self.shift

    def release(self, uint64_t moffset):
        check(dax_release(&self.d, self.ranges(moffset, "moffset")))

    def get(self, uint64_t moffset):
        check(dax_get(&self.d, self.ranges(moffset, "moffset")))

    def put(self, uint64_t moffset):
        cdef uint64_t index = self.ranges(moffset, "moffset")
        check(dax_put(&self.d, index))
        return self.d.nodes[index + 1].references == 0

    def steal(self, uint64_t inode):
        cdef int64_t at = idle_of(&self.d, inode)
        if at == -EBUSY:
            return None
        check(at)
        was = self.mapping(at)
        dax_steal(&self.d, inode)
        return was

    def take_oldest(self):
        cdef int64_t at = dax_oldest_idle(&self.d)
        if at < 0:
            return None
        was = self.mapping(at)
        drop(&self.d, <uint32_t>at + 1, True)
        return was

    def oldest_idle(self):
        cdef int64_t at = dax_oldest_idle(&self.d)
        return None if at < 0 else self.mapping(at)

    def touch(self, uint64_t moffset):
        check(dax_touch(&self.d, self.ranges(moffset, "moffset")))
