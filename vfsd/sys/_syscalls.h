/* System calls of the data path without libc's checks for pthread_cancel(): two locked instructions for each,
 * which wait until the last reply has left the store buffer. As libc's otherwise, errno and all.
 */
#ifndef VFSD_SYSCALLS_H
#define VFSD_SYSCALLS_H

#include <errno.h>
#include <linux/membarrier.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
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

/* The other side of light_fence() (_atomics.h). Where membarrier(2) may not be called, a moment must do: a store
 * stays in a CPU's buffer for less than a microsecond. */
static inline void heavy_fence(void)
{
	struct timespec moment = {0, 10000000};
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) < 0 ||
	    syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) < 0)
		nanosleep(&moment, NULL);
}

#endif
