"""GETATTR, STATX, SETATTR, ACCESS, STATFS."""

from libc.errno cimport EINVAL, ENODATA, EOPNOTSUPP, EROFS, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from vfsd.fuse cimport _wire as w
from vfsd.fuse.dispatch cimport Dispatch, request_t, span_read, span_write
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.ops._caller cimport FD_BYTES, fd_name, place_get, place_put, place_t
from vfsd.hostfs.ids._credentials cimport NO_ID, become, caller_read, creator_t, enter_proc, keep_setid, unbecome
from vfsd.hostfs.ops._gone cimport check_linked, explain_denied
from vfsd.hostfs.ops._setid cimport before_change, set_mode
from vfsd.hostfs.table._handles cimport handle_get, handle_put
from vfsd.hostfs.ids._idmap cimport translate
from vfsd.hostfs.table._inodes cimport attr_fill, attr_is_kept, attr_of
from vfsd.hostfs.table._slots cimport store_relaxed_u8, tables_t
from vfsd.hostfs.table._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

cdef enum:
    STATX_RESERVED = 0x80000000  # STATX__RESERVED of linux/stat.h: EINVAL
    # What of fuse_setattr_in.valid sets anything
    SETS = w.FATTR_MODE | w.FATTR_UID | w.FATTR_GID | w.FATTR_SIZE | w.FATTR_ATIME | w.FATTR_MTIME

# What fuse_statx has room for and says of a file; other attributes are of the host's name space.
cdef unsigned int STATX_MASK = h.STATX_BASIC_STATS | h.STATX_BTIME
cdef uint64_t STATX_ATTRIBUTES = ~<uint64_t>(h.STATX_ATTR_AUTOMOUNT | h.STATX_ATTR_MOUNT_ROOT)


cdef int reply_attr(tables_t *t, request_t *r, int fd) noexcept nogil:
    cdef w.fuse_attr_out out
    cdef int rc = attr_of(t, fd, &out)
    if rc < 0:
        return rc
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef int op_getattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_getattr_in arg
    cdef place_t p
    cdef int64_t index
    cdef int fd = -1, rc
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or r.reply.bytes < sizeof(w.fuse_attr_out):
        return -EINVAL
    if arg.getattr_flags & w.FUSE_GETATTR_FH and (arg.fh != 0 or not t.zero_open):
        index = handle_get(t, arg.fh, &fd)
        if index < 0:
            return <int>index
        rc = reply_attr(t, r, fd)
        handle_put(t, index)
        return rc
    rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    rc = reply_attr(t, r, p.fd)
    place_put(t, &p)
    return rc


cdef void set_time(w.fuse_sx_time *to, const h.statx_timestamp *at) noexcept nogil:
    to.tv_sec = at.tv_sec
    to.tv_nsec = at.tv_nsec


cdef int reply_statx(tables_t *t, request_t *r, int fd, const w.fuse_statx_in *arg) noexcept nogil:
    cdef w.fuse_statx_out out
    cdef w.fuse_attr attr
    cdef h.statx_t st
    if h.statx(fd, b"", h.AT_EMPTY_PATH | arg.sx_flags, arg.sx_mask & STATX_MASK, &st) < 0:
        return -errno
    memset(&out, 0, sizeof(out))
    attr_fill(t, &st, &attr)
    if attr_is_kept(t, &st):
        out.attr_valid = t.attr_valid
        out.attr_valid_nsec = t.attr_valid_nsec
    out.stat.mask = st.stx_mask & STATX_MASK
    out.stat.blksize = attr.blksize
    out.stat.attributes = st.stx_attributes & STATX_ATTRIBUTES
    out.stat.attributes_mask = st.stx_attributes_mask & STATX_ATTRIBUTES
    out.stat.nlink = attr.nlink
    out.stat.uid = attr.uid
    out.stat.gid = attr.gid
    out.stat.mode = st.stx_mode
    out.stat.ino = attr.ino
    out.stat.size = attr.size
    out.stat.blocks = attr.blocks
    set_time(&out.stat.atime, &st.stx_atime)
    set_time(&out.stat.btime, &st.stx_btime)
    set_time(&out.stat.ctime, &st.stx_ctime)
    set_time(&out.stat.mtime, &st.stx_mtime)
    out.stat.rdev_major = st.stx_rdev_major
    out.stat.rdev_minor = st.stx_rdev_minor
    out.stat.dev_major = st.stx_dev_major
    out.stat.dev_minor = st.stx_dev_minor
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef int op_statx(void *fs, request_t *r) noexcept nogil:
    """Asked by Linux for the birth time only (fuse_do_statx)."""
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_statx_in arg
    cdef place_t p
    cdef int64_t index
    cdef int fd = -1, rc
    memset(&arg, 0, sizeof(arg))
    if (span_read(&r.body, &arg, sizeof(arg)) < 0 or r.reply.bytes < sizeof(w.fuse_statx_out)
            or arg.sx_flags & ~<uint32_t>h.AT_STATX_SYNC_TYPE or arg.sx_mask & STATX_RESERVED):
        return -EINVAL
    if arg.getattr_flags & w.FUSE_GETATTR_FH and (arg.fh != 0 or not t.zero_open):
        index = handle_get(t, arg.fh, &fd)
        if index < 0:
            return <int>index
        rc = reply_statx(t, r, fd, &arg)
        handle_put(t, index)
        return rc
    rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    rc = reply_statx(t, r, p.fd, &arg)
    place_put(t, &p)
    return rc


