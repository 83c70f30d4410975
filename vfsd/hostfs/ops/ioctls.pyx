"""IOCTL: the flags and attributes of a file that chattr(1) and xfs_io(8) set; no other reaches the host."""

from libc.errno cimport EINVAL, ENOTTY, EROFS, errno
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset

from vfsd.fuse cimport _wire as w
from vfsd.fuse.dispatch cimport TRY, WOULD_BLOCK, Dispatch, request_args, request_t, span_read, span_write
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.ops._caller cimport file_get
from vfsd.hostfs.ids._credentials cimport become, caller_read, creator_t, unbecome
from vfsd.hostfs.table._handles cimport handle_put
from vfsd.hostfs.table._slots cimport tables_t
from vfsd.hostfs.table._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

cdef enum:
    # FUSE_IOCTL_* of linux/fuse.h. None changes what is done: these commands' data are the same for a
    # 32-bit caller, and of a directory as of a file.
    IOCTL_COMPAT = 1
    IOCTL_UNRESTRICTED = 2
    IOCTL_32BIT = 8
    IOCTL_DIR = 16
    IOCTL_COMPAT_X32 = 32
    IOCTL_FLAGS = IOCTL_COMPAT | IOCTL_UNRESTRICTED | IOCTL_32BIT | IOCTL_DIR | IOCTL_COMPAT_X32

# What a command passes, either way.
cdef union data_t:
    uint32_t flags  # the number says long, the kernel takes and gives an int
    h.fsxattr attributes


cdef struct command_t:
    unsigned int request  # ioctl(2)'s, 0: not for the host
    uint32_t size         # of its data
    bint sets


cdef command_t command_of(uint32_t cmd) noexcept nogil:
    cdef command_t c
    c.request = 0
    c.size = sizeof(uint32_t)
    c.sets = False
    if cmd == h.FS_IOC_GETFLAGS or cmd == h.FS_IOC32_GETFLAGS:
        c.request = h.FS_IOC_GETFLAGS
    elif cmd == h.FS_IOC_SETFLAGS or cmd == h.FS_IOC32_SETFLAGS:
        c.request = h.FS_IOC_SETFLAGS
        c.sets = True
    elif cmd == h.FS_IOC_FSGETXATTR:
        c.request = cmd
        c.size = sizeof(h.fsxattr)
    elif cmd == h.FS_IOC_FSSETXATTR:
        c.request = cmd
        c.size = sizeof(h.fsxattr)
        c.sets = True
    return c


cdef int set_attributes(tables_t *t, request_t *r, int fd, const command_t *c, data_t *data) noexcept nogil:
    """As the caller: whose file it is, and who may make one immutable, is for the host to say."""
    cdef creator_t who
    cdef int rc = span_read(&r.body, data, c.size)
    if rc == 0:
        rc = caller_read(t, r, &who)
    if rc == 0:
        rc = become(t, &who)
    if rc == 0:
        rc = -errno if h.ioctl(fd, c.request, data) < 0 else 0
        unbecome(t, &who)
    return rc


cdef int op_ioctl(void *fs, request_t *r) noexcept nogil:
    """Sizes in and out are the guest's: Linux sends an int where the command's number says long."""
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_ioctl_in arg
    cdef w.fuse_ioctl_out out
    cdef command_t c
    cdef data_t data
    cdef int64_t index
    cdef int fd = -1, rc
    memset(&arg, 0, sizeof(arg))
    memset(&out, 0, sizeof(out))
    memset(&data, 0, sizeof(data))
    if (request_args(r, &arg, sizeof(arg)) < 0 or arg.in_size > r.body.bytes
            or r.reply.bytes < sizeof(out) or arg.out_size > r.reply.bytes - sizeof(out)
            or arg.flags & ~<uint32_t>IOCTL_FLAGS):
        return -EINVAL
    c = command_of(arg.cmd)
    if c.request == 0:
        return -ENOTTY
    if c.size > (arg.in_size if c.sets else arg.out_size):
        return -EINVAL
    if c.sets and t.readonly:
        return -EROFS
    if c.sets and r.mode == TRY:
        return WOULD_BLOCK  # it is written to the journal
    index = file_get(t, r.header.nodeid, arg.fh, 0, &fd)
    if index < 0:
        return <int>index
    if c.sets:
        rc = set_attributes(t, r, fd, &c, &data)
    else:
        rc = -errno if h.ioctl(fd, c.request, &data) < 0 else 0
    handle_put(t, index)
    if rc < 0:
        return rc
    r.reply_bytes = sizeof(out)
    span_write(&r.reply, &out, sizeof(out))
    if not c.sets:
        r.reply_bytes += c.size
        span_write(&r.reply, &data, c.size)
    return 0


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *t = tables.t
    dispatch.set_hot(NUMBER["IOCTL"], op_ioctl, t, tables)
