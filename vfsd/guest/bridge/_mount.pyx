"""System calls around mounts that Python has none of. Each may wait for a file system to answer."""

from libc.errno cimport errno
from libc.stddef cimport size_t

import os

cdef extern from "<sys/mount.h>" nogil:
    int c_mount "mount"(const char *source, const char *target, const char *fstype, unsigned long flags,
                        const void *data)
    int c_umount2 "umount2"(const char *target, int flags)

cdef extern from "<sys/stat.h>" nogil:
    struct c_statx "statx":
        unsigned int stx_mask
        unsigned long stx_mnt_id
    int statx(int dir_fd, const char *path, int flags, unsigned int mask, c_statx *found)

cdef extern from "<fcntl.h>" nogil:
    int AT_FDCWD
    int AT_SYMLINK_NOFOLLOW
    int AT_NO_AUTOMOUNT
    int AT_STATX_DONT_SYNC

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_fsopen
    long SYS_fsconfig
    long SYS_fsmount

cdef extern from "<unistd.h>" nogil:
    int c_syncfs "syncfs"(int fd)
    # Takes any number of long arguments; six are the most that a system call has.
    long c_syscall "syscall"(long number, long a, long b, long c, long d, long e)

cdef enum:
    FSOPEN_CLOEXEC = 1
    FSMOUNT_CLOEXEC = 1
    FSCONFIG_CMD_CREATE = 6
    STATX_MNT_ID_UNIQUE = 0x4000  # Linux 6.8; before it the number may be used again
    STATX_MNT_ID = 0x1000


cdef int check(long result, int error) except -1:
    if result < 0:
        raise OSError(error, os.strerror(error))
    return 0


def mount(bytes source not None, bytes target not None, bytes fstype not None, unsigned long flags,
          bytes data not None):
    cdef const char *words[4]
    cdef int result, error
    words[0], words[1], words[2], words[3] = source, target, fstype, data
    with nogil:
        result = c_mount(words[0], words[1], words[2], flags, words[3])
        error = errno
    check(result, error)


def umount2(bytes target not None, int flags):
    cdef const char *path = target
    cdef int result, error
    with nogil:
        result = c_umount2(path, flags)
        error = errno
    check(result, error)


def syncfs(int fd):
    cdef int result, error
    with nogil:
        result = c_syncfs(fd)
        error = errno
    check(result, error)


def mount_id(bytes path not None):
    cdef const char *text = path
    cdef c_statx found
    cdef int result, error
    with nogil:
        result = statx(AT_FDCWD, text, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC,
                       STATX_MNT_ID_UNIQUE | STATX_MNT_ID, &found)
        error = errno
    check(result, error)
    return found.stx_mnt_id


def open_control():
    cdef const char *name = b"fusectl"
    cdef long context = c_syscall(SYS_fsopen, <long>name, FSOPEN_CLOEXEC, 0, 0, 0)
    cdef long control
    check(context, errno)
    try:
        check(c_syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, 0, 0, 0), errno)
        control = c_syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, 0, 0, 0)
        check(control, errno)
    finally:
        os.close(context)
    return control
