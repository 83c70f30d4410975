"""The memory of the DAX window in the guest, and copying that survives a file which gets shorter."""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.errno cimport EEXIST, EINVAL, ENOENT, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free as c_free
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ,
    PROT_WRITE, mmap, mprotect, munmap,
)

from vfsd._dax cimport Window, dax_find, dax_get, dax_put

import os

__all__ = ("View", "WindowMemory")

cdef extern from "_guard.h" nogil:
    struct guard_area:
        pass
    int guard_install()
    size_t guard_copy(char *to, const char *source, size_t n, const char *window)
    struct guard:
        pass
    guard_area *guard_watch(char *start, size_t size, int prot, guard *guard)
    void guard_forget(guard_area *a)
    uint64_t guard_torn(guard_area *a)

cdef extern from "<sys/mman.h>" nogil:
    enum:
        MREMAP_MAYMOVE
        MREMAP_FIXED
    void *mremap(void *old, size_t old_size, size_t new_size, int flags, void *new)
    int mincore(void *start, size_t size, unsigned char *pages)

cdef enum:
    PAGE = 4096


cdef object failed(int error):
    return OSError(error, os.strerror(error))


cdef char *reserve(size_t size) except NULL:
    cdef void *base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if base == MAP_FAILED:
        raise failed(errno)
    return <char *>base


