"""OPENDIR, READDIR, READDIRPLUS. RELEASEDIR and FSYNCDIR are those of files (`data`)."""

from libc.errno cimport EAGAIN, EINVAL, ENAMETOOLONG, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen

from vfsd.fuse cimport _wire as w
from vfsd.fuse._wire cimport FUSE_ROOT_ID
from vfsd.fuse.dispatch cimport (
    NAME_MAX, TRY, WOULD_BLOCK, Dispatch, request_args, request_t, span_limit, span_write, spread,
)
from vfsd.sys cimport _syscalls as h
from vfsd.sys._clock cimport clock_ns
from vfsd.hostfs.ops._caller cimport NAME_BYTES, noted_handle, place_get, place_put, place_t, reopen, room_for_handle
from vfsd.hostfs.ops._gone cimport check_directory, explain_denied
from vfsd.hostfs.table._handles cimport descriptor_put, handle_get, handle_open, handle_put
from vfsd.hostfs.table._inodes cimport CACHED_ONLY, WAIT, WAIT_COLD, entry_at, opens_first
from vfsd.hostfs.table._nodes cimport is_anchored
from vfsd.hostfs.table._slots cimport (
    LISTINGS, ORIGIN_ANY, ORIGIN_DISK, add_int, add_u64, cas_int, inode_t, listing_t, load_relaxed_u8,
    store_relaxed_u8, store_release_int, tables_t, believes_names, never_blocks, walk_may_wait,
)
from vfsd.hostfs.table._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

