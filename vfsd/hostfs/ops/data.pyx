"""Files: open, read, write, copy, sync, close. READ and WRITE go straight between the file and guest memory."""

from libc.errno cimport EACCES, EAGAIN, EBADF, EEXIST, EINVAL, ENFILE, ENOSYS, EOPNOTSUPP, EPERM, ESTALE, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from vfsd.fuse cimport _wire as w
from vfsd.fuse.dispatch cimport (
    TRY, WOULD_BLOCK, Dispatch, request_args, request_t, span_limit, span_read, span_t, span_write,
)
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._anchors cimport out_of_descriptors
from vfsd.hostfs.ops._again cimport note_begin, was_appended, was_begun, was_made
from vfsd.hostfs.ops._caller cimport (
    fd_name, file_get, note_lookup, noted_handle, place_get, place_put, place_t, read_name, read_string, reopen,
    room_for_handle, ticks_ms,
)
from vfsd.hostfs.ops._creation cimport make_file, make_nameless, unmake
from vfsd.hostfs.ops._flags cimport descriptor_for
from vfsd.hostfs.ops._gone cimport check_linked, explain, explain_denied
from vfsd.hostfs.ops._setid cimport before_change
from vfsd.hostfs.ids._credentials cimport NO_ID, creator_read, creator_t
from vfsd.hostfs.table._handles cimport descriptor_put, handle_get, handle_open, handle_put, handle_release
from vfsd.hostfs.table._inodes cimport WAIT, attr_of, entry_at, entry_of_open
from vfsd.hostfs.table._kinds cimport close_never_fails
from vfsd.hostfs.lock._locks cimport locks_flush, locks_release
from vfsd.hostfs.table._nodes cimport inode_forget, inode_get, inode_put, room_for_inode
from vfsd.hostfs.table._slots cimport (
    NAME_BYTES, ORIGIN_TMPFILE, load_acquire_u64, load_relaxed_u8, store_relaxed_u8, store_release_u64, tables_t,
    never_blocks, on_root_file_system,
)
from vfsd.hostfs.table._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

# What fuse_file_fallocate() lets through; the others would move data under the guest's page cache.
cdef uint32_t FALLOCATE_MODES = h.FALLOC_FL_KEEP_SIZE | h.FALLOC_FL_PUNCH_HOLE | h.FALLOC_FL_ZERO_RANGE

cdef enum:
    COPY_MAX = 128 << 20  # bytes of one copy: more would keep its thread, and who stops the queue, for long
    SLOW_MS = 10          # a WRITE that takes so long was throttled (balance_dirty_pages())
    SLOW_FOR_MS = 2000    # then others are expected to be, for so long

ctypedef ssize_t (*transfer_t)(int fd, const h.iovec *iov, int n, int64_t offset, int flags) noexcept nogil


# --- opening ---

cdef int host_flags(tables_t *t, uint32_t flags) noexcept nogil:
    """open(2)'s flags for what the guest asks: with a writeback cache it also reads what it writes to."""
    cdef int kept = <int>flags & t.pass_flags
    if t.writeback and kept & h.O_ACCMODE == h.O_WRONLY:
        kept = (kept & ~h.O_ACCMODE) | h.O_RDWR
    return kept


cdef bint close_reports_nothing(tables_t *t, uint32_t index, int fd) noexcept nogil:
    """Whether closing fd, a file of that inode, has nothing to report."""
    cdef h.statfs_t st
    if on_root_file_system(t, index):
        return t.close_never_fails
    return h.fstatfs(fd, &st) == 0 and close_never_fails(st.f_type)