cdef int op_access(void *fs, request_t *r) noexcept nogil:
    """access(2) as the caller. Linux never asks on virtio-fs, where it goes by the modes it knows."""
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_access_in arg
    cdef creator_t c
    cdef place_t p
    cdef uint32_t mode
    cdef int rc
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or arg.mask & ~<uint32_t>(h.R_OK | h.W_OK | h.X_OK):
        return -EINVAL
    rc = caller_read(t, r, &c)
    if rc == 0:
        rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    mode = t.inodes[p.index].mode
    if t.readonly and arg.mask & h.W_OK and (mode == h.S_IFREG or mode == h.S_IFDIR or mode == h.S_IFLNK):
        rc = -EROFS  # sb_permission: what else there is does not write to the file system
    if rc == 0:
        rc = become(t, &c)
    if rc == 0:
        if h.syscall(h.SYS_faccessat2, p.fd, b"", arg.mask, h.AT_EMPTY_PATH | h.AT_EACCESS) < 0:
            rc = -errno
        unbecome(t, &c)
    place_put(t, &p)
    return rc


cdef int set_size(tables_t *t, place_t *p, const w.fuse_setattr_in *arg) noexcept nogil:
    """Through the guest's own handle if it named one: it may be the only one allowed to write.

    Else as truncate(2), which unlike ftruncate(2) may leave the times of a file alone that has this size.
    """
    cdef char path[FD_BYTES]
    cdef int64_t index
    cdef int fd = -1
    cdef int rc = before_change(t, p.fd, arg.valid & w.FATTR_KILL_SUIDGID)
    if rc < 0:
        return rc
    if arg.valid & w.FATTR_FH and (arg.fh != 0 or not t.zero_open):
        index = handle_get(t, arg.fh, &fd)
        if index < 0:
            return <int>index
        rc = -errno if h.ftruncate(fd, arg.size) < 0 else 0
        handle_put(t, index)
        return rc
    rc = enter_proc(t)
    if rc < 0:
        return rc
    return -errno if h.truncate(fd_name(p.fd, path), arg.size) < 0 else 0


cdef int set_owner(tables_t *t, int fd, const w.fuse_setattr_in *arg) noexcept nogil:
    """The kernel takes set-id bits and its security.capability away."""
    cdef uint32_t uid = NO_ID, gid = NO_ID
    cdef int rc = 0
    if arg.valid & w.FATTR_UID:
        rc = -EINVAL if arg.uid == NO_ID else translate(&t.uid_to_host, arg.uid, &uid)
    if rc == 0 and arg.valid & w.FATTR_GID:
        rc = -EINVAL if arg.gid == NO_ID else translate(&t.gid_to_host, arg.gid, &gid)
    if rc == 0:
        rc = keep_setid(t, True)
    if rc == 0:
        rc = -errno if h.fchownat(fd, b"", uid, gid, h.AT_EMPTY_PATH) < 0 else 0
    return rc


