"""Names to inodes, and their attributes."""

from libc.errno cimport EBADF, EMFILE, ENFILE, ENOENT, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset, strlen

from vfsd.fuse._wire cimport FUSE_ATTR_DAX, FUSE_ATTR_SUBMOUNT
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._anchors cimport birth_of, inode_fd, is_same, make_room, note_used, out_of_descriptors
from vfsd.hostfs.ids._idmap cimport id_to_guest
from vfsd.hostfs.table._nodes cimport (
    ATTR_MASK, anchor_set, drop_lookups, find, inode_get, inode_put, insert, unhash,
)
from vfsd.hostfs.table._notes cimport note_drop, note_name
from vfsd.hostfs.table._slots cimport (
    BY_NAME, DIRTY_NOTHING, DIRTY_PAGES, ORIGIN_DISK, SEEN_NAMES, generation_of, inode_t, load_acquire_int, load_acquire_u64,
    load_relaxed_u8, named_t, note_t, place_t, store_relaxed_u8, store_release_u64,
    believes_names, walk_may_wait,
)


cdef enum:
    ABSENT = 0xffffffff  # in place of the inode of a name that was not there


# --- lookup ---

cdef int open_anchor(tables_t *t, int parent, const char *name, int flags, bint cached,
                     h.statx_t *st) noexcept nogil:
    """A new O_PATH descriptor of a name and its attributes, or -errno. flags: O_NOFOLLOW or 0.

    cached: -EAGAIN if the disk would have to be waited for.
    """
    cdef int fd = -1, rc
    make_room(t)
    while fd < 0:
        if cached:
            fd = h.open_cached(parent, name, h.O_PATH | flags | h.O_CLOEXEC)
        else:
            fd = h.openat(parent, name, h.O_PATH | flags | h.O_CLOEXEC)
        if fd < 0:
            rc = errno
            if not out_of_descriptors(t, rc):
                return -ENFILE if rc == EMFILE else -rc
    if h.statx(fd, b"", h.AT_EMPTY_PATH, ATTR_MASK, st) < 0:
        rc = -errno
        h.close(fd)
        return rc
    return fd


cdef int adopt(tables_t *t, int fd, const h.statx_t *st, uint32_t *index) noexcept nogil:
    """Own fd, opened by a name, as the anchor of its inode. 0 or -errno."""
    cdef inode_t *inode
    while True:
        index[0] = insert(t, fd, st, NULL)
        if index[0] == 0:
            h.close(fd)
            return -ENFILE
        inode = &t.inodes[index[0]]
        if load_acquire_int(&inode.fd) == fd:
            return 0
        if load_acquire_int(&inode.fd) >= 0:
            h.close(fd)
            return 0
        if is_same(t, inode, fd):
            anchor_set(t, index[0], fd)
            return 0
        # What the guest knew is gone, and its number another's.
        unhash(t, index[0])
        drop_lookups(t, index[0], 1)
        inode_put(t, index[0])


cdef int adopt_unanchored(tables_t *t, const place_t *parent, const char *name, h.statx_t *st,
                          uint32_t *index) noexcept nogil:
    """The inode of a name while no anchor can be opened: as if it had been evicted. 0 or -errno.

    So what has just been made is never lost for want of a descriptor.
    """
    cdef uint64_t state = load_acquire_u64(&t.inodes[parent.index].state)
    cdef uint64_t born
    cdef note_t note
    cdef named_t *known
    cdef int rc = 0
    if h.statx(parent.fd, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, ATTR_MASK | h.STATX_BTIME, st) < 0:
        return -errno
    born = birth_of(st)
    memset(&note, 0, sizeof(note))
    if not note_name(t, (generation_of(state) << 32) | parent.index, born, name, strlen(name), &note):
        return -ENFILE
    index[0] = insert(t, -1, st, &note)
    if index[0] == 0:
        rc = -ENFILE
    elif note.how and load_acquire_int(&t.inodes[index[0]].fd) < 0:
        # Known, and evicted: without its anchor its number may be another's by now.
        known = <named_t *>t.inodes[index[0]].note.bytes
        if t.inodes[index[0]].note.how != BY_NAME or known.born != born or born == 0:
            drop_lookups(t, index[0], 1)
            inode_put(t, index[0])
            rc = -ENFILE
    note_drop(t, &note)
    return rc


cdef int lookup_at(tables_t *t, const place_t *parent, const char *name, bint open_first, bint cached, h.statx_t *st,
                   uint32_t *index) noexcept nogil:
    """The slot of a name, referenced and with one more lookup. 0 or -errno.

    An anchor keeps (dev, ino) from being reused: who has it is known. An evicted inode must prove it.
    """
    cdef int fd
    if not open_first:
        if h.statx(parent.fd, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, ATTR_MASK, st) < 0:
            return -errno
        index[0] = find(t, st)
        if index[0] and load_acquire_int(&t.inodes[index[0]].fd) >= 0:
            note_used(&t.inodes[index[0]])
            return 0
        if index[0]:
            drop_lookups(t, index[0], 1)
            inode_put(t, index[0])
    fd = open_anchor(t, parent.fd, name, h.O_NOFOLLOW, cached, st)
    if fd == -ENFILE or fd == -ENOMEM:
        return adopt_unanchored(t, parent, name, st, index)
    return fd if fd < 0 else adopt(t, fd, st, index)