cdef int op_opendir(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_open_out out
    cdef place_t p
    cdef uint64_t fh
    cdef int fd, rc
    if r.body.bytes < sizeof(w.fuse_open_in) or r.reply.bytes < sizeof(out):
        return -EINVAL
    rc = room_for_handle(t)
    if rc < 0:
        return rc
    fd = place_get(t, r.header.nodeid, &p)
    if fd == 0:
        fd = check_directory(t, r, p.index, p.fd, 0)
        if fd == 0:
            fd = explain_denied(t, r, p.index, p.fd, reopen(t, &p, h.O_RDONLY | h.O_DIRECTORY))
        place_put(t, &p)
    if fd < 0:
        descriptor_put(t)
        return fd
    fh = handle_open(t, fd, p.index, h.O_RDONLY, False, noted_handle(r))
    begin_listing(t, fh)
    out.fh = fh
    out.open_flags = t.opendir_flags
    out.backing_id = 0
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef struct record_t:  # struct fuse_direntplus; without `entry` a struct fuse_dirent
    w.fuse_entry_out entry
    w.fuse_dirent head
    char name[NAME_BYTES]  # padded with zeros to a multiple of 8


cdef enum:
    AHEAD = 32        # entries that are looked up at a time
    SLOW_NS = 100000  # a lookup that takes as long waits for a disk or a network


cdef struct ahead_t:  # entries of a listing that several threads look up
    tables_t *t
    const place_t *parent
    int n
    int begun         # by any of them
    const h.linux_dirent64 *entries[AHEAD]
    w.fuse_entry_out found[AHEAD]


cdef inline bint is_dot(const char *name) noexcept nogil:
    return name[0] == c'.' and (name[1] == 0 or (name[1] == c'.' and name[2] == 0))


cdef int entry_on_disk(tables_t *t, const place_t *parent, const h.linux_dirent64 *entry, const char *name,
                       bint may_wait, w.fuse_entry_out *out) noexcept nogil:
    """entry_at where the name may have to be read. -EAGAIN: it has, and may_wait is false."""
    cdef const inode_t *inode = &t.inodes[parent.index]
    # Who is known is in memory. What is mounted over it has another number, and is opened first.
    cdef bint open_first = opens_first(t, parent.index, False, is_anchored(t, inode.dev, entry.d_ino, inode.mnt_id))
    cdef int rc = entry_at(t, parent, name, open_first, CACHED_ONLY, out)
    if rc == -EAGAIN and may_wait:
        rc = entry_at(t, parent, name, open_first, WAIT_COLD, out)
    return rc


cdef bint add_entry(tables_t *t, const place_t *parent, const h.linux_dirent64 *entry, const char *name,
                    bint may_wait, bint *likely_new, w.fuse_entry_out *out) noexcept nogil:
    """The lookup in front of a READDIRPLUS record; nodeid 0 where there is none. False: it would wait.

    Gone since, or out of descriptors: the name is listed all the same, the guest may ask. likely_new:
    whether the last entry's inode was new, as the next one's will be then.
    """
    cdef int rc
    if is_dot(name):
        rc = -1
    elif walk_may_wait(t, parent.index):
        rc = entry_on_disk(t, parent, entry, name, may_wait, out)
        if rc == -EAGAIN and not may_wait:
            return False
    else:
        rc = entry_at(t, parent, name, likely_new[0], WAIT, out)
    if rc < 0:
        memset(out, 0, sizeof(out[0]))
    else:
        likely_new[0] = rc
    return True


cdef inline uint32_t record_bytes(uint32_t name_bytes, bint plus) noexcept nogil:
    """In the reply."""
    return sizeof(w.fuse_dirent) + ((name_bytes + 7) & ~<uint32_t>7) + (sizeof(w.fuse_entry_out) if plus else 0)


cdef int add_record(tables_t *t, request_t *r, const place_t *parent, const h.linux_dirent64 *entry,
                    bint plus, const w.fuse_entry_out *known, bint *likely_new) noexcept nogil:
    """One host entry as a record of the reply: 1, 0 if it does not fit, -EAGAIN if it would have to wait.

    -ENAMETOOLONG: vfat, exfat, ntfs3, cifs and FUSE count characters, or have longer names. known: what it
    was looked up as, NULL: it has not been.
    """
    cdef const char *name = <const char *>(entry + 1)
    cdef record_t record
    cdef uint32_t n = <uint32_t>strlen(name)
    if n > NAME_MAX:
        return -ENAMETOOLONG
    cdef uint32_t padded = (n + 7) & ~<uint32_t>7
    cdef uint32_t size = record_bytes(n, plus)
    if size > r.reply.bytes:
        return 0
    if known != NULL:
        record.entry = known[0]
    elif plus and not add_entry(t, parent, entry, name, r.mode != TRY, likely_new, &record.entry):
        return -EAGAIN
    record.head.ino = entry.d_ino
    if r.header.nodeid == FUSE_ROOT_ID and is_dot(name):
        record.head.ino = t.inodes[FUSE_ROOT_ID].ino  # what lies above the share is nobody's business
    record.head.off = entry.d_off
    record.head.namelen = n
    record.head.type = entry.d_type
    memset(record.name + padded - 8, 0, 8)
    memcpy(record.name, name, n)
    span_write(&r.reply, &record if plus else <void *>&record.head, size)
    r.reply_bytes += size
    return 1


cdef void look_up_ahead(void *work) noexcept nogil:
    """By each of the threads: those that no other one has begun with."""
    cdef ahead_t *a = <ahead_t *>work
    cdef bint likely_new = True
    cdef int i = add_int(&a.begun, 1) - 1
    while i < a.n:
        add_entry(a.t, a.parent, a.entries[i], <const char *>(a.entries[i] + 1), True, &likely_new, &a.found[i])
        i = add_int(&a.begun, 1) - 1


cdef int add_ahead(tables_t *t, request_t *r, const place_t *parent, listing_t *l) noexcept nogil:
    """As many entries as fit, looked up by several threads as each takes long: their number, at least 2, or 0.

    None is looked up that would not fit: the guest would not know of its lookup.
    """
    cdef ahead_t a
    cdef const h.linux_dirent64 *entry
    cdef uint64_t room = r.reply.bytes, began
    cdef uint32_t at = l.at, size
    cdef bint unused = False
    cdef int i
    a.t = t
    a.parent = parent
    a.n = a.begun = 0
    while at < l.n and a.n < AHEAD:
        entry = <const h.linux_dirent64 *>(l.entries + at)
        size = <uint32_t>strlen(<const char *>(entry + 1))
        if size > NAME_MAX or record_bytes(size, True) > room:
            break
        room -= record_bytes(size, True)
        a.entries[a.n] = entry
        a.n += 1
        at += entry.d_reclen
    if a.n < 2:
        return 0
    began = clock_ns()
    spread(r.dispatch, look_up_ahead, &a, a.n)
    l.slow = clock_ns() - began >= SLOW_NS
    for i in range(a.n):
        add_record(t, r, parent, a.entries[i], True, &a.found[i], &unused)
        l.offset = a.entries[i].d_off
    l.at = at
    return a.n


cdef listing_t *take_listing(tables_t *t, uint64_t fh, listing_t *own) noexcept nogil:
    """What is left of the handle's last reading; the caller's own, empty, while someone else has it."""
    cdef listing_t *l = &t.listings[<uint32_t>fh % LISTINGS]
    if not cas_int(&l.busy, 0, 1):
        l = own
        l.fh = 0
    if l.fh != fh:
        l.fh = fh
        l.at = l.n = 0
        l.stands = l.slow = False
    return l


cdef void begin_listing(tables_t *t, uint64_t fh) noexcept nogil:
    """For a directory that has just been opened: its descriptor stands at the beginning."""
    cdef listing_t *l = &t.listings[<uint32_t>fh % LISTINGS]
    if not cas_int(&l.busy, 0, 1):
        return
    l.fh = fh
    l.at = l.n = 0
    l.offset = 0
    l.stands = True
    l.slow = False
    store_release_int(&l.busy, 0)


cdef inline bint was_last(const tables_t *t, uint32_t directory, const listing_t *l) noexcept nogil:
    """Whether another entry would have come with the last ones, if there were one.

    Local file systems fill the buffer. The guest asks once more anyhow: only an empty reply is the end.
    """
    return believes_names(t, directory) and 0 < l.n <= sizeof(l.entries) - sizeof(h.linux_dirent64) - NAME_BYTES - 8


cdef int read_entries(listing_t *l, int fd) noexcept nogil:
    """What comes where the descriptor stands, none at the end: 0 or -errno."""
    cdef long n = h.syscall(h.SYS_getdents64, fd, l.entries, sizeof(l.entries))
    l.at = 0
    l.n = <uint32_t>n if n > 0 else 0
    l.stands = n == 0  # the end, which is not sought again: its position need not be one of lseek(2)'s
    return -errno if n < 0 else 0


cdef int read_up_to(listing_t *l, int fd) noexcept nogil:
    """Read the directory from its beginning to what follows l.offset: 0, or -EINVAL, it is not there."""
    cdef const h.linux_dirent64 *entry
    cdef int rc
    if h.lseek(fd, 0, h.SEEK_SET) < 0:
        return -errno
    while True:
        rc = read_entries(l, fd)
        if rc < 0 or l.n == 0:
            l.stands = False
            return rc if rc < 0 else -EINVAL
        while l.at < l.n:
            entry = <const h.linux_dirent64 *>(l.entries + l.at)
            l.at += entry.d_reclen
            if entry.d_off == l.offset:
                return 0


cdef int next_entries(listing_t *l, int fd) noexcept nogil:
    """The entries after those that have been passed on, none at the end: 0 or -errno.

    lseek(2) refuses positions of 2^63 and more, which NFSv4 and FUSE servers may choose.
    """
    cdef int rc = 0
    if l.n == 0 and not l.stands and h.lseek(fd, l.offset, h.SEEK_SET) < 0:
        rc = read_up_to(l, fd) if errno == EINVAL and l.offset else -errno
        if rc < 0 or l.at < l.n:
            return rc
    return read_entries(l, fd)


cdef int list_from(tables_t *t, request_t *r, const place_t *p, listing_t *l, int64_t offset,
                   bint plus) noexcept nogil:
    """Whole records from a position of the directory on, until the reply is full or the next would wait.

    0, -errno, or WOULD_BLOCK if that is so of the first.
    """
    cdef h.linux_dirent64 *entry
    cdef int rc
    cdef bint likely_new = False
    # Where a lookup may take long; not where one that would is left to another thread.
    cdef bint timed = plus and not never_blocks(t, p.index) and (r.mode != TRY or not walk_may_wait(t, p.index))
    cdef uint64_t began = 0
    # The beginning is read anew: rewinddir(3) shows what has changed.
    if offset == 0 or l.offset != offset:
        l.at = l.n = 0
        l.stands = l.stands and l.offset == offset
        l.offset = offset
    while True:
        if l.at >= l.n:
            if r.reply_bytes and was_last(t, p.index, l):
                return 0
            rc = next_entries(l, p.fd)
            if rc < 0:
                return rc if r.reply_bytes == 0 else 0
            if l.n == 0:
                store_relaxed_u8(&t.inodes[p.index].origin, ORIGIN_ANY)
                return 0
        if timed and l.slow and add_ahead(t, r, p, l):
            continue
        entry = <h.linux_dirent64 *>(l.entries + l.at)
        if timed:
            began = clock_ns()
        rc = add_record(t, r, p, entry, plus, NULL, &likely_new)
        if timed and not is_dot(<const char *>(entry + 1)):
            l.slow = clock_ns() - began >= SLOW_NS
        if rc == 0 or rc == -EAGAIN:
            return WOULD_BLOCK if rc < 0 and r.reply_bytes == 0 else 0
        l.at += entry.d_reclen
        if rc > 0:
            l.offset = entry.d_off  # of what is left out the guest knows no position
        else:
            add_u64(&t.names_left_out, 1)


cdef int read_directory(void *fs, request_t *r, bint plus) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_read_in arg
    cdef listing_t own
    cdef listing_t *listing
    cdef place_t p
    cdef int64_t index
    cdef int rc
    memset(&arg, 0, sizeof(arg))
    if request_args(r, &arg, sizeof(arg)) < 0:
        return -EINVAL
    p.index = 0
    p.fd = -1
    index = handle_get(t, arg.fh, &p.fd)
    if index < 0:
        return <int>index
    p.index = t.handles[index].inode
    if load_relaxed_u8(&t.inodes[p.index].origin) == ORIGIN_DISK and r.mode == TRY:
        handle_put(t, index)
        return WOULD_BLOCK
    span_limit(&r.reply, arg.size)
    listing = take_listing(t, arg.fh, &own)
    rc = list_from(t, r, &p, listing, arg.offset, plus)
    store_release_int(&listing.busy, 0)
    handle_put(t, index)
    return rc


cdef int op_readdir(void *fs, request_t *r) noexcept nogil:
    return read_directory(fs, r, False)


cdef int op_readdirplus(void *fs, request_t *r) noexcept nogil:
    return read_directory(fs, r, True)


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *t = tables.t
    dispatch.set_hot(NUMBER["OPENDIR"], op_opendir, t, tables)
    dispatch.set_hot(NUMBER["READDIR"], op_readdir, t, tables)
    dispatch.set_hot(NUMBER["READDIRPLUS"], op_readdirplus, t, tables)