cdef int remove_capability(tables_t *t, int fd) noexcept nogil:
    """What the kernel does to security.capability, where that goes by another name."""
    cdef char path[FD_BYTES]
    cdef int rc
    if t.capability[0] == 0:
        return 0
    rc = enter_proc(t)
    if rc == 0 and h.removexattr(fd_name(fd, path), t.capability) < 0 and errno not in (ENODATA, EOPNOTSUPP):
        rc = -errno
    return rc


cdef int set_times(int fd, const w.fuse_setattr_in *arg) noexcept nogil:
    cdef h.timespec times[2]
    times[0].tv_sec = arg.atime
    times[0].tv_nsec = arg.atimensec
    times[1].tv_sec = arg.mtime
    times[1].tv_nsec = arg.mtimensec
    if not arg.valid & w.FATTR_ATIME:
        times[0].tv_nsec = h.UTIME_OMIT
    elif arg.valid & w.FATTR_ATIME_NOW:
        times[0].tv_nsec = h.UTIME_NOW
    if not arg.valid & w.FATTR_MTIME:
        times[1].tv_nsec = h.UTIME_OMIT
    elif arg.valid & w.FATTR_MTIME_NOW:
        times[1].tv_nsec = h.UTIME_NOW
    return -errno if h.utimensat(fd, b"", times, h.AT_EMPTY_PATH) < 0 else 0


cdef int op_setattr(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_setattr_in arg
    cdef place_t p
    cdef int rc
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or r.reply.bytes < sizeof(w.fuse_attr_out):
        return -EINVAL
    rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    if arg.valid & w.FATTR_SIZE and not arg.valid & w.FATTR_FH:
        rc = check_linked(t, r, p.index, p.fd)  # truncate(2), by a name
        if rc < 0:
            place_put(t, &p)
            return rc
    if t.killpriv_v2 and not arg.valid & SETS:
        # HANDLE_KILLPRIV_V2: before a FALLOCATE or copy that is to take set-id bits away (fuse_setattr
        # drops ATTR_KILL_SUID and sends the rest). Taken away only then: a chown(-1, -1) looks the
        # same, and Linux sends it for who has no right to it.
        store_relaxed_u8(&t.inodes[p.index].kill, 1)
    # The owner first: a change of owner takes set-uid bits away, which the mode may ask for.
    if arg.valid & (w.FATTR_UID | w.FATTR_GID):
        rc = set_owner(t, p.fd, &arg)
    if rc == 0 and arg.valid & w.FATTR_MODE:
        rc = set_mode(t, p.fd, arg.mode & 0o7777)
    if rc == 0 and arg.valid & (w.FATTR_UID | w.FATTR_GID | w.FATTR_SIZE):
        rc = remove_capability(t, p.fd)
    if rc == 0 and arg.valid & w.FATTR_SIZE:
        rc = explain_denied(t, r, p.index, p.fd, set_size(t, &p, &arg))
    if rc == 0 and arg.valid & (w.FATTR_ATIME | w.FATTR_MTIME):
        rc = set_times(p.fd, &arg)
    if rc == 0:
        rc = reply_attr(t, r, p.fd)
    place_put(t, &p)
    return rc


cdef int op_statfs(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_kstatfs out
    cdef h.statfs_t st
    cdef place_t p
    cdef int rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    rc = -errno if h.fstatfs(p.fd, &st) < 0 else 0
    place_put(t, &p)
    if rc < 0:
        return rc
    memset(&out, 0, sizeof(out))
    out.blocks = st.f_blocks
    out.bfree = st.f_bfree
    out.bavail = st.f_bavail
    out.files = st.f_files
    out.ffree = st.f_ffree
    out.bsize = <uint32_t>st.f_bsize
    out.namelen = <uint32_t>st.f_namelen
    out.frsize = <uint32_t>st.f_frsize
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *t = tables.t
    dispatch.set_hot(NUMBER["GETATTR"], op_getattr, t, tables)
    dispatch.set_hot(NUMBER["STATX"], op_statx, t, tables)
    dispatch.set_hot(NUMBER["SETATTR"], op_setattr, t, tables)
    dispatch.set_hot(NUMBER["ACCESS"], op_access, t, tables)
    dispatch.set_hot(NUMBER["STATFS"], op_statfs, t, tables)