cdef bint attr_is_kept(const tables_t *t, const h.statx_t *st) noexcept nogil:
    """Not while there are set-id bits that go with the guest's writes: of that it is not told."""
    return not (t.killpriv_v2 and st.stx_mode & (h.S_ISUID | h.S_ISGID) and st.stx_mode & h.S_IFMT == h.S_IFREG)


cdef void entry_fill(tables_t *t, uint32_t index, const h.statx_t *st, fuse_entry_out *out) noexcept nogil:
    out.nodeid = (generation_of(load_acquire_u64(&t.inodes[index].state)) << 32) | index
    out.generation = 0
    out.entry_valid = t.entry_valid
    out.entry_valid_nsec = t.entry_valid_nsec
    out.attr_valid = out.attr_valid_nsec = 0
    if attr_is_kept(t, st):
        out.attr_valid = t.attr_valid
        out.attr_valid_nsec = t.attr_valid_nsec
    attr_fill(t, st, &out.attr)
    if maybe_dax(t, st) and is_dax(t, inode_fd(t, index), st):
        out.attr.flags |= FUSE_ATTR_DAX


cdef int entry_of_open(tables_t *t, const char *fd_name, fuse_entry_out *out) noexcept nogil:
    cdef h.statx_t st
    cdef uint32_t index = 0
    cdef int fd = open_anchor(t, t.proc_fd, fd_name, 0, False, &st)
    cdef int rc = fd if fd < 0 else adopt(t, fd, &st, &index)
    if rc < 0:
        return rc
    entry_fill(t, index, &st, out)
    inode_put(t, index)
    return 0


cdef bint is_mount(const inode_t *parent, const inode_t *inode) noexcept nogil:
    """Whether a directory is another mount than the one its name is in, or a file system within it
    (btrfs subvolumes): what is a name's today is so until somebody mounts or unmounts there.
    """
    return inode.mode == h.S_IFDIR and (inode.mnt_id != parent.mnt_id or inode.dev != parent.dev)


cdef int entry_at(tables_t *t, const place_t *parent, const char *name, bint open_first, walk_t walk,
                  fuse_entry_out *out) noexcept nogil:
    cdef h.statx_t st
    cdef uint32_t index = 0
    cdef int rc = lookup_at(t, parent, name, open_first, walk == CACHED_ONLY, &st, &index)
    if rc < 0:
        return rc
    entry_fill(t, index, &st, out)
    if t.submounts and is_mount(&t.inodes[parent.index], &t.inodes[index]):
        out.attr.flags |= FUSE_ATTR_SUBMOUNT
    rc = load_acquire_u64(&t.inodes[index].nlookup) == 1
    if rc and walk == WAIT_COLD and t.inodes[index].mode == h.S_IFDIR:
        store_relaxed_u8(&t.inodes[index].origin, ORIGIN_DISK)
    inode_put(t, index)
    return rc


cdef inline uint64_t hash_of(uint32_t parent, const char *name) noexcept nogil:
    """FNV-1a"""
    cdef uint64_t x = 0xCBF29CE484222325ULL ^ parent
    while name[0]:
        x = (x ^ <uint8_t>name[0]) * 0x100000001B3ULL
        name += 1
    return x ^ (x >> 29)


cdef inline bint was_seen(tables_t *t, uint64_t hash) noexcept nogil:
    """Whether a name led to an inode whose anchor is still there, which keeps the name in memory, too; or
    was not there lately, which Linux remembers until it is short of memory.
    """
    cdef uint64_t seen = load_acquire_u64(&t.seen_names[hash % SEEN_NAMES])
    if seen == 0 or seen >> 32 != hash >> 32:
        return False
    return <uint32_t>seen == ABSENT or load_acquire_int(&t.inodes[<uint32_t>seen].fd) >= 0


cdef inline void note_seen(tables_t *t, uint64_t hash, uint32_t index) noexcept nogil:
    store_release_u64(&t.seen_names[hash % SEEN_NAMES], (hash >> 32 << 32) | index)


cdef bint opens_first(const tables_t *t, uint32_t directory, bint likely_new, bint in_memory) noexcept nogil:
    return likely_new or (walk_may_wait(t, directory) and not (in_memory and believes_names(t, directory)))


