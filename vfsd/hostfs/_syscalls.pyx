"""System calls that Python's os module lacks, for the operations that live in Python.

Each raises OSError with the call's errno and runs without the GIL.
"""

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport strlen

import os

__all__ = ("NOW", "OMIT", "fallocate", "getdents", "renameat2", "reset_thread_ids", "set_thread_ids", "utimens")

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)
    int64_t lseek(int fd, int64_t offset, int whence)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_getdents64
    long SYS_setresuid
    long SYS_setresgid

cdef extern from "<sys/stat.h>" nogil:
    struct timespec:
        int64_t tv_sec
        long tv_nsec
    int utimensat(int dirfd, const char *path, const timespec *times, int flags)
    long UTIME_NOW
    long UTIME_OMIT

cdef extern from "<fcntl.h>" nogil:
    int fallocate_c "fallocate"(int fd, int mode, int64_t offset, int64_t length)
    int AT_FDCWD
    int SEEK_SET

cdef extern from "<stdio.h>" nogil:
    int renameat2_c "renameat2"(int olddir, const char *old, int newdir, const char *new, unsigned int flags)

cdef packed struct linux_dirent64:  # 19 bytes, then the name
    uint64_t d_ino
    int64_t d_off
    uint16_t d_reclen
    uint8_t d_type

NOW = UTIME_NOW
OMIT = UTIME_OMIT


cdef int fail() except -1:
    raise OSError(errno, os.strerror(errno))


def utimens(path, int64_t atime_s, long atime_ns, int64_t mtime_s, long mtime_ns):
    """Times of a path, symlinks followed; NOW and OMIT may stand for nanoseconds."""
    cdef bytes text = os.fsencode(path)
    cdef const char *at = text
    cdef timespec times[2]
    cdef int rc
    times[0].tv_sec = atime_s
    times[0].tv_nsec = atime_ns
    times[1].tv_sec = mtime_s
    times[1].tv_nsec = mtime_ns
    with nogil:
        rc = utimensat(AT_FDCWD, at, times, 0)
    if rc < 0:
        fail()


def fallocate(int fd, int mode, int64_t offset, int64_t length):
    """fallocate(2)."""
    cdef int rc
    with nogil:
        rc = fallocate_c(fd, mode, offset, length)
    if rc < 0:
        fail()


def renameat2(int old_dir, bytes old, int new_dir, bytes new, unsigned int flags):
    """renameat2(2)."""
    cdef const char *old_name = old
    cdef const char *new_name = new
    cdef int rc
    with nogil:
        rc = renameat2_c(old_dir, old_name, new_dir, new_name, flags)
    if rc < 0:
        fail()


def getdents(int fd, int64_t offset, bytearray buffer):
    """Entries from a directory position on: (ino, position after it, type, name) each.

    Empty at the end of the directory. The guest keeps two readers of one handle apart (f_pos_lock).
    """
    cdef char *at = buffer
    cdef size_t size = len(buffer)
    cdef long n = -1
    cdef long done = 0
    cdef linux_dirent64 *entry
    with nogil:
        if lseek(fd, offset, SEEK_SET) >= 0:
            n = syscall(SYS_getdents64, fd, at, size)
    if n < 0:
        fail()
    entries = []
    while done < n:
        entry = <linux_dirent64 *>(at + done)
        name = at + done + sizeof(linux_dirent64)
        entries.append((entry.d_ino, <uint64_t>entry.d_off, entry.d_type, name[:strlen(name)]))
        done += entry.d_reclen
    return entries


def set_thread_ids(uint32_t uid, uint32_t gid):
    """Effective ids of this thread alone: libc's wrappers would change every thread's."""
    # The group first: without uid 0 it could not be changed any more.
    if syscall(SYS_setresgid, -1, gid, -1) < 0 or syscall(SYS_setresuid, -1, uid, -1) < 0:
        fail()


def reset_thread_ids(uint32_t uid, uint32_t gid):
    """Back from set_thread_ids: the user first, it is what allows to change the group."""
    if syscall(SYS_setresuid, -1, uid, -1) < 0 or syscall(SYS_setresgid, -1, gid, -1) < 0:
        fail()
