/* System calls of the data path without libc's checks for pthread_cancel(): two locked instructions for each,
 * which wait until the last reply has left the store buffer. As libc's otherwise, errno and all.
 */
#ifndef VFSD_SYSCALLS_H
#define VFSD_SYSCALLS_H

#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define sys_openat(...) ((int)syscall(SYS_openat, __VA_ARGS__)) /* int dirfd, path, int flags[, mode] */

static inline int sys_close(int fd) { return (int)syscall(SYS_close, fd); }

static inline ssize_t sys_preadv2(int fd, const struct iovec *iov, int n, int64_t offset, int flags)
{
	return syscall(SYS_preadv2, fd, iov, (long)n, (long)offset, (long)(offset >> 32), flags);
}

static inline ssize_t sys_pwritev2(int fd, const struct iovec *iov, int n, int64_t offset, int flags)
{
	return syscall(SYS_pwritev2, fd, iov, (long)n, (long)offset, (long)(offset >> 32), flags);
}

#endif
