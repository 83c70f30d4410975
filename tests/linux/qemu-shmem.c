/* LD_PRELOAD for QEMU 11.1: lets it map a file's last range, and read-only files, into a DAX window, and run
 * programs from there without KVM.
 *
 * QEMU takes what a vhost-user back end wants mapped (SHMEM_MAP) for memory backing and refuses it when the
 * file is shorter than offset + size; an empty file it makes as long as that. A guest maps 2 MiB whatever
 * the size is, so that the end of nearly every file would be EIO. QEMU learns the size by lseek(2), and only
 * for that: here a file that came over a socket is as long as can be.
 *
 * What it is asked to map read-only it maps for writing all the same, which fails: then it is tried again.
 *
 * TCG knows translated code by its address among all of QEMU's memory blocks (ram_addr_t). A mapping that is
 * undone gives its address back, the next one gets it, and nothing tells TCG: the guest would go on running
 * what was there before. So TCG forgets all it has translated before anything takes the place of a mapping of
 * a program or library (ELF); doing so at every mapping would cost much where data change hands.
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
#define PROGRAMS 512 /* QEMU has no more memory regions; were it full, every mapping would flush */

static atomic_uchar received[FDS]; /* by descriptor: it came over a socket */

static void *next(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

static void *programs[PROGRAMS]; /* where parts of ELF files are, or were, mapped */
static int n_programs;

/* Symbols of QEMU itself, which its modules may use; with KVM the flush does nothing. QEMU's big lock is held. */
static void forget_code(void *new, int fd)
{
    void *(*first_cpu)(int) = dlsym(RTLD_DEFAULT, "qemu_get_cpu");
    void (*flush)(void *) = dlsym(RTLD_DEFAULT, "queue_tb_flush");
    uint64_t (*block_of)(void *) = dlsym(RTLD_DEFAULT, "qemu_ram_addr_from_host");
    void *cpu = first_cpu && flush && block_of ? first_cpu(0) : NULL;
    char magic[4];
    int i, gone = n_programs == PROGRAMS;
    if (!cpu)
        return;
    for (i = 0; i < n_programs; i++) {
        if (programs[i] == new || block_of(programs[i]) == UINT64_MAX) {
            gone = 1;
            programs[i--] = programs[--n_programs];
        }
    }
    if (gone)
        flush(cpu);
    if (n_programs < PROGRAMS && pread(fd, magic, 4, 0) == 4 && memcmp(magic, "\177ELF", 4) == 0)
        programs[n_programs++] = new;
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
    if (fd < 0 || fd >= FDS || !received[fd])
        return found;
    if (found == MAP_FAILED && errno == EACCES)
        found = real(at, size, prot & ~PROT_WRITE, flags, fd, offset);
    if (found != MAP_FAILED)
        forget_code(found, fd);
    return found;
}

off_t lseek(int fd, off_t offset, int whence)
{
    return lseek64(fd, offset, whence);
}
