"""LOOKUP and FORGET, and the operations that make, remove and move names."""

from libc.errno cimport EAGAIN, EEXIST, EINVAL, ENAMETOOLONG, ENFILE, ENOENT, ESTALE, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from vfsd.fuse cimport _wire as w
from vfsd.fuse.dispatch cimport NAME_MAX, NO_REPLY, TRY, WOULD_BLOCK, Dispatch, request_t, span_read, span_write
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.ops._again cimport (
    is_another, note_begin, note_moved, was_begun, was_exchanged, was_linked, was_made, was_moved,
)
from vfsd.hostfs.ops._caller cimport (
    FD_BYTES, PATH_BYTES, unpin, fd_name, note_lookup, pin_name, place_get, place_put, place_t, read_last_name, read_name,
    read_string, reply_entry,
)
from vfsd.hostfs.ids._credentials cimport become, caller_read, creator_read, creator_t, unbecome
from vfsd.hostfs.ops._creation cimport label_made, make_file, make_name, make_t
from vfsd.hostfs.ops._gone cimport count_links, explain, explain_lookup, note_found, tell_once
from vfsd.hostfs.table._anchors cimport inode_was_stale, let_go_if_stale
from vfsd.hostfs.table._inodes cimport lookup
from vfsd.hostfs.table._nodes cimport inode_file_system, inode_forget, room_for_inode
from vfsd.hostfs.table._slots cimport NAME_BYTES, ORIGIN_ANY, store_relaxed_u8, store_release_u64, tables_t
from vfsd.hostfs.table._tables cimport Tables

from vfsd.fuse.opcodes import NUMBER

__all__ = ("install",)

cdef uint32_t RENAME_FLAGS = h.RENAME_NOREPLACE | h.RENAME_EXCHANGE | h.RENAME_WHITEOUT


cdef int no_entry(tables_t *t, w.fuse_entry_out *out) noexcept nogil:
    """That a name is not there: 0 with an entry of no inode if the guest may keep it for a while, or -ENOENT."""
    if t.negative_valid == 0 and t.negative_valid_nsec == 0:
        return -ENOENT
    memset(out, 0, sizeof(out[0]))
    out.entry_valid = t.negative_valid
    out.entry_valid_nsec = t.negative_valid_nsec
    return 0


