"""The segment that the servers of a share have in common (see the .pxd)."""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from vfsd.sys cimport _syscalls as h

import fcntl
import os
from errno import EINVAL
from mmap import PAGESIZE

__all__ = ("Segment",)

cdef extern from "_shared.h" nogil:
    void row_write(uint64_t *row, const uint64_t *to, unsigned words)
    bint row_read(const uint64_t *row, uint64_t *to, unsigned words)
    void word_store(uint32_t *word, uint32_t v)

cdef extern from "_atomics.h" nogil:
    void full_fence()

cdef unsigned ROW_WORDS = sizeof(row_t) // sizeof(uint64_t)
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; the module has it from Python 3.13 on

assert sizeof(row_t) == 64 and sizeof(partition_t) == 1 << 16


cdef void tell_weaker(const published_t *p) noexcept nogil:
    cdef uint32_t i
    if p.changes == NULL:
        return
    full_fence()  # the lock is given up before it is looked for who waits
    for i in range(<uint32_t>PARTITIONS):
        if i != p.index and word_load(&p.taken[i]) and word_load(&p.all[i].waits):
            word_change(p.changes)
            return


cdef void set_waits(published_t *p, bint waits) noexcept nogil:
    if p.changes != NULL and p.own.waits != <uint32_t>waits:
        word_store(&p.own.waits, waits)


cdef uint16_t publish(published_t *p, row_t *row) noexcept nogil:
    cdef uint16_t number
    if p.changes == NULL:
        return 0
    number = p.next[0]
    if number == 0 and p.own.top < ROWS_MAX:
        number = <uint16_t>(p.own.top + 1)
        row_write(<uint64_t *>&p.own.rows[number - 1], <uint64_t *>row, ROW_WORDS)
        word_store(&p.own.top, number)
    elif number == 0:
        p.unpublished += 1
    else:
        p.next[0] = p.next[number]
        row_write(<uint64_t *>&p.own.rows[number - 1], <uint64_t *>row, ROW_WORDS)
    return number


cdef void withdraw(published_t *p, uint16_t number) noexcept nogil:
    cdef row_t nothing
    if number == 0:
        return
    memset(&nothing, 0, sizeof(nothing))
    row_write(<uint64_t *>&p.own.rows[number - 1], <uint64_t *>&nothing, ROW_WORDS)
    p.next[number] = p.next[0]
    p.next[0] = number


cdef void forget_published(published_t *p) noexcept nogil:
    if p.changes != NULL:
        empty_partition(p.own)
        word_change(p.changes)


cdef void empty_partition(partition_t *left) noexcept nogil:
    memset(left, 0, sizeof(row_t) * (1 + min(left.top, <uint32_t>ROWS_MAX)))  # the first: beside the rows


cdef uint32_t look_at_others(published_t *p) noexcept nogil:
    cdef const partition_t *other
    cdef uint32_t i, k, n = 0
    p.n_seen = 0
    if p.changes == NULL:
        return 0
    for i in range(<uint32_t>PARTITIONS):
        if i == p.index or not word_load(&p.taken[i]):
            continue
        other = &p.all[i]
        for k in range(min(word_load(&other.top), <uint32_t>ROWS_MAX)):
            if n == SEEN_MAX:
                break
            if not row_read(<const uint64_t *>&other.rows[k], <uint64_t *>&p.seen[n], ROW_WORDS):
                continue
            if p.seen[n].kind == ROW_HOLD or p.seen[n].kind == ROW_WAIT:
                p.seen[n].partition = i
                n += 1
    p.n_seen = n
    return n


cdef void *map_shared(int fd, size_t size, int protection) except NULL:
    cdef void *at = h.mmap(NULL, size, protection, h.MAP_SHARED | h.MAP_NORESERVE, fd, 0)
    if at == h.MAP_FAILED:
        raise OSError(errno, os.strerror(errno))
    return at


@cython.final
cdef class Segment:
    def __cinit__(self):
        self.page = PAGESIZE
        self.size = 2 * self.page + PARTITIONS * sizeof(partition_t)
        fd = os.memfd_create("vfsd-locks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.size)
            self.writable = <char *>map_shared(fd, self.size, h.PROT_READ | h.PROT_WRITE)
            try:  # what is mapped from now on can't be made writable
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
            except OSError as problem:
                if problem.errno != EINVAL:  # Linux before 5.1
                    raise
            self.readable = <char *>map_shared(fd, self.size, h.PROT_READ)
        finally:
            os.close(fd)

    def __dealloc__(self):
        if self.joined:  # a server keeps it to its end
            return
        if self.writable != NULL:
            h.munmap(self.writable, self.size)
        if self.readable != NULL:
            h.munmap(<void *>self.readable, self.size)

    cdef uint32_t *taken(self, char *base) noexcept:
        return <uint32_t *>(base + self.page)

    cdef partition_t *partition(self, char *base, uint32_t index) noexcept:
        return <partition_t *>(base + 2 * self.page) + index

    def reserve(self):
        cdef uint32_t *taken = self.taken(self.writable)
        cdef uint32_t i
        for i in range(<uint32_t>PARTITIONS):
            if not taken[i]:
                word_store(&taken[i], 1)
                return <int>i
        return -1

    def release(self, int index):
        if not 0 <= index < PARTITIONS:
            return
        word_store(&self.taken(self.writable)[index], 0)
        empty_partition(self.partition(self.writable, <uint32_t>index))
        word_change(<uint32_t *>self.writable)

    cdef int join(self, published_t *p, uint32_t index) except -1:
        cdef char *own = <char *>self.partition(self.writable, index)
        cdef char *behind = own + sizeof(partition_t)
        cdef char *first = self.writable + self.page
        h.munmap(first, own - first)
        h.munmap(behind, self.writable + self.size - behind)
        p.seen = <row_t *>h.mmap(NULL, SEEN_MAX * sizeof(row_t), h.PROT_READ | h.PROT_WRITE,
                                 h.MAP_PRIVATE | h.MAP_ANONYMOUS | h.MAP_NORESERVE, -1, 0)
        if p.seen == <row_t *>h.MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        p.taken = self.taken(<char *>self.readable)
        p.all = self.partition(<char *>self.readable, 0)
        p.own = <partition_t *>own
        p.index = index
        self.joined = True
        p.changes = <uint32_t *>self.writable
        return 0
