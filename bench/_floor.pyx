"""The floor: what each workload asks of a daemon, as bare system calls in a loop, by one thread.

A server can't hold all a guest knows open for reading and writing: it holds O_PATH descriptors, makes
one for each name that is new, and opens files again through /proc/self/fd. So does the floor. No
daemon that asks the kernel for the same work can be faster than this but by doing two things at a
time. Each operation's calls stand in its function.

Data lies where a server has it: in shared memory, in as many places as operations are under way. A
single buffer would stay in a cache that theirs do not fit in.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EIO, ENOENT, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

import os
import time

__all__ = ("KINDS", "measure")

include "_common.pxi"

cdef extern from "<sys/types.h>" nogil:
    ctypedef int64_t off_t

cdef extern from "<fcntl.h>" nogil:
    int openat(int dirfd, const char *path, int flags, ...)
    enum: O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_CLOEXEC, O_PATH, O_NOFOLLOW, O_DIRECTORY
    enum: AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, AT_REMOVEDIR

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)
    ssize_t pread(int fd, void *data, size_t n, off_t offset)
    ssize_t pwrite(int fd, const void *data, size_t n, off_t offset)
    int unlinkat(int dirfd, const char *path, int flags)
    int symlinkat(const char *target, int dirfd, const char *path)
    ssize_t readlinkat(int dirfd, const char *path, char *data, size_t n)
    int ftruncate(int fd, off_t size)
    int c_fsync "fsync"(int fd)
    off_t lseek(int fd, off_t offset, int whence)
    long syscall(long number, ...)

cdef extern from "<stdio.h>" nogil:
    int renameat(int olddir, const char *old, int newdir, const char *new)

cdef extern from "<sys/syscall.h>" nogil:
    enum: SYS_getdents64

cdef extern from "<sys/stat.h>" nogil:
    struct statx_t "statx":
        pass
    int statx(int dirfd, const char *path, int flags, unsigned mask, statx_t *data)
    enum: STATX_BASIC_STATS
    int mkdirat(int dirfd, const char *path, unsigned mode)
    int fchmod(int fd, unsigned mode)

cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        long tv_nsec

cdef extern from *:
    """
    #include <sys/stat.h>
    """
    int futimens(int fd, const timespec *times) nogil

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_t "statfs":
        pass
    int fstatfs(int fd, statfs_t *data)

cdef extern from "<sys/xattr.h>" nogil:
    ssize_t getxattr_of "getxattr"(const char *path, const char *name, void *data, size_t n)


cdef struct work_t:
    int files              # directory of f00000000 and on
    int scratch            # directory to make things in
    int fd                 # a file
    int anchor             # O_PATH descriptor of it
    int proc               # /proc/self/fd
    char anchor_name[16]   # of `anchor` there
    char anchor_path[32]   # and from the root on
    uint64_t count         # files, or directories
    uint64_t entries       # of each directory
    uint64_t block         # bytes
    unsigned block_bits
    uint64_t size
    uint64_t start         # of the first block
    bint scattered
    bint fresh             # entries' inodes are opened anew
    char *data             # `depth` times `block` bytes, and at least DIRENTS
    uint64_t depth
    char name[16]

cdef enum:
    DIRENTS = 32768

ctypedef int (*op_t)(work_t *w, uint64_t i) noexcept nogil

cdef statx_t unused_attr  # written by one thread, read by none


cdef const char *name(work_t *w, char first, uint64_t i) noexcept nogil:
    w.name[0] = first
    put_hex8(w.name + 1, i)
    return w.name


cdef inline int attr_at(int dirfd, const char *path, int flags) noexcept nogil:
    return statx(dirfd, path, flags, STATX_BASIC_STATS, &unused_attr)


cdef int getattr(work_t *w, uint64_t i) noexcept nogil:
    return attr_at(w.fd, b"", AT_EMPTY_PATH)


cdef int lookup(work_t *w, uint64_t i) noexcept nogil:
    return attr_at(w.files, name(w, c'f', i % w.count), AT_SYMLINK_NOFOLLOW)


cdef int lookup_new(work_t *w, uint64_t i) noexcept nogil:
    cdef int fd = openat(w.files, name(w, c'f', i % w.count), O_PATH | O_NOFOLLOW | O_CLOEXEC)
    return fd if fd < 0 else attr_at(fd, b"", AT_EMPTY_PATH) | c_close(fd)


cdef int lookup_absent(work_t *w, uint64_t i) noexcept nogil:
    if attr_at(w.files, name(w, c'n', i % w.count), AT_SYMLINK_NOFOLLOW) == 0:
        errno_set(EIO)
        return -1
    return 0 if errno == ENOENT else -1


cdef int reopen(work_t *w, int flags) noexcept nogil:
    return openat(w.proc, w.anchor_name, flags | O_CLOEXEC)


cdef int known(int parent, const char *path) noexcept nogil:
    """A name made its own inode: its O_PATH descriptor, its attributes read."""
    cdef int fd = openat(parent, path, O_PATH | O_NOFOLLOW | O_CLOEXEC)
    return fd if fd < 0 or attr_at(fd, b"", AT_EMPTY_PATH) == 0 else -1


cdef int open_release(work_t *w, uint64_t i) noexcept nogil:
    cdef int fd = reopen(w, O_RDONLY)
    return fd if fd < 0 else c_close(fd)


cdef int create(work_t *w, uint64_t i) noexcept nogil:
    """create, write 4 KiB, close, unlink, forget"""
    cdef const char *path = name(w, c'w', 0)
    cdef int inode, fd = openat(w.scratch, path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, <unsigned>0o644)
    if fd < 0:
        return fd
    inode = known(w.scratch, path)
    if inode < 0 or pwrite(fd, w.data, 4096, 0) != 4096:
        return -1
    return c_close(fd) | unlinkat(w.scratch, path, 0) | c_close(inode)


cdef int mkdir_rmdir(work_t *w, uint64_t i) noexcept nogil:
    cdef const char *path = name(w, c'w', 0)
    cdef int inode
    if mkdirat(w.scratch, path, 0o755) < 0:
        return -1
    inode = known(w.scratch, path)
    if inode < 0:
        return -1
    return unlinkat(w.scratch, path, AT_REMOVEDIR) | c_close(inode)


cdef int rename_back(work_t *w, uint64_t i) noexcept nogil:
    """there and back"""
    cdef char other[16]
    memcpy(other, name(w, c'b', 0), 16)
    name(w, c'a', 0)
    if renameat(w.scratch, w.name, w.scratch, other) < 0:
        return -1
    return renameat(w.scratch, other, w.scratch, w.name)


cdef int symlink_readlink(work_t *w, uint64_t i) noexcept nogil:
    """symlink, readlink, unlink, forget"""
    cdef const char *path = name(w, c'w', 0)
    cdef int inode
    if symlinkat(b"a/target/of/a/link", w.scratch, path) < 0:
        return -1
    inode = known(w.scratch, path)
    if inode < 0 or readlinkat(inode, b"", w.data, 4096) < 0:
        return -1
    return unlinkat(w.scratch, path, 0) | c_close(inode)


cdef int setattr_mode(work_t *w, uint64_t i) noexcept nogil:
    return fchmod(w.fd, 0o640) | attr_at(w.fd, b"", AT_EMPTY_PATH)


cdef int setattr_times(work_t *w, uint64_t i) noexcept nogil:
    cdef timespec times[2]
    times[0].tv_sec = times[1].tv_sec = 1000000000
    times[0].tv_nsec = times[1].tv_nsec = 1
    return futimens(w.fd, times) | attr_at(w.fd, b"", AT_EMPTY_PATH)


cdef int setattr_size(work_t *w, uint64_t i) noexcept nogil:
    """4 KiB, then 8 KiB"""
    return resize(w, 4096) | resize(w, 8192)


cdef int resize(work_t *w, off_t size) noexcept nogil:
    cdef int fd = reopen(w, O_WRONLY)
    if fd < 0:
        return fd
    return ftruncate(fd, size) | c_close(fd) | attr_at(w.anchor, b"", AT_EMPTY_PATH)


cdef int getxattr(work_t *w, uint64_t i) noexcept nogil:
    return 0 if getxattr_of(w.anchor_path, b"user.bench", w.data, 256) == 16 else -1


cdef int statfs_fd(work_t *w, uint64_t i) noexcept nogil:
    cdef statfs_t found
    return fstatfs(w.fd, &found)


cdef int list_open(work_t *w, int fd, bint plus) noexcept nogil:
    cdef uint64_t seen = 0
    cdef long at, n = 1
    cdef char *entry
    cdef int child
    while n > 0:
        n = syscall(SYS_getdents64, fd, w.data, DIRENTS)
        at = 0
        while at < n:
            entry = w.data + at
            at += (<unsigned short *>(entry + 16))[0]
            seen += 1
            entry += 19  # d_name
            if not plus or (entry[0] == c'.' and entry[1] in (c'\0', c'.')):
                continue
            if not w.fresh:
                if attr_at(fd, entry, AT_SYMLINK_NOFOLLOW) < 0:
                    return -1
                continue
            child = openat(fd, entry, O_PATH | O_NOFOLLOW | O_CLOEXEC)
            if child < 0 or attr_at(child, b"", AT_EMPTY_PATH) < 0 or c_close(child) < 0:
                return -1
    return 0 if n == 0 and seen == w.entries else -1


cdef int listing(work_t *w, uint64_t i, bint plus) noexcept nogil:
    cdef int rc, fd = openat(w.files, name(w, c'd', i % w.count), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    if fd < 0:
        return fd
    rc = list_open(w, fd, plus)
    return rc | c_close(fd)


cdef int readdir(work_t *w, uint64_t i) noexcept nogil:
    """open, getdents until the end, close"""
    return listing(w, i, False)


cdef int readdirplus(work_t *w, uint64_t i) noexcept nogil:
    """the same, and the attributes of each entry"""
    return listing(w, i, True)


cdef inline uint64_t offset(work_t *w, uint64_t i) noexcept nogil:
    cdef uint64_t mask = (<uint64_t>1 << w.block_bits) - 1
    return w.start + w.block * (scattered(i, w.block_bits) if w.scattered else i & mask)


cdef inline char *buffer(work_t *w, uint64_t i) noexcept nogil:
    return w.data + w.block * (i % w.depth)


cdef int read_block(work_t *w, uint64_t i) noexcept nogil:
    cdef uint64_t at = offset(w, i), want = 0
    if at < w.size:
        want = w.size - at if w.size - at < w.block else w.block
    return 0 if pread(w.fd, buffer(w, i), w.block, <off_t>at) == <ssize_t>want else -1


cdef int write_block(work_t *w, uint64_t i) noexcept nogil:
    return 0 if pwrite(w.fd, buffer(w, i), w.block, <off_t>offset(w, i)) == <ssize_t>w.block else -1


cdef int write_fsync(work_t *w, uint64_t i) noexcept nogil:
    return write_block(w, i) | c_fsync(w.fd)


cdef extern from *:
    """
    #include <errno.h>
    static inline void errno_set(int e) { errno = e; }
    """
    void errno_set(int e) nogil


cdef op_t kind(text) except NULL:
    if text == "getattr": return getattr
    if text == "lookup": return lookup
    if text == "lookup-new": return lookup_new
    if text == "lookup-absent": return lookup_absent
    if text == "open-release": return open_release
    if text == "create": return create
    if text == "mkdir-rmdir": return mkdir_rmdir
    if text == "rename": return rename_back
    if text == "symlink-readlink": return symlink_readlink
    if text == "setattr-mode": return setattr_mode
    if text == "setattr-times": return setattr_times
    if text == "setattr-size": return setattr_size
    if text == "getxattr": return getxattr
    if text == "statfs": return statfs_fd
    if text == "readdir": return readdir
    if text in ("readdirplus", "readdirplus-new"): return readdirplus
    if text == "read": return read_block
    if text == "write": return write_block
    if text == "write-fsync": return write_fsync
    raise ValueError(f"the floor has no {text}")


KINDS = (
    "getattr", "lookup", "lookup-new", "lookup-absent", "open-release", "create", "mkdir-rmdir", "rename",
    "symlink-readlink", "setattr-mode", "setattr-times", "setattr-size", "getxattr", "statfs", "readdir",
    "readdirplus", "readdirplus-new", "read", "write", "write-fsync",
)


cdef int loop(op_t op, work_t *w, double seconds, uint64_t first, hist_t *h, uint64_t *elapsed) noexcept nogil:
    """0 or an errno."""
    cdef uint64_t start = now_ns(), before = start, after
    cdef uint64_t end = start + <uint64_t>(seconds * 1e9)
    while before < end or h.n == 0:
        if op(w, first + h.n) < 0:
            return errno if errno else EIO
        after = now_ns()
        hist_add(h, after - before)
        before = after
    elapsed[0] = before - start
    return 0


cdef int open_anchor(work_t *w) except -1:
    cdef bytes text
    if w.fd < 0:
        return 0
    w.anchor = os.open(f"/proc/self/fd/{w.fd}", os.O_PATH | os.O_CLOEXEC)
    w.proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    text = b"/proc/self/fd/%d" % w.anchor
    memcpy(w.anchor_path, <const char *>text, len(text) + 1)
    text = b"%d" % w.anchor
    memcpy(w.anchor_name, <const char *>text, len(text) + 1)
    return 0


def measure(text, double seconds, double warm, *, int files=-1, int scratch=-1, int fd=-1, count=1,
            entries=0, block=0, blocks=1, size=0, start=0, bint scattered_order=False, depth=1):
    """Run one kind: (ns it took, ns of CPU time, a histogram as _measure.count). OSError.

    Descriptors as in work_t. depth: buffers of `block` bytes that take turns.
    """
    cdef work_t w
    cdef op_t op = kind(text)
    cdef uint64_t elapsed = 0, done, cpu = 0
    cdef size_t data_bytes = max(depth * block, DIRENTS)
    cdef hist_t *h = <hist_t *>calloc(1, sizeof(hist_t))
    cdef void *data = mmap(NULL, data_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
    cdef int error
    memset(&w, 0, sizeof(w))
    w.files, w.scratch, w.fd, w.count, w.entries = files, scratch, fd, count, entries
    w.block, w.block_bits, w.size = block, blocks.bit_length() - 1, size
    w.start, w.depth = start, depth
    w.anchor = w.proc = -1
    w.scattered, w.fresh = scattered_order, text == "readdirplus-new"
    try:
        if h == NULL or data == MAP_FAILED:
            raise MemoryError
        memset(data, 1, data_bytes)
        w.data = <char *>data
        open_anchor(&w)
        with nogil:
            error = loop(op, &w, warm, 0, h, &elapsed)
        if error == 0:
            done = h.n
            memset(h, 0, sizeof(hist_t))
            cpu = time.thread_time_ns()
            with nogil:
                error = loop(op, &w, seconds, done, h, &elapsed)
            cpu = time.thread_time_ns() - cpu
        if error:
            raise OSError(error, f"floor of {text}: {os.strerror(error)}")
        return elapsed, cpu, (h.n, h.sum, h.min, h.max, PyBytes_FromStringAndSize(<char *>h.counts, HIST_BUCKETS * 8))
    finally:
        for opened in (w.anchor, w.proc):
            if opened >= 0:
                os.close(opened)
        if data != MAP_FAILED:
            munmap(data, data_bytes)
        free(h)