cdef int reply_open(tables_t *t, request_t *r, uint32_t index, uint32_t flags, int fd,
                    bint writable) noexcept nogil:
    """Answer with a new handle that owns fd, of that inode, and the place that was taken for it."""
    cdef w.fuse_open_out out
    out.open_flags = t.open_flags
    if t.noflush_flags and close_reports_nothing(t, index, fd):
        out.open_flags |= t.noflush_flags
    if flags & h.O_DIRECT:
        out.open_flags |= t.direct_flags
    if t.maps_all or t.inodes[index].mapped:
        # Nothing of it is in the guest's page cache, and without this Linux drops what it has mapped.
        out.open_flags |= w.FOPEN_KEEP_CACHE
    out.fh = 0
    if t.zero_open:
        h.close(fd)
        descriptor_put(t)
    else:
        out.fh = handle_open(t, fd, index, <int>flags & t.pass_flags, writable, noted_handle(r))
    out.backing_id = 0
    r.reply_bytes += sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef int open_for_guest(tables_t *t, place_t *p, uint32_t flags, uint32_t open_flags) noexcept nogil:
    """A descriptor by the guest's flags; O_TRUNC takes set-id bits away if the guest says so."""
    cdef int fd = 0
    if flags & h.O_TRUNC:
        fd = before_change(t, p.fd, open_flags & w.FUSE_OPEN_KILL_SUIDGID)
    if fd == 0:
        fd = reopen(t, p, host_flags(t, flags))
    if fd == -EACCES and t.writeback:
        # Widened to read what the daemon's user may only write.
        fd = reopen(t, p, <int>flags & t.pass_flags)
    if fd == -EPERM and flags & h.O_APPEND and not t.writeback:
        # An append-only file (chattr +a). Pages of a writeback cache begin before the file's end.
        fd = reopen(t, p, host_flags(t, flags) | h.O_APPEND)
    if fd >= 0 and flags & h.O_TRUNC and t.capability[0]:
        h.fremovexattr(fd, t.capability)
    return fd