@cython.final
cdef class WindowMemory:
    """See the stub."""

    cdef char *base
    cdef readonly uint64_t size
    cdef dict pieces  # offset: (size, writable)

    def __cinit__(self, uint64_t size):
        if size == 0 or size % PAGE:
            raise failed(EINVAL)
        self.pieces = {}
        self.size = size
        if guard_install() < 0:
            raise failed(errno)
        self.base = reserve(size)

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.size)

    cdef int check(self, uint64_t offset, uint64_t size) except -1:
        if self.base == NULL or size == 0 or offset >= self.size or size > self.size - offset:
            raise failed(EINVAL)
        return 0

    # ---- what the daemon asks for

    def map(self, int fd, uint64_t fd_offset, uint64_t offset, uint64_t size, bint writable):
        cdef int prot = PROT_READ | PROT_WRITE if writable else PROT_READ
        self.check(offset, size)
        if (offset | size | fd_offset) % PAGE:
            raise failed(EINVAL)
        for start, (length, _) in self.pieces.items():
            if start < offset + size and offset < start + length:
                raise failed(EEXIST)
        if mmap(self.base + offset, size, prot, MAP_SHARED | MAP_FIXED, fd, fd_offset) == MAP_FAILED:
            raise failed(errno)
        self.pieces[offset] = (size, bool(writable))

    def unmap(self, uint64_t offset, uint64_t size):
        self.check(offset, size)
        if self.pieces.get(offset, (0, False))[0] != size:
            raise failed(ENOENT)
        self.vacate(offset, size)
        del self.pieces[offset]

    cdef int vacate(self, uint64_t offset, uint64_t size) except -1:
        if mmap(self.base + offset, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                -1, 0) == MAP_FAILED:
            raise failed(errno)
        return 0

    def clear(self):
        for offset, (size, _) in self.pieces.items():
            self.vacate(offset, size)
        self.pieces.clear()

    def close(self):
        if self.base != NULL:
            self.pieces.clear()
            munmap(self.base, self.size)
            self.base = NULL

    def mapped(self):
        return [(offset, size, writable) for offset, (size, writable) in sorted(self.pieces.items())]

    def resident(self):
        cdef unsigned char *pages
        cdef uint64_t offset, size, i, n = 0
        for offset, (size, _) in self.pieces.items():
            pages = <unsigned char *>calloc(size // PAGE, 1)
            if pages == NULL:
                raise MemoryError
            if mincore(self.base + offset, size, pages) == 0:
                for i in range(size // PAGE):
                    n += pages[i] & 1
            c_free(pages)
        return n * PAGE

    # ---- copies

    cdef int64_t copy(self, uint64_t offset, object buffer, bint out) except -1:
        """Between that place and the buffer."""
        cdef Py_buffer b
        cdef size_t done = 0
        cdef char *window
        PyObject_GetBuffer(buffer, &b, PyBUF_WRITABLE if out else PyBUF_SIMPLE)
        try:
            if b.len == 0:
                return 0
            self.check(offset, b.len)
            window = self.base + offset
            with nogil:
                if out:
                    done = guard_copy(<char *>b.buf, window, b.len, window)
                else:
                    done = guard_copy(window, <char *>b.buf, b.len, window)
        finally:
            PyBuffer_Release(&b)
        return done

    def read(self, uint64_t offset, into):
        return self.copy(offset, into, True)

    def write(self, uint64_t offset, data):
        return self.copy(offset, data, False)

    cdef object copy_file(self, Window table, uint64_t inode, uint64_t position, object buffer, bint out):
        cdef int64_t range = dax_find(&table.d, inode, position >> table.shift)
        if range < 0 or not (out or table.d.writable[range >> 6] >> (range & 63) & 1):
            return -1
        # A mapping of the guest's is one range.
        dax_get(&table.d, range)
        try:
            return self.copy(
                (<uint64_t>range << table.shift) + (position & (table.range_size - 1)), buffer, out)
        finally:
            dax_put(&table.d, range)

    def read_file(self, Window table not None, uint64_t inode, uint64_t position, into):
        return self.copy_file(table, inode, position, into, True)

    def write_file(self, Window table not None, uint64_t inode, uint64_t position, data):
        return self.copy_file(table, inode, position, data, False)

    # ---- views

    def view(self, parts, size_t start, size_t length, bint writable, released):
        cdef View view
        cdef size_t at = 0, offset, size
        size = sum([part for _, part in parts])
        if length == 0 or start > size or length > size - start:
            raise failed(EINVAL)
        view = View.__new__(View)
        view.base = reserve(size)
        view.span = size
        view.start = start
        view.length = length
        view.writable = writable
        view.released = None  # not before it is whole
        for offset, size in parts:
            self.double(view.base + at, offset, size)
            at += size
        if not writable and mprotect(view.base, view.span, PROT_READ) < 0:
            raise failed(errno)
        view.area = guard_watch(view.base, view.span, PROT_READ | PROT_WRITE if writable else PROT_READ, NULL)
        if view.area == NULL:
            raise MemoryError
        view.released = released
        return memoryview(view)

    cdef int double(self, char *target, uint64_t offset, uint64_t size) except -1:
        """Have a piece of the window there too: an old size of 0 makes a second mapping (mremap(2))."""
        cdef uint64_t at, end = offset + size, start, length, part
        self.check(offset, size)
        for start, (length, _) in sorted(self.pieces.items()):
            if start + length <= offset or start >= end:
                continue
            if start > offset:
                break
            at = offset
            part = min(end, start + length) - at
            if mremap(self.base + at, 0, part, MREMAP_MAYMOVE | MREMAP_FIXED, target) == MAP_FAILED:
                raise failed(errno)
            target += part
            offset += part
            if offset == end:
                return 0
        raise failed(ENOENT)


@cython.final
cdef class View:
    """See the stub."""

    cdef char *base
    cdef size_t span
    cdef size_t start
    cdef size_t length
    cdef size_t exports
    cdef bint writable
    cdef guard_area *area
    cdef uint64_t was_torn
    cdef object released

    def __getbuffer__(self, Py_buffer *b, int flags):
        if self.base == NULL:
            raise BufferError("the view was released")
        PyBuffer_FillInfo(b, self, self.base + self.start, self.length, not self.writable, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *b):
        self.exports -= 1
        if self.exports == 0:
            self.end()

    def __dealloc__(self):
        self.end()

    cdef void end(self) noexcept:
        released, self.released = self.released, None
        if self.area != NULL:
            self.was_torn = guard_torn(self.area)
            guard_forget(self.area)
            self.area = NULL
        if self.base != NULL:
            munmap(self.base, self.span)
            self.base = NULL
        if released is not None:
            released()

    @property
    def torn(self):
        return self.was_torn if self.area == NULL else guard_torn(self.area)