cdef int lookup(tables_t *t, const place_t *p, const char *name, bint may_wait,
                fuse_entry_out *out) noexcept nogil:
    """A known name costs statx(2) alone."""
    cdef uint64_t hash = 0
    cdef walk_t walk = WAIT
    cdef bint in_memory = True
    cdef bint may_wait_for_disk = walk_may_wait(t, p.index)
    cdef int rc
    if may_wait_for_disk:
        walk = WAIT_COLD if may_wait else CACHED_ONLY
        hash = hash_of(p.index, name)
        in_memory = was_seen(t, hash)
    rc = entry_at(t, p, name, opens_first(t, p.index, load_relaxed_u8(&t.inodes[p.index].finds_new), in_memory), walk, out)
    if rc >= 0:
        store_relaxed_u8(&t.inodes[p.index].finds_new, rc)
        if may_wait_for_disk:
            note_seen(t, hash, <uint32_t>out.nodeid)
        rc = 0
    elif rc == -ENOENT and may_wait_for_disk:
        note_seen(t, hash, ABSENT)
    return rc



# --- attributes ---

cdef inline bint is_empty(const tables_t *t, const h.statx_t *st) noexcept nogil:
    """Whether a file without blocks has no data in the guest either, as long as these attributes are kept:
    tar(1) reads no data then.
    """
    return t.dirty == DIRTY_NOTHING or (t.dirty == DIRTY_PAGES and st.stx_size == 0)


cdef void attr_fill(const tables_t *t, const h.statx_t *st, fuse_attr *attr) noexcept nogil:
    attr.ino = st.stx_ino
    attr.size = st.stx_size
    attr.blocks = st.stx_blocks
    if attr.blocks == 0 and st.stx_mode & h.S_IFMT == h.S_IFREG and not is_empty(t, st):
        attr.blocks = 1
    attr.atime = st.stx_atime.tv_sec
    attr.mtime = st.stx_mtime.tv_sec
    attr.ctime = st.stx_ctime.tv_sec
    attr.atimensec = st.stx_atime.tv_nsec
    attr.mtimensec = st.stx_mtime.tv_nsec
    attr.ctimensec = st.stx_ctime.tv_nsec
    attr.mode = st.stx_mode
    attr.nlink = st.stx_nlink
    attr.uid = id_to_guest(&t.uid_to_guest, st.stx_uid)
    attr.gid = id_to_guest(&t.gid_to_guest, st.stx_gid)
    # new_encode_dev() of linux/kdev_t.h
    attr.rdev = ((st.stx_rdev_minor & 0xff) | (st.stx_rdev_major << 8)
                 | ((st.stx_rdev_minor & ~<uint32_t>0xff) << 12))
    attr.blksize = st.stx_blksize
    attr.flags = 0


cdef int attr_of(tables_t *t, int fd, fuse_attr_out *out) noexcept nogil:
    cdef h.statx_t st
    if h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_BASIC_STATS, &st) < 0:
        return -errno
    out.attr_valid = out.attr_valid_nsec = 0
    if attr_is_kept(t, &st):
        out.attr_valid = t.attr_valid
        out.attr_valid_nsec = t.attr_valid_nsec
    out.dummy = 0
    attr_fill(t, &st, &out.attr)
    if maybe_dax(t, &st) and is_dax(t, fd, &st):
        out.attr.flags |= FUSE_ATTR_DAX
    return 0


cdef inline bint dax_by_size(tables_t *t, const h.statx_t *st) noexcept nogil:
    return t.dax_size_min <= st.stx_size and (st.stx_size & t.dax_size_mask) == 0


cdef inline bint maybe_dax(tables_t *t, const h.statx_t *st) noexcept nogil:
    return (t.dax_marked or dax_by_size(t, st)) and st.stx_mode & h.S_IFMT == h.S_IFREG


cdef bint may_write(tables_t *t, int fd) noexcept nogil:
    if t.readonly:
        return False
    return h.syscall(h.SYS_faccessat2, fd, b"", h.W_OK, h.AT_EMPTY_PATH | h.AT_EACCESS) == 0


cdef bint is_dax(tables_t *t, int fd, const h.statx_t *st) noexcept nogil:
    """Whether a guest that leaves it to us maps that regular file."""
    cdef h.fsxattr marks
    cdef char name[h.FD_BYTES]
    cdef int opened, rc
    if dax_by_size(t, st) and (not t.dax_writable or may_write(t, fd)):
        return True
    if not t.dax_marked:
        return False
    rc = h.ioctl(fd, h.FS_IOC_FSGETXATTR, &marks)
    if rc < 0 and errno == EBADF and fd >= 0:  # an anchor
        opened = h.openat(t.proc_fd, h.fd_name(fd, name), h.O_RDONLY | h.O_CLOEXEC | h.O_NONBLOCK)
        if opened < 0:
            return False
        rc = h.ioctl(opened, h.FS_IOC_FSGETXATTR, &marks)
        h.close(opened)
    return rc == 0 and marks.fsx_xflags & h.FS_XFLAG_DAX
