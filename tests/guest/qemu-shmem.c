/* LD_PRELOAD for QEMU 11.1: lets it map a file's last range, and read-only files, into a DAX window.
 *
 * QEMU takes what a vhost-user back end wants mapped (SHMEM_MAP) for memory backing and refuses it when the
 * file is shorter than offset + size; an empty file it makes as long as that. A guest maps 2 MiB whatever
 * the size is, so that the end of nearly every file would be EIO. QEMU learns the size by lseek(2), and only
 * for that: here a file that came over a socket is as long as can be.
 *
 * What it is asked to map read-only it maps for writing all the same, which fails: then it is tried again.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define FDS 65536

static atomic_uchar received[FDS]; /* by descriptor: it came over a socket */

static void *next(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    ssize_t (*real)(int, struct msghdr *, int) = next("recvmsg");
    ssize_t rc = real(fd, message, flags);
    struct cmsghdr *c;
    for (c = rc < 0 ? NULL : CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        size_t i, n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        for (i = 0; i < n; i++) {
            int got;
            memcpy(&got, CMSG_DATA(c) + i * sizeof(int), sizeof(got));
            if (got >= 0 && got < FDS)
                received[got] = 1;
        }
    }
    return rc;
}

int close(int fd)
{
    int (*real)(int) = next("close");
    if (fd >= 0 && fd < FDS)
        received[fd] = 0;
    return real(fd);
}

int dup(int fd)
{
    int (*real)(int) = next("dup");
    int copy = real(fd);
    if (copy >= 0 && copy < FDS && fd < FDS)
        received[copy] = received[fd];
    return copy;
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
    off64_t (*real)(int, off64_t, int) = next("lseek64");
    struct stat st;
    if (whence == SEEK_END && offset == 0 && fd >= 0 && fd < FDS && received[fd] &&
        fstat(fd, &st) == 0 && S_ISREG(st.st_mode))
        return INT64_MAX & -4096;
    return real(fd, offset, whence);
}

void *mmap64(void *at, size_t size, int prot, int flags, int fd, off64_t offset)
{
    void *(*real)(void *, size_t, int, int, int, off64_t) = next("mmap64");
    void *found = real(at, size, prot, flags, fd, offset);
    if (found == MAP_FAILED && errno == EACCES && fd >= 0 && fd < FDS && received[fd])
        found = real(at, size, prot & ~PROT_WRITE, flags, fd, offset);
    return found;
}

off_t lseek(int fd, off_t offset, int whence)
{
    return lseek64(fd, offset, whence);
}