cdef int op_lookup(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef w.fuse_entry_out out
    cdef place_t p
    cdef int rc
    if r.n_taken == 0:
        rc = read_last_name(r, r.name)
        if rc < 0:
            return rc
        r.n_taken = NAME_MAX
    if r.reply.bytes < sizeof(out):
        return -EINVAL
    rc = place_get(t, r.header.nodeid, &p)
    if rc == 0:
        rc = explain_lookup(t, r, p.index, p.fd, r.name, lookup(t, &p, r.name, r.mode != TRY, &out))
        if rc == 0:
            note_found(t, r, <uint32_t>out.nodeid)
            note_lookup(r, out.nodeid)
        place_put(t, &p)
    if rc == -EAGAIN and r.mode == TRY:
        return WOULD_BLOCK
    if rc == -ENOENT:
        rc = no_entry(t, &out)
    if rc < 0:
        return rc
    r.reply_bytes = sizeof(out)
    return span_write(&r.reply, &out, sizeof(out))


cdef inline bint forgets_once(request_t *r) noexcept nogil:
    """False: this lookup count may have been lowered by a server that has died. Rather too high than too low."""
    if r.record == NULL:
        return True
    if r.again and r.forgotten < r.record.witness[0]:
        r.forgotten += 1
        return False
    r.forgotten += 1
    store_release_u64(&r.record.witness[0], r.forgotten)
    return True


cdef int op_forget(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_forget_in forget
    if span_read(&r.body, &forget, sizeof(forget)) < 0:
        return -EINVAL
    if forgets_once(r):
        inode_forget(<tables_t *>fs, r.header.nodeid, forget.nlookup)
    return NO_REPLY


cdef int op_batch_forget(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_batch_forget_in batch
    cdef w.fuse_forget_one one
    if span_read(&r.body, &batch, sizeof(batch)) < 0:
        return -EINVAL
    while batch.count:
        batch.count -= 1
        if span_read(&r.body, &one, sizeof(one)) < 0:
            return -EINVAL
        if forgets_once(r):
            inode_forget(<tables_t *>fs, one.nodeid, one.nlookup)
    return NO_REPLY


cdef int op_readlink(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef place_t p
    cdef char target[PATH_BYTES]
    cdef ssize_t n
    cdef int rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    n = h.readlinkat(p.fd, b"", target, PATH_BYTES)
    rc = -errno if n < 0 else 0
    place_put(t, &p)
    if n == PATH_BYTES:
        return -ENAMETOOLONG  # it may be cut off
    if rc < 0:
        return rc
    r.reply_bytes = n
    return span_write(&r.reply, target, n)


cdef int make_node(int parent, const char *name, const void *what) noexcept nogil:
    cdef const w.fuse_mknod_in *arg = <const w.fuse_mknod_in *>what
    # new_decode_dev() of linux/kdev_t.h
    cdef uint64_t device = h.makedev((arg.rdev >> 8) & 0xfff, (arg.rdev & 0xff) | ((arg.rdev >> 12) & 0xfff00))
    return h.mknodat(parent, name, arg.mode, device)


cdef bint is_file(const w.fuse_mknod_in *arg) noexcept nogil:
    return arg.mode & h.S_IFMT == h.S_IFREG or arg.mode & h.S_IFMT == 0


cdef int make_closed(tables_t *t, const creator_t *c, int parent, const char *name,
                     const w.fuse_mknod_in *arg) noexcept nogil:
    """A regular file as make_file makes it, closed: a label comes with its name then."""
    cdef int fd = make_file(t, c, parent, name, h.O_WRONLY, arg.mode)
    if fd < 0:
        return fd
    h.close(fd)
    return 0


cdef int make(tables_t *t, request_t *r, const char *name, uint32_t umask, uint32_t kind, make_t call,
              const void *what) noexcept nogil:
    """Make a name, the caller's own, and answer with its entry. kind: S_IFMT bits."""
    cdef creator_t c
    cdef place_t p
    cdef int rc = creator_read(t, r, umask, &c)
    if rc < 0:
        return rc
    if r.reply.bytes < sizeof(w.fuse_entry_out):
        return -EINVAL
    if not room_for_inode(t):
        return -ENFILE
    rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    note_begin(r)
    if call == make_node and c.context_bytes and is_file(<const w.fuse_mknod_in *>what):
        rc = make_closed(t, &c, p.fd, name, <const w.fuse_mknod_in *>what)
    else:
        rc = make_name(t, &c, p.fd, name, call, what)
    if rc == -EEXIST and was_made(r, p.fd, name, kind):
        rc = label_made(t, &c, p.fd, name, -1)
    if rc == 0:
        rc = reply_entry(t, r, &p, name, True)
    rc = explain(t, r, p.index, p.fd, rc)
    place_put(t, &p)
    return rc


cdef int make_symlink(int parent, const char *name, const void *target) noexcept nogil:
    return h.symlinkat(<const char *>target, parent, name)


cdef int op_symlink(void *fs, request_t *r) noexcept nogil:
    cdef char name[NAME_BYTES]
    cdef char target[PATH_BYTES]
    cdef int rc = read_name(r, name)
    if rc == 0:
        rc = read_string(&r.body, target, PATH_BYTES)
    return rc if rc < 0 else make(<tables_t *>fs, r, name, 0, h.S_IFLNK, make_symlink, target)


cdef int op_mknod(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_mknod_in arg
    cdef char name[NAME_BYTES]
    cdef uint32_t kind
    cdef int rc = span_read(&r.body, &arg, sizeof(arg))
    if rc == 0:
        rc = read_name(r, name)
    kind = h.S_IFREG if is_file(&arg) else arg.mode & h.S_IFMT
    return rc if rc < 0 else make(<tables_t *>fs, r, name, arg.umask, kind, make_node, &arg)


cdef int make_directory(int parent, const char *name, const void *what) noexcept nogil:
    return h.mkdirat(parent, name, (<const w.fuse_mkdir_in *>what).mode & 0o7777)


cdef int op_mkdir(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_mkdir_in arg
    cdef char name[NAME_BYTES]
    cdef int rc = span_read(&r.body, &arg, sizeof(arg))
    if rc == 0:
        rc = read_name(r, name)
    return rc if rc < 0 else make(<tables_t *>fs, r, name, arg.umask, h.S_IFDIR, make_directory, &arg)


cdef int op_link(void *fs, request_t *r) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef place_t old, p
    cdef w.fuse_link_in arg
    cdef char name[NAME_BYTES]
    cdef char old_name[FD_BYTES]
    cdef int rc
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    rc = read_last_name(r, name)
    if rc < 0:
        return rc
    if r.reply.bytes < sizeof(w.fuse_entry_out):
        return -EINVAL
    if not room_for_inode(t):
        return -ENFILE
    rc = place_get(t, arg.oldnodeid, &old)
    if rc < 0:
        return rc
    rc = place_get(t, r.header.nodeid, &p)
    if rc == 0:
        note_begin(r)
        # Through the link in /proc: AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH.
        rc = h.linkat(t.proc_fd, fd_name(old.fd, old_name), p.fd, name, h.AT_SYMLINK_FOLLOW)
        if rc < 0 and errno == EEXIST and was_linked(r, p.fd, name, old.fd):
            rc = 0
        if rc == 0:
            store_relaxed_u8(&t.inodes[old.index].origin, ORIGIN_ANY)
        rc = -errno if rc < 0 else reply_entry(t, r, &p, name, False)
        if rc == -ENOENT and count_links(old.fd) == 0:
            rc = tell_once(t, r, old.index, rc)
        if rc == -ESTALE:
            let_go_if_stale(t, old.index)
        rc = explain(t, r, p.index, p.fd, rc)
        place_put(t, &p)
    place_put(t, &old)
    return rc


cdef int remove(void *fs, request_t *r, int flags) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef place_t p
    cdef char name[NAME_BYTES]
    cdef uint32_t pinned = 0
    cdef int rc = read_last_name(r, name)
    if rc < 0:
        return rc
    rc = place_get(t, r.header.nodeid, &p)
    if rc < 0:
        return rc
    rc = pin_name(t, p.fd, name, &pinned)
    if rc == 0 and not is_another(r, p.fd, name):
        note_begin(r)
        rc = -errno if h.unlinkat(p.fd, name, flags) < 0 else 0
        if rc == -ENOENT and was_begun(r):
            rc = 0
    rc = explain(t, r, p.index, p.fd, rc)
    unpin(t, pinned)
    place_put(t, &p)
    return rc


cdef int op_unlink(void *fs, request_t *r) noexcept nogil:
    return remove(fs, r, 0)


cdef int op_rmdir(void *fs, request_t *r) noexcept nogil:
    return remove(fs, r, h.AT_REMOVEDIR)


cdef int rename_once(request_t *r, int old, const char *old_name, int new, const char *new_name,
                     uint32_t flags) noexcept nogil:
    cdef bint leaves_both = flags & (h.RENAME_EXCHANGE | h.RENAME_WHITEOUT)
    cdef int rc
    if leaves_both:
        note_moved(r, old, old_name)
        if was_exchanged(r, new, new_name):
            return 0
    elif is_another(r, old, old_name):
        return 0
    note_begin(r)
    rc = -errno if h.renameat2(old, old_name, new, new_name, flags) < 0 else 0
    return 0 if rc == -ENOENT and was_moved(r, new, new_name) else rc


cdef int move(void *fs, request_t *r, uint64_t new_dir, uint32_t flags) noexcept nogil:
    cdef tables_t *t = <tables_t *>fs
    cdef creator_t c
    cdef place_t old, new
    cdef char old_name[NAME_BYTES]
    cdef char new_name[NAME_BYTES]
    cdef uint32_t moved = 0, replaced = 0
    cdef int rc = read_name(r, old_name)
    if rc == 0:
        rc = read_last_name(r, new_name)
    if rc == 0:
        rc = place_get(t, r.header.nodeid, &old)
    if rc < 0:
        return rc
    rc = place_get(t, new_dir, &new)
    if rc == 0:
        rc = pin_name(t, old.fd, old_name, &moved)
        if rc == 0:
            rc = pin_name(t, new.fd, new_name, &replaced)
        # Who may rename is for the guest to say; but a whiteout is a new file, so the caller's.
        if rc == 0 and flags & h.RENAME_WHITEOUT:
            rc = caller_read(t, r, &c)
            if rc == 0:
                rc = become(t, &c)
        if rc == 0:
            rc = rename_once(r, old.fd, old_name, new.fd, new_name, flags)
            if flags & h.RENAME_WHITEOUT:
                unbecome(t, &c)
        rc = explain(t, r, new.index, new.fd, explain(t, r, old.index, old.fd, rc))
        if rc == -ESTALE:
            let_go_if_stale(t, new.index)
        unpin(t, moved)
        unpin(t, replaced)
        place_put(t, &new)
    place_put(t, &old)
    return rc


cdef int op_rename(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_rename_in arg
    if span_read(&r.body, &arg, sizeof(arg)) < 0:
        return -EINVAL
    return move(fs, r, arg.newdir, 0)


cdef int op_rename2(void *fs, request_t *r) noexcept nogil:
    cdef w.fuse_rename2_in arg
    if span_read(&r.body, &arg, sizeof(arg)) < 0 or arg.flags & ~RENAME_FLAGS:
        return -EINVAL
    return move(fs, r, arg.newdir, arg.flags)


def install(Dispatch dispatch, Tables tables):
    """Make these operations, on `tables`, the dispatch's."""
    cdef tables_t *t = tables.t
    dispatch.set_file_system_of(inode_file_system)
    dispatch.set_on_stale(inode_was_stale)
    dispatch.set_hot(NUMBER["LOOKUP"], op_lookup, t, tables)
    dispatch.set_hot(NUMBER["FORGET"], op_forget, t, tables)
    dispatch.set_hot(NUMBER["BATCH_FORGET"], op_batch_forget, t, tables)
    dispatch.set_hot(NUMBER["READLINK"], op_readlink, t, tables)
    dispatch.set_hot(NUMBER["SYMLINK"], op_symlink, t, tables)
    dispatch.set_hot(NUMBER["MKNOD"], op_mknod, t, tables)
    dispatch.set_hot(NUMBER["MKDIR"], op_mkdir, t, tables)
    dispatch.set_hot(NUMBER["LINK"], op_link, t, tables)
    dispatch.set_hot(NUMBER["UNLINK"], op_unlink, t, tables)
    dispatch.set_hot(NUMBER["RMDIR"], op_rmdir, t, tables)
    dispatch.set_hot(NUMBER["RENAME"], op_rename, t, tables)
    dispatch.set_hot(NUMBER["RENAME2"], op_rename2, t, tables)