cdef int op_open(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_open_in arg
    cdef place_t p
    cdef int rc
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or r.reply.bytes < sizeof(w.fuse_open_out):
        return -EINVAL
    if t.zero_open:
        return -ENOSYS
    rc = room_for_handle(t)
    if rc < 0:
        return rc
    rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        descriptor_put(t)
        return rc
    rc = 0
    if arg.flags & (h.O_ACCMODE | h.O_TRUNC):
        rc = check_linked(t, r, p.index, p.fd)
    if rc == 0:
        rc = explain_denied(t, r, p.index, p.fd, open_for_guest(t, &p, arg.flags, arg.open_flags))
    if rc >= 0:
        rc = reply_open(t, r, p.index, arg.flags, rc, arg.flags & h.O_ACCMODE != h.O_RDONLY)
    else:
        descriptor_put(t)
    place_put(t, &p)
    return rc


cdef int reply_created(tables_t *t, request_t *r, const w.fuse_entry_out *entry, uint32_t flags, int fd) noexcept nogil:
    """Answer with an entry and a new handle that owns fd, and the place that was taken for it.

    fd: or why there is none, -errno; then the entry and the place are given up.
    """
    if fd < 0:
        descriptor_put(t)
        inode_forget(t, entry.nodeid, 1)  # the guest never sees this entry
        return fd
    span_write(&r.reply, entry, sizeof(entry[0]))
    r.reply_bytes = sizeof(entry[0])
    # Writable whatever the guest asked for: without a name a file must be, and it may have to stay so.
    return reply_open(t, r, <uint32_t>entry.nodeid, flags, fd, True)


cdef int open_existing(tables_t *t, w.fuse_entry_out *entry, const w.fuse_create_in *arg) noexcept nogil:
    """As OPEN would; the entry then says what the file has become.

    ESTALE for a symlink or a special file: the guest looks again, and opens or follows it itself.
    """
    cdef w.fuse_attr_out now
    cdef place_t p
    cdef uint32_t mode
    cdef int fd = place_get(t, entry.nodeid, &p)
    if fd == 0:
        mode = t.inodes[p.index].mode
        fd = -ESTALE
        if mode == h.S_IFREG or mode == h.S_IFDIR:
            fd = open_for_guest(t, &p, arg.flags, arg.open_flags)
        if fd >= 0 and attr_of(t, fd, &now) == 0:
            entry.attr = now.attr
            entry.attr_valid = now.attr_valid
            entry.attr_valid_nsec = now.attr_valid_nsec
        place_put(t, &p)
    return fd


cdef int place_to_create(tables_t *t, request_t *r, uint32_t umask, creator_t *c, place_t *p) noexcept nogil:
    """Who makes a file that is opened, and where, held: 0, or -errno before anything is made.

    All that the reply will need is taken before: what has been made is not to be refused.
    """
    cdef int rc = creator_read(t, r, umask, c)
    if rc < 0:
        return rc
    if r.reply.bytes < sizeof(w.fuse_entry_out) + sizeof(w.fuse_open_out):
        return -EINVAL
    if not room_for_inode(t):
        return -ENFILE
    rc = room_for_handle(t)
    if rc < 0:
        return rc
    rc = place_get(t, r.header.nodeid, p)
    if rc < 0:
        descriptor_put(t)
    return rc


cdef int op_create(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_create_in arg
    cdef w.fuse_entry_out entry
    cdef creator_t c
    cdef place_t p
    cdef char name[NAME_BYTES]
    cdef int fd, rc
    memset(&entry, 0, sizeof(entry))
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    rc = read_name(r, name)
    if rc == 0:
        rc = place_to_create(t, r, arg.umask, &c, &p)
    if rc < 0:
        return rc
    note_begin(r)
    fd = make_file(t, &c, p.fd, name, host_flags(t, arg.flags), arg.mode)
    rc = fd
    # Or the host made the name after the guest had looked.
    if fd >= 0 or (fd == -EEXIST and (not arg.flags & h.O_EXCL or was_made(r, p.fd, name, h.S_IFREG))):
        rc = entry_at(t, &p, name, fd >= 0, WAIT, &entry)
    if rc >= 0:
        note_lookup(r, entry.nodeid)
    if rc < 0 and fd >= 0:
        unmake(p.fd, name, fd)
    rc = explain(t, r, p.index, p.fd, rc)
    place_put(t, &p)
    if rc >= 0:
        return reply_created(t, r, &entry, arg.flags, fd if fd >= 0 else open_existing(t, &entry, &arg))
    if fd >= 0:
        h.close(fd)
    descriptor_put(t)
    return rc


cdef int op_tmpfile(void *fs, request_t *r) noexcept nogil:
    """O_TMPFILE: a file without a name, made and opened (fuse_tmpfile); LINK may name it, but for O_EXCL."""
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_create_in arg
    cdef w.fuse_entry_out entry
    cdef creator_t c
    cdef place_t p
    cdef char name[NAME_BYTES]
    cdef int fd, rc
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    # d_tmpfile's name, "/" from Linux, stands for nothing.
    if read_string(&r.body, name, NAME_BYTES) < 0:
        return -EINVAL
    rc = place_to_create(t, r, arg.umask, &c, &p)
    if rc < 0:
        return rc
    fd = make_nameless(t, &c, p.fd, host_flags(t, arg.flags) | (<int>arg.flags & h.O_EXCL), arg.mode)
    rc = explain(t, r, p.index, p.fd, fd)
    place_put(t, &p)
    if fd >= 0:
        rc = entry_of_open(t, fd_name(fd, name), &entry)
    if rc >= 0:
        note_lookup(r, entry.nodeid)
    if rc < 0:
        if fd >= 0:
            h.close(fd)
        descriptor_put(t)
        return rc
    store_relaxed_u8(&t.inodes[<uint32_t>entry.nodeid].origin, ORIGIN_TMPFILE)
    return reply_created(t, r, &entry, arg.flags, fd)


# --- the data ---

cdef ssize_t read_at(int fd, const h.iovec *iov, int n, int64_t offset, int flags) noexcept nogil:
    return h.preadv2(fd, iov, n, offset, flags)


cdef ssize_t write_at(int fd, const h.iovec *iov, int n, int64_t offset, int flags) noexcept nogil:
    return h.pwritev2(fd, iov, n, offset, flags)


cdef int64_t transfer(transfer_t op, int fd, span_t *s, int64_t offset, int flags) noexcept nogil:
    """Move the whole span in as few system calls as IOV_MAX allows: bytes moved, or -errno.

    offset: not -1, which would be the file's own position. flags: RWF_*.
    """
    cdef int64_t done = 0, asked
    cdef ssize_t moved
    cdef uint32_t at = 0, n, i
    while at < s.n:
        n = s.n - at if s.n - at < <uint32_t>h.IOV_MAX else <uint32_t>h.IOV_MAX
        asked = 0
        for i in range(n):
            asked += s.iov[at + i].iov_len
        moved = op(fd, &s.iov[at], n, offset + done, flags)
        if moved < 0:
            return done if done else -errno
        done += moved
        if moved < asked:
            return done
        at += n
    return done


cdef int lose_rights(tables_t *t, int fd, bint kills) noexcept nogil:
    """Before a file is changed: 0 or -errno. kills: see before_change.

    The kernel takes security.capability away always, by its own name.
    """
    if t.capability[0]:
        h.fremovexattr(fd, t.capability)
    return before_change(t, fd, kills)


cdef bint kill_asked(tables_t *t, const request_t *r, uint64_t nodeid) noexcept nogil:
    """Whether FALLOCATE or a copy, which have no flag for it, takes the set-id bits of that file away.

    If anybody but root asks. Where Linux does not say who does (6.12, FUSE_ALLOW_IDMAP), if it has sent
    a SETATTR first that sets nothing.
    """
    cdef int64_t index
    cdef bint asked
    if r.header.uid != NO_ID:
        return r.header.uid != 0
    index = inode_get(t, nodeid)
    if index < 0:
        return False
    asked = load_relaxed_u8(&t.inodes[index].kill)
    store_relaxed_u8(&t.inodes[index].kill, 0)
    inode_put(t, index)
    return asked


cdef bint at_end(int fd, int64_t offset) noexcept nogil:
    """Whether a short read was short because the file ends there, not the page cache."""
    cdef h.statx_t st
    return h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_SIZE, &st) == 0 and offset >= <int64_t>st.stx_size


cdef inline void note_cached(tables_t *t, uint32_t index) noexcept nogil:
    """What is read may be kept, and then be stored to through a mapping."""
    if t.dirty and not load_relaxed_u8(&t.inodes[index].cached):
        store_relaxed_u8(&t.inodes[index].cached, 1)


cdef int op_read(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_read_in arg
    cdef int64_t index, done
    cdef int fd = -1
    cdef bint waits = False
    memset(&arg, 0, sizeof(arg))
    if request_args(r, &arg, sizeof(arg)) < 0 or arg.size > r.reply.bytes or <int64_t>arg.offset < 0:
        return -EINVAL
    if arg.flags & t.read_waits and r.mode == TRY:
        return WOULD_BLOCK
    index = file_get(t, r.header.nodeid, arg.fh, arg.flags & t.read_waits, &fd)
    if index < 0:
        return <int>index
    fd = descriptor_for(t, <uint32_t>index, arg.flags, t.follow_flags if arg.flags else t.follow_flags & h.O_DIRECT)
    if fd < 0:
        handle_put(t, index)
        return fd
    note_cached(t, t.handles[index].inode)
    span_limit(&r.reply, arg.size)
    if r.mode != TRY or never_blocks(t, r.header.nodeid):
        done = transfer(read_at, fd, &r.reply, arg.offset, 0)
    else:
        # What the page cache holds: EAGAIN where it holds nothing, EOPNOTSUPP where that can't be asked.
        done = transfer(read_at, fd, &r.reply, arg.offset, h.RWF_NOWAIT)
        waits = (done == -EAGAIN or done == -EOPNOTSUPP
                 or (0 < done < arg.size and not at_end(fd, arg.offset + done)))
    handle_put(t, index)
    if waits:
        return WOULD_BLOCK
    if done < 0:
        return <int>done
    r.reply_bytes = done
    return 0


cdef inline void expect_slow(tables_t *t, uint64_t began_ms) noexcept nogil:
    """After a WRITE into the page cache: if it was throttled, no queue waits for the next ones."""
    cdef uint64_t now_ms = ticks_ms()
    if now_ms - began_ms >= SLOW_MS:
        store_release_u64(&t.writes_slow_until, now_ms + SLOW_FOR_MS)


cdef inline int write_flags(const tables_t *t, const w.fuse_write_in *arg, int opened) noexcept nogil:
    """RWF_* for what the descriptor, opened with these flags, does not do by itself."""
    cdef int flags = 0
    # Files are opened without O_APPEND: another guest, or the host, may have moved the end. With a
    # writeback cache the end is where this guest says.
    if arg.flags & h.O_APPEND and not t.writeback and not arg.write_flags & w.FUSE_WRITE_CACHE:
        flags = h.RWF_APPEND
    # Linux adds what pwritev2(2) asks for one write (fuse_write_flags).
    if <int>arg.flags & ~opened & h.O_SYNC:
        flags |= h.RWF_SYNC if <int>arg.flags & h.O_SYNC == h.O_SYNC else h.RWF_DSYNC
    return flags


cdef int64_t write_file(tables_t *t, request_t *r, const w.fuse_write_in *arg, uint32_t index) noexcept nogil:
    """Bytes written to a referenced handle, or -errno."""
    cdef int fd = descriptor_for(t, index, arg.flags, t.follow_flags & h.O_DIRECT)
    cdef int64_t done = fd
    cdef int flags
    if fd >= 0:
        done = lose_rights(t, fd, arg.write_flags & w.FUSE_WRITE_KILL_SUIDGID)
    if done < 0:
        return done
    flags = write_flags(t, arg, t.handles[index].flags)
    if flags & h.RWF_APPEND:
        note_begin(r)
        if was_appended(t, r, fd, arg.offset, arg.size):
            return arg.size
    return transfer(write_at, fd, &r.body, arg.offset, flags)


cdef int op_write(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_write_in arg
    cdef w.fuse_write_out out
    cdef int64_t index, done
    cdef uint64_t began_ms = 0
    cdef bint blocks = not never_blocks(t, r.header.nodeid)
    cdef int fd = -1
    memset(&arg, 0, sizeof(arg))
    if (request_args(r, &arg, sizeof(arg)) < 0 or arg.size > r.body.bytes or <int64_t>arg.offset < 0
            or r.reply.bytes < sizeof(out)):
        return -EINVAL
    if arg.flags & t.write_waits and r.mode == TRY:
        return WOULD_BLOCK
    if blocks:
        began_ms = ticks_ms()
        if began_ms < load_acquire_u64(&t.writes_slow_until) and r.mode == TRY:
            return WOULD_BLOCK
    index = file_get(t, r.header.nodeid, arg.fh, h.O_WRONLY | (arg.flags & t.write_waits), &fd)
    if index < 0:
        return <int>index
    span_limit(&r.body, arg.size)
    done = write_file(t, r, &arg, <uint32_t>index)
    handle_put(t, index)
    if blocks and not arg.flags & t.write_waits:
        expect_slow(t, began_ms)
    if done < 0:
        return <int>done
    out.size = <uint32_t>done
    out.padding = 0
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


# --- the rest of a handle's life ---

cdef int op_release(void *fs, request_t *r) noexcept nogil:
    """Of a file open for reading, the closing comes after the reply: what it can cost (the last blocks of an
    unlinked file) nobody waits for. While one is open for writing, the host can't execute it (ETXTBSY).
    """
    cdef w.fuse_release_in arg
    cdef int fd = -1, rc
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    if arg.fh == 0 and (<tables_t *>fs).zero_open:
        return 0
    note_begin(r)
    rc = handle_release(<tables_t *>fs, arg.fh, &fd)
    if rc < 0:
        return 0 if was_begun(r) else rc
    locks_release(<tables_t *>fs, arg.fh, fd)
    if rc == 0:
        r.close_fd = fd
    elif fd >= 0:
        h.close(fd)
    return 0


cdef int flush_file(tables_t *t, int fd) noexcept nogil:
    cdef int copy = h.c_dup(fd)
    if copy < 0 and out_of_descriptors(t, errno):
        copy = h.c_dup(fd)
    return -errno if copy < 0 or h.close(copy) < 0 else 0


cdef int op_flush(void *fs, request_t *r) noexcept nogil:
    """Each close(2) in the guest: its process loses its POSIX locks on the file.

    Closing a duplicate reports what a network file system held back.
    """
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_flush_in arg
    cdef int64_t index, inode
    cdef int fd = -1, rc
    cdef bint needless = False
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    if arg.fh == 0 and t.zero_open:
        return -ENOSYS  # it need not ask again
    index = handle_get(t, arg.fh, &fd)
    if index < 0:
        return <int>index
    locks_flush(t, arg.fh, fd, arg.lock_owner)
    inode = inode_get(t, r.header.nodeid)
    if inode >= 0:
        needless = close_reports_nothing(t, inode, fd)
        inode_put(t, inode)
    rc = 0 if needless else flush_file(t, fd)
    handle_put(t, index)
    return rc


cdef int op_fsync(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_fsync_in arg
    cdef int64_t index
    cdef int fd = -1, rc
    if r.mode == TRY and not never_blocks(t, r.header.nodeid):
        return WOULD_BLOCK
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    index = file_get(t, r.header.nodeid, arg.fh, 0, &fd)
    if index < 0:
        return <int>index
    rc = h.fdatasync(fd) if arg.fsync_flags & w.FUSE_FSYNC_FDATASYNC else h.fsync(fd)
    rc = -errno if rc < 0 else 0
    handle_put(t, index)
    return rc


cdef int op_fallocate(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_fallocate_in arg
    cdef int64_t index
    cdef int fd = -1, rc
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    if arg.mode & ~FALLOCATE_MODES:
        return -EOPNOTSUPP
    index = file_get(t, r.header.nodeid, arg.fh, h.O_WRONLY, &fd)
    if index < 0:
        return <int>index
    rc = lose_rights(t, fd, kill_asked(t, r, r.header.nodeid))
    if rc == 0:
        rc = -errno if h.fallocate(fd, arg.mode, arg.offset, arg.length) < 0 else 0
    handle_put(t, index)
    return rc


cdef int64_t copy_range(tables_t *t, request_t *r) noexcept nogil:
    """Bytes copied between two files, at most COPY_MAX of them, or -errno."""
    cdef w.fuse_copy_file_range_in arg
    cdef int64_t source, target, done, off_in, off_out
    cdef int fd_in = -1, fd_out = -1
    memset(&arg, 0, sizeof(arg))
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or r.reply.bytes < sizeof(w.fuse_copy_file_range_out) or arg.flags:
        return -EINVAL
    source = file_get(t, r.header.nodeid, arg.fh_in, 0, &fd_in)
    if source < 0:
        return source
    target = file_get(t, arg.nodeid_out, arg.fh_out, h.O_WRONLY, &fd_out)
    if target < 0:
        handle_put(t, source)
        return target
    off_in = arg.off_in
    off_out = arg.off_out
    done = lose_rights(t, fd_out, kill_asked(t, r, arg.nodeid_out))
    if done == 0:
        done = h.copy_file_range(fd_in, &off_in, fd_out, &off_out, arg.len if arg.len < COPY_MAX else COPY_MAX, 0)
        if done < 0:
            done = -errno
    handle_put(t, target)
    handle_put(t, source)
    return done


cdef int op_copy_file_range(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_write_out out
    cdef int64_t done = copy_range(<tables_t *>fs, r)
    if done < 0:
        return <int>done
    out.size = <uint32_t>done
    out.padding = 0
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef int op_copy_file_range_64(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_copy_file_range_out out
    cdef int64_t done = copy_range(<tables_t *>fs, r)
    if done < 0:
        return <int>done
    out.bytes_copied = done
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef int op_syncfs(void *fs, request_t *r) noexcept nogil:
    """syncfs(2) of what a superblock's root lies on (fuse_sync_fs): returns when it is on the disk."""
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_syncfs_in arg
    cdef place_t p
    cdef int fd, rc
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    # The share's root is open already, so that an error of writing back since then is told.
    rc = -errno if h.syncfs(p.fd) < 0 else 0
    if rc == -EBADF:  # an anchor
        fd = reopen(t, &p, h.O_DIRECTORY if t.inodes[p.index].mode == h.S_IFDIR else 0)
        rc = fd
        if fd >= 0:
            rc = -errno if h.syncfs(fd) < 0 else 0
            h.close(fd)
    place_put(t, &p)
    return rc


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *t = tables.t
    dispatch.set_hot(NUMBER["OPEN"], op_open, t, tables)
    dispatch.set_hot(NUMBER["CREATE"], op_create, t, tables)
    dispatch.set_hot(NUMBER["READ"], op_read, t, tables)
    dispatch.set_hot(NUMBER["WRITE"], op_write, t, tables)
    dispatch.set_hot(NUMBER["RELEASE"], op_release, t, tables)
    dispatch.set_hot(NUMBER["FLUSH"], op_flush, t, tables)
    dispatch.set_hot(NUMBER["FSYNC"], op_fsync, t, tables)
    dispatch.set_hot(NUMBER["FALLOCATE"], op_fallocate, t, tables)
    dispatch.set_hot(NUMBER["TMPFILE"], op_tmpfile, t, tables)
    dispatch.set_hot(NUMBER["COPY_FILE_RANGE"], op_copy_file_range, t, tables)
    dispatch.set_hot(NUMBER["COPY_FILE_RANGE_64"], op_copy_file_range_64, t, tables)
    dispatch.set_hot(NUMBER["SYNCFS"], op_syncfs, t, tables)
    # An open directory is a handle like any other.
    dispatch.set_hot(NUMBER["RELEASEDIR"], op_release, t, tables)
    dispatch.set_hot(NUMBER["FSYNCDIR"], op_fsync, t, tables)
