"""OPENDIR, READDIR, READDIRPLUS. RELEASEDIR and FSYNCDIR are those of files (`data`)."""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset, strlen

from vfsd cimport _wire as w
from vfsd._wire cimport FUSE_ROOT_ID
from vfsd.fuse.dispatch cimport Dispatch, request_t, span_limit, span_read, span_write
from vfsd.hostfs cimport _host as h
from vfsd.hostfs._caller cimport place_get, place_put, place_t, reopen
from vfsd.hostfs._handles cimport handle_get, handle_open, handle_put
from vfsd.hostfs._inodes cimport entry_at
from vfsd.hostfs._slots cimport tables_t
from vfsd.hostfs._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

cdef enum:
    GETDENTS_MAX = 32768   # bytes of host entries read at a time, on the stack
    GETDENTS_MIN = 1024    # holds any entry
    PLUS_RATIO = 5         # a READDIRPLUS record is that much longer than the host's, at least


cdef int op_opendir(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_open_out out
    cdef place_t p
    cdef uint64_t fh = 0
    cdef int fd, rc
    if r.body.bytes < sizeof(w.fuse_open_in) or r.reply.bytes < sizeof(out):
        return -EINVAL
    rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    fd = reopen(t, &p, h.O_RDONLY | h.O_DIRECTORY)
    place_put(t, &p)
    if fd < 0:
        return fd
    rc = handle_open(t, fd, &fh)
    if rc < 0:
        h.close(fd)
        return rc
    out.fh = fh
    out.open_flags = t.opendir_flags
    out.backing_id = 0
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef inline bint is_dot(const char *name) noexcept nogil:
    return name[0] == c'.' and (name[1] == 0 or (name[1] == c'.' and name[2] == 0))


cdef void add_entry(tables_t *t, request_t *r, int parent, const char *name, bint *fresh) noexcept nogil:
    """The lookup in front of a READDIRPLUS record; nodeid 0 where there is none.

    Gone since, or out of descriptors: the name is listed all the same, the guest may ask. fresh:
    whether the last entry's inode was new, as the next one's will be then.
    """
    cdef w.fuse_entry_out out
    cdef int rc = -1 if is_dot(name) else entry_at(t, parent, name, fresh[0], &out)
    if rc < 0:
        memset(&out, 0, sizeof(out))
    else:
        fresh[0] = rc
    span_write(&r.reply, &out, sizeof(out))


cdef bint add_record(tables_t *t, request_t *r, int parent, const h.linux_dirent64 *entry, bint plus,
                     bint *fresh) noexcept nogil:
    """One host entry as a record of the reply. False: it does not fit."""
    cdef const char *name = <const char *>(entry + 1)
    cdef uint64_t zeros = 0
    cdef w.fuse_dirent out
    cdef uint32_t n = <uint32_t>strlen(name)
    cdef uint32_t size = (sizeof(out) + n + 7) & ~<uint32_t>7
    if size + (sizeof(w.fuse_entry_out) if plus else 0) > r.reply.bytes:
        return False
    if plus:
        add_entry(t, r, parent, name, fresh)
        r.reply_bytes += sizeof(w.fuse_entry_out)
    out.ino = entry.d_ino
    if r.header.nodeid == FUSE_ROOT_ID and is_dot(name):
        out.ino = t.inodes[FUSE_ROOT_ID].ino  # what lies above the share is nobody's business
    out.off = entry.d_off
    out.namelen = n
    out.type = entry.d_type
    span_write(&r.reply, &out, sizeof(out))
    span_write(&r.reply, name, n)
    span_write(&r.reply, &zeros, size - sizeof(out) - n)
    r.reply_bytes += size
    return True


cdef int list_from(tables_t *t, request_t *r, int fd, int64_t offset, bint plus) noexcept nogil:
    """Whole records from a position of the directory on, until the reply is full: 0 or -errno.

    The guest keeps two readers of one handle apart (f_pos_lock).
    """
    cdef char buffer[GETDENTS_MAX]
    cdef h.linux_dirent64 *entry
    cdef uint64_t size
    cdef long n, at
    cdef bint fresh = False
    if h.lseek(fd, offset, h.SEEK_SET) < 0:
        return -errno
    while True:
        # No more than about what fits: the rest would be read again for the next reply.
        size = r.reply.bytes // PLUS_RATIO if plus else r.reply.bytes
        size = GETDENTS_MIN if size < GETDENTS_MIN else GETDENTS_MAX if size > GETDENTS_MAX else size
        n = h.syscall(h.SYS_getdents64, fd, buffer, size)
        if n < 0:
            return -errno if r.reply_bytes == 0 else 0
        if n == 0:
            return 0
        at = 0
        while at < n:
            entry = <h.linux_dirent64 *>(buffer + at)
            if not add_record(t, r, fd, entry, plus, &fresh):
                return 0
            at += entry.d_reclen


cdef int read_directory(void *fs, request_t *r, bint plus) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_read_in arg
    cdef int64_t index
    cdef int fd = -1, rc
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    index = handle_get(t, arg.fh, &fd)
    if index < 0:
        return <int>index
    span_limit(&r.reply, arg.size)
    rc = list_from(t, r, fd, arg.offset, plus)
    handle_put(t, index)
    return rc


cdef int op_readdir(void *fs, request_t *r) noexcept nogil:
    return read_directory(fs, r, False)


cdef int op_readdirplus(void *fs, request_t *r) noexcept nogil:
    return read_directory(fs, r, True)


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *t = &tables.t
    dispatch.set_hot(NUMBER["OPENDIR"], op_opendir, t, tables)
    dispatch.set_hot(NUMBER["READDIR"], op_readdir, t, tables)
    dispatch.set_hot(NUMBER["READDIRPLUS"], op_readdirplus, t, tables)
