"""What operations have in common: names of the body, the directory they work in, re-opening.

Every operation is a plain list of steps; these are the steps more than one of them takes.
"""

from libc.errno cimport EBADF, EINVAL, EISDIR, EMFILE, ENAMETOOLONG, ENFILE, EROFS, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcpy

from vfsd.fuse._wire cimport fuse_entry_out
from vfsd.fuse.dispatch cimport name_check, request_t, span_skip, span_t, span_write
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._anchors cimport inode_fd, inode_pin_name, make_room, out_of_descriptors
from vfsd.hostfs.table._handles cimport (
    descriptor_put, descriptor_take, handle_close, handle_get, handle_open, unopened_get, unopened_keep,
)
from vfsd.sys._syscalls cimport FD_BYTES, PATH_BYTES, fd_name
from vfsd.hostfs.table._inodes cimport WAIT, entry_at
from vfsd.hostfs.table._nodes cimport inode_get, inode_put
from vfsd.hostfs.table._slots cimport NAME_BYTES, load_acquire_u64, place_t, tables_t


cdef inline uint64_t ticks_ms() noexcept nogil:
    """CLOCK_MONOTONIC_COARSE, which costs no system call and has the scheduler's ticks."""
    cdef h.timespec now
    h.clock_gettime(h.CLOCK_MONOTONIC_COARSE, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1000000


# --- strings of the body ---

cdef inline int read_string(span_t *s, char *to, size_t room) noexcept nogil:
    """The next NUL-terminated string: its length, -EINVAL without an end, -ENAMETOOLONG."""
    cdef size_t n = 0, part
    cdef char *end
    while s.bytes:
        if s.iov.iov_len == 0:
            s.iov += 1
            s.n -= 1
            continue
        end = <char *>memchr(s.iov.iov_base, 0, s.iov.iov_len)
        part = s.iov.iov_len if end == NULL else end - <char *>s.iov.iov_base
        if part > s.bytes:
            part = s.bytes
            end = NULL
        if n + part >= room:
            return -ENAMETOOLONG
        memcpy(to + n, s.iov.iov_base, part)
        n += part
        span_skip(s, part + (end != NULL))
        if end != NULL:
            to[n] = 0
            return <int>n
    return -EINVAL


cdef inline int read_name(request_t *r, char *to) noexcept nogil:
    """The next string as the name of a directory entry, into NAME_BYTES: 0 or -errno."""
    cdef int n = read_string(&r.body, to, NAME_BYTES)
    return n if n < 0 else name_check(to, n)


cdef inline int check_end(request_t *r) noexcept nogil:
    """Only extensions may follow (in_header.total_extlen, in units of 8 bytes): 0 or -EINVAL."""
    return -EINVAL if r.body.bytes != 8 * <uint64_t>r.header.total_extlen else 0


cdef inline int read_last_name(request_t *r, char *to) noexcept nogil:
    """read_name where it is the last of the body."""
    cdef int rc = read_name(r, to)
    return rc if rc < 0 else check_end(r)


# --- what the next server is to know ---

cdef inline uint64_t *noted_handle(request_t *r) noexcept nogil:
    """For handle_open, where the handle is the answer to a request."""
    return &r.record.fh if r.record != NULL else NULL


cdef inline void note_lookup(request_t *r, uint64_t nodeid) noexcept nogil:
    """Its lookup count has been raised, for the answer to a request."""
    if r.record != NULL:
        r.record.nodeid = nodeid


# --- where ---

cdef inline int place_get(tables_t *t, uint64_t nodeid, place_t *p) noexcept nogil:
    """An inode's descriptor, kept open until place_put: 0 or -errno."""
    cdef int64_t index = inode_get(t, nodeid)
    p.index = 0
    p.fd = -1
    if index < 0:
        return <int>index
    p.index = <uint32_t>index
    p.fd = inode_fd(t, p.index)
    if p.fd < 0:
        inode_put(t, p.index)
        return p.fd
    return 0


cdef inline void place_put(tables_t *t, place_t *p) noexcept nogil:
    inode_put(t, p.index)


cdef inline int reply_entry(tables_t *t, request_t *r, const place_t *parent, const char *name,
                            bint likely_new) noexcept nogil:
    """Answer with the entry of a name: 0 or -errno. Its room was checked before anything was made."""
    cdef fuse_entry_out out
    cdef int rc = entry_at(t, parent, name, likely_new, WAIT, &out)
    if rc < 0:
        return rc
    note_lookup(r, out.nodeid)
    r.reply_bytes += sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


# --- re-opening ---

cdef inline int room_for_handle(tables_t *t) noexcept nogil:
    """Before a file is opened or made: 0 and a place for its descriptor is taken, or -ENFILE."""
    cdef int rc = descriptor_take(t)
    if rc == 0:
        make_room(t)
    return rc


cdef inline int reopen(tables_t *t, place_t *p, int flags) noexcept nogil:
    """A new descriptor of a regular file, or with O_DIRECTORY of a directory: it or -errno.

    Anything else is refused: opening a device or a fifo of the host would act on the host.
    """
    cdef char name[FD_BYTES]
    cdef uint32_t mode = t.inodes[p.index].mode
    cdef int fd, rc
    if mode == h.S_IFDIR and not flags & h.O_DIRECTORY:
        return -EISDIR
    if mode != (h.S_IFDIR if flags & h.O_DIRECTORY else h.S_IFREG):
        return -EBADF
    if t.readonly and flags & (h.O_ACCMODE | h.O_TRUNC):
        return -EROFS
    if flags & h.O_DIRECTORY:
        # Saves the walk through /proc; without the right to search it is the only way.
        fd = h.openat(p.fd, b".", flags | h.O_CLOEXEC)
        if fd >= 0:
            return fd
    fd_name(p.fd, name)
    while True:
        # O_NONBLOCK: never wait for a lease.
        fd = h.openat(t.proc_fd, name, flags | h.O_CLOEXEC | h.O_NONBLOCK)
        if fd >= 0:
            return fd
        rc = errno
        if not out_of_descriptors(t, rc):
            return -ENFILE if rc == EMFILE else -rc


# --- files in use ---

cdef inline int64_t unopened(tables_t *t, uint64_t nodeid, int flags, int *fd) noexcept nogil:
    """A handle for a file that the guest uses without having opened it, referenced, or -errno.

    flags: of open(2). One that only reads is kept for the next request. One that writes is not: the
    host could not execute the file meanwhile.
    """
    cdef place_t p
    cdef uint64_t fh = 0
    cdef int64_t index
    cdef int rc
    index = unopened_get(t, nodeid, fd) if flags == 0 else -EBADF
    if index >= 0:
        return index
    rc = place_get(t, nodeid, &p)
    if rc < 0:
        return rc
    index = room_for_handle(t)
    if index == 0:
        index = reopen(t, &p, flags)
        if index < 0:
            descriptor_put(t)
    if index >= 0:
        fh = handle_open(t, <int>index, p.index, flags, flags != 0, NULL)
        index = handle_get(t, fh, fd)
        if index >= 0 and flags == 0:
            unopened_keep(t, nodeid, fh)
        elif index >= 0:
            handle_close(t, fh)
    place_put(t, &p)
    return index


cdef inline int64_t file_get(tables_t *t, uint64_t nodeid, uint64_t fh, int flags, int *fd) noexcept nogil:
    """handle_get for an operation on a file, which may not have been opened (fh 0 with zero_open).

    flags: what it would have to be opened with, 0 to read.
    """
    cdef int64_t index = handle_get(t, fh, fd)
    if index >= 0 or fh != 0 or not t.zero_open:
        return index
    return unopened(t, nodeid, flags, fd)


cdef inline int pin_name(tables_t *t, int parent, const char *name, uint32_t *pinned) noexcept nogil:
    """What is about to lose a name: its anchor stays open then, as the guest may have it in use.

    *pinned: its index for unpin, 0 for none. Only for files in use that were not opened, and for inodes
    that are evicted and would come back by that name. 0, or -errno: it would be lost for want of a descriptor.
    """
    pinned[0] = 0
    return inode_pin_name(t, parent, name, pinned) if t.zero_open or load_acquire_u64(&t.n_by_name) else 0


cdef inline void unpin(tables_t *t, uint32_t pinned) noexcept nogil:
    if pinned:
        inode_put(t, pinned)
