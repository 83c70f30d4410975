"""System calls of the data path that libc or Cython's own declarations lack."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vfsd._ring cimport iovec

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
        uint32_t stx_rdev_major
        uint32_t stx_rdev_minor
        uint32_t stx_dev_major
        uint32_t stx_dev_minor
        uint64_t stx_mnt_id
    int statx(int dirfd, const char *path, int flags, unsigned int mask, statx_t *buf)
    unsigned int STATX_BASIC_STATS
    unsigned int STATX_MNT_ID
    unsigned int S_IFMT
    unsigned int S_IFDIR
    unsigned int S_IFREG

cdef extern from "<fcntl.h>" nogil:
    struct file_handle:
        unsigned int handle_bytes
        int handle_type
        unsigned char f_handle[0]
    int name_to_handle_at(int dirfd, const char *path, file_handle *handle, int *mount_id, int flags)
    int open_by_handle_at(int mount_fd, file_handle *handle, int flags)
    int openat(int dirfd, const char *path, int flags)
    int AT_EMPTY_PATH
    int AT_SYMLINK_NOFOLLOW
    int AT_NO_AUTOMOUNT
    int O_PATH
    int O_NOFOLLOW
    int O_CLOEXEC
    int O_APPEND
    int O_RDONLY
    int O_DIRECTORY

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *iov, int n, int64_t offset)
    ssize_t pwritev(int fd, const iovec *iov, int n, int64_t offset)
    ssize_t pwritev2(int fd, const iovec *iov, int n, int64_t offset, int flags)
    int RWF_APPEND
    int IOV_MAX "1024"

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    int c_dup "dup"(int fd)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, int64_t offset)
    int munmap(void *addr, size_t length)
    void *MAP_FAILED
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    int MAP_NORESERVE

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *m, const void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *m)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_trylock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)
    int sched_yield()
