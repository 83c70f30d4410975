"""System calls of the data path, with the field's own names; libc or Cython lack some of them."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vfsd.sys._uio cimport iovec

cdef extern from "<sys/stat.h>" nogil:
    struct statx_timestamp:
        int64_t tv_sec
        uint32_t tv_nsec
    struct statx_t "statx":
        uint32_t stx_mask
        uint32_t stx_blksize
        uint32_t stx_nlink
        uint32_t stx_uid
        uint32_t stx_gid
        unsigned short stx_mode
        uint64_t stx_ino
        uint64_t stx_size
        uint64_t stx_blocks
        statx_timestamp stx_atime
        statx_timestamp stx_ctime
        statx_timestamp stx_mtime
        statx_timestamp stx_btime
        uint64_t stx_attributes
        uint64_t stx_attributes_mask
        uint32_t stx_rdev_major
        uint32_t stx_rdev_minor
        uint32_t stx_dev_major
        uint32_t stx_dev_minor
        uint64_t stx_mnt_id
    struct timespec:
        int64_t tv_sec
        long tv_nsec
    int statx(int dirfd, const char *path, int flags, unsigned int mask, statx_t *buf)
    unsigned int umask(unsigned int mask)
    int mkdirat(int dirfd, const char *path, unsigned int mode)
    int mknodat(int dirfd, const char *path, unsigned int mode, uint64_t dev)
    int fchmodat(int dirfd, const char *path, unsigned int mode, int flags)
    int utimensat(int dirfd, const char *path, const timespec *times, int flags)
    unsigned int STATX_BASIC_STATS
    unsigned int STATX_INO
    unsigned int STATX_MODE
    unsigned int STATX_BTIME
    unsigned int STATX_MNT_ID
    unsigned int STATX_MNT_ID_UNIQUE "0x4000U"  # Linux 6.8; older ones give the one that is reused
    unsigned int STATX_NLINK
    unsigned int STATX_CTIME
    unsigned int STATX_TYPE
    unsigned int STATX_SIZE
    unsigned int STATX_ATTR_AUTOMOUNT
    unsigned int STATX_ATTR_MOUNT_ROOT
    unsigned int S_IFMT
    unsigned int S_IFDIR
    unsigned int S_IFREG
    unsigned int S_IFLNK
    unsigned int S_ISGID
    unsigned int S_ISUID
    unsigned int S_IXGRP
    long UTIME_NOW
    long UTIME_OMIT

cdef extern from "<time.h>" nogil:
    ssize_t pread(int fd, void *to, size_t n, int64_t offset)
    int clock_gettime(int clock, timespec *now)
    int nanosleep(const timespec *how_long, timespec *left)
    int CLOCK_REALTIME_COARSE   # what files are given
    int CLOCK_MONOTONIC_COARSE  # the time of the last tick: read for next to nothing

cdef extern from "<sys/sysmacros.h>" nogil:
    uint64_t makedev(unsigned int major, unsigned int minor)

cdef extern from "<sys/statfs.h>" nogil:
    struct statfs_t "statfs":
        long f_type
        long f_bsize
        uint64_t f_blocks
        uint64_t f_bfree
        uint64_t f_bavail
        uint64_t f_files
        uint64_t f_ffree
        long f_namelen
        long f_frsize
    int fstatfs(int fd, statfs_t *buf)

cdef extern from "<fcntl.h>" nogil:
    struct file_handle:
        unsigned int handle_bytes
        int handle_type
        unsigned char f_handle[0]
    int name_to_handle_at(int dirfd, const char *path, file_handle *handle, int *mount_id, int flags)
    int open_by_handle_at(int mount_fd, file_handle *handle, int flags)
    struct flock_t "flock":
        short l_type
        short l_whence
        int64_t l_start
        int64_t l_len
        int l_pid
    int fcntl(int fd, int cmd, ...)
    int F_GETFL
    int F_SETFL
    int F_OFD_GETLK
    int F_OFD_SETLK
    int F_RDLCK
    int F_WRLCK
    int F_UNLCK
    int fallocate(int fd, int mode, int64_t offset, int64_t length)
    unsigned int FALLOC_FL_KEEP_SIZE
    unsigned int FALLOC_FL_PUNCH_HOLE
    unsigned int FALLOC_FL_ZERO_RANGE
    ssize_t copy_file_range(int fd_in, int64_t *off_in, int fd_out, int64_t *off_out, size_t length,
                            unsigned int flags)
    int AT_FDCWD
    int AT_EACCESS
    int AT_EMPTY_PATH
    int AT_SYMLINK_NOFOLLOW
    int AT_SYMLINK_FOLLOW
    int AT_NO_AUTOMOUNT
    int AT_REMOVEDIR
    int AT_STATX_FORCE_SYNC
    int AT_STATX_SYNC_TYPE
    int O_ACCMODE
    int O_APPEND
    int O_CLOEXEC
    int O_CREAT
    int O_DIRECT
    int O_DIRECTORY
    int O_DSYNC
    int O_EXCL
    int O_NOATIME
    int O_NOFOLLOW
    int O_NONBLOCK
    int O_PATH
    int O_RDONLY
    int O_RDWR
    int O_SYNC
    int O_TMPFILE
    int O_TRUNC
    int O_WRONLY

cdef extern from "<stdio.h>" nogil:
    int renameat2(int olddir, const char *old, int newdir, const char *new, unsigned int flags)
    unsigned int RENAME_NOREPLACE
    unsigned int RENAME_EXCHANGE
    unsigned int RENAME_WHITEOUT

cdef extern from "<sys/file.h>" nogil:
    int flock(int fd, int operation)
    int LOCK_SH
    int LOCK_EX
    int LOCK_NB
    int LOCK_UN

cdef extern from "_syscalls.h" nogil:
    int openat "sys_openat"(int dirfd, const char *path, int flags, ...)
    int close "sys_close"(int fd)
    ssize_t preadv2 "sys_preadv2"(int fd, const iovec *iov, int n, int64_t offset, int flags)
    ssize_t pwritev2 "sys_pwritev2"(int fd, const iovec *iov, int n, int64_t offset, int flags)

cdef extern from "<sys/uio.h>" nogil:
    int RWF_APPEND
    int RWF_DSYNC
    int RWF_NOWAIT
    int RWF_SYNC
    int IOV_MAX "1024"

cdef extern from "<unistd.h>" nogil:
    int c_dup "dup"(int fd)
    int fchdir(int fd)
    int fsync(int fd)
    int fdatasync(int fd)
    int syncfs(int fd)
    int ftruncate(int fd, int64_t size)
    int truncate(const char *path, int64_t size)
    int64_t lseek(int fd, int64_t offset, int whence)
    int linkat(int olddir, const char *old, int newdir, const char *new, int flags)
    int symlinkat(const char *target, int dirfd, const char *path)
    int unlinkat(int dirfd, const char *path, int flags)
    ssize_t write(int fd, const void *data, size_t size)
    ssize_t readlinkat(int dirfd, const char *path, char *buf, size_t size)
    int fchownat(int dirfd, const char *path, uint32_t uid, uint32_t gid, int flags)
    long syscall(long number, ...)
    int R_OK
    int W_OK
    int X_OK
    int SEEK_SET
    int SEEK_DATA
    int SEEK_HOLE

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_faccessat2
    long SYS_close_range
    long SYS_getdents64
    long SYS_openat2
    long SYS_setresuid
    long SYS_setresgid
    long SYS_getgroups
    long SYS_setgroups
    long SYS_capget
    long SYS_capset

cdef extern from "<linux/openat2.h>" nogil:
    struct open_how:
        uint64_t flags
        uint64_t mode
        uint64_t resolve
    uint64_t RESOLVE_CACHED "UINT64_C(0x20)"  # Linux 5.12
    uint64_t RESOLVE_NO_SYMLINKS "UINT64_C(0x04)"

cdef extern from "<linux/capability.h>" nogil:
    struct __user_cap_header_struct:
        uint32_t version
        int pid
    uint32_t LINUX_CAPABILITY_VERSION_3 "_LINUX_CAPABILITY_VERSION_3"
    int CAP_DAC_OVERRIDE
    int CAP_FSETID

cdef extern from "<sched.h>" nogil:
    int unshare(int flags)
    int CLONE_FS

cdef extern from "<sys/xattr.h>" nogil:
    ssize_t getxattr(const char *path, const char *name, void *value, size_t size)
    ssize_t listxattr(const char *path, char *names, size_t size)
    int setxattr(const char *path, const char *name, const void *value, size_t size, int flags)
    int removexattr(const char *path, const char *name)
    int fsetxattr(int fd, const char *name, const void *value, size_t size, int flags)
    int fremovexattr(int fd, const char *name)
    int XATTR_CREATE
    int XATTR_REPLACE

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/fs.h>" nogil:
    struct fsxattr:
        uint32_t fsx_xflags
    unsigned int FS_IOC_GETFLAGS
    unsigned int FS_IOC_SETFLAGS
    unsigned int FS_IOC32_GETFLAGS
    unsigned int FS_IOC32_SETFLAGS
    unsigned int FS_IOC_FSGETXATTR
    unsigned int FS_IOC_FSSETXATTR
    uint32_t FS_XFLAG_DAX

cdef packed struct linux_dirent64:  # 19 bytes, then the name
    uint64_t d_ino
    int64_t d_off
    uint16_t d_reclen
    uint8_t d_type

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, int64_t offset)
    int munmap(void *addr, size_t length)
    void *MAP_FAILED
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_SHARED
    int MAP_ANONYMOUS
    int MAP_NORESERVE

cdef enum:
    FD_BYTES = 16    # a descriptor's number as text, with the NUL
    PATH_BYTES = 4096  # PATH_MAX, with the NUL


cdef inline int open_resolved(int dirfd, const char *path, int flags, uint64_t resolve) noexcept nogil:
    """openat2(2). resolve: RESOLVE_*."""
    cdef open_how how
    how.flags = flags
    how.mode = 0
    how.resolve = resolve
    return <int>syscall(SYS_openat2, dirfd, path, &how, sizeof(how))


cdef inline int open_cached(int dirfd, const char *path, int flags) noexcept nogil:
    """openat(2) that waits for no disk: EAGAIN where it would have to, to look the name up."""
    return open_resolved(dirfd, path, flags, RESOLVE_CACHED)


cdef inline const char *fd_name(int fd, char *text) noexcept nogil:
    """The name below /proc/self/fd (tables_t.proc_fd) of what a descriptor stands for."""
    cdef int at = 0, i = FD_BYTES
    cdef char digits[FD_BYTES]
    while True:
        i -= 1
        digits[i] = c'0' + fd % 10
        fd //= 10
        if fd == 0:
            break
    while i < FD_BYTES:
        text[at] = digits[i]
        at += 1
        i += 1
    text[at] = 0
    return text
