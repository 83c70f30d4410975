"""The tables of one guest: made, counted, cleared."""

cimport cython
from libc.errno cimport EAGAIN, errno
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vfsd.fuse._wire cimport FUSE_DAX_SZ, FUSE_ROOT_ID
from vfsd.state._journal cimport STAGE_MASK, STAGE_PARKED, STAGE_TAKEN, State, journal_t, record_t
from vfsd.state._memory cimport release, reserve
from vfsd.sys._threads cimport pthread_mutex_init
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.ops._caller cimport place_get, place_put, place_t, reopen, room_for_handle
from vfsd.hostfs.table._handles cimport descriptor_put, handle_close
from vfsd.hostfs.table._kinds cimport close_never_fails, in_memory, never_revalidates
from vfsd.hostfs.lock._holds cimport locks_t, regain
from vfsd.hostfs.lock._locks cimport Locks, locks_drop
from vfsd.hostfs.table._nodes cimport ATTR_MASK, device_of, inode_forget, inode_get, inode_put
from vfsd.hostfs.table._notes cimport handles_work, note_root
from vfsd.hostfs.table._recovery cimport (
    close_unknown, drop_unanswered, fd_set_t, note_fd, tables_descriptors, tables_recover,
)
from vfsd.hostfs.table._slots cimport (
    BUCKETS, DIRTY_NOTHING, DIRTY_PAGES, DIRTY_SIZES, HANDLES_MAX, HELD_MAX, HELD_NOTHING, HELD_POSIX, ID_FORBID, ID_SHIFT, ID_SQUASH, INODES_MAX, LISTINGS, LONG_NAMES_MAX, OPEN, REFERENCES,
    SEEN_NAMES, SHARDS, UNOPENED_MAX, caps_t, generation_of, handle_t, held_t, id_map_t, id_range_t, inode_t,
    listing_t,
    load_acquire_u64, long_name_t, tables_t, xattr_rule_t,
)

import os
import resource

from vfsd.hostfs.cache import Dirty
from vfsd.hostfs.ids.idmap import FORBID, RANGE, SHIFT, SQUASH

__all__ = ("Tables", "file_handles_work")

cdef extern from * nogil:
    """
    #include <assert.h>
    /* Of debug builds: what is left over ends the process. */
    #define expect_none(n) ((void)(n), assert((n) == 0))
    """
    void expect_none(uint64_t n)

assert sizeof(id_range_t) == RANGE.size
assert (ID_SHIFT, ID_SQUASH, ID_FORBID) == (SHIFT, SQUASH, FORBID)
assert (DIRTY_NOTHING, DIRTY_PAGES, DIRTY_SIZES) == (Dirty.NOTHING, Dirty.PAGES, Dirty.SIZES)


cdef void split_seconds(double seconds, uint64_t *whole, uint32_t *nanoseconds) noexcept:
    whole[0] = <uint64_t>seconds
    nanoseconds[0] = <uint32_t>((seconds - <double>whole[0]) * 1e9)


cdef bint can_open_cached(int directory) noexcept:
    """Whether openat2(2) with RESOLVE_CACHED is there, and allowed."""
    cdef int fd = h.open_cached(directory, b"/", h.O_PATH | h.O_CLOEXEC)
    if fd >= 0:
        h.close(fd)
    return fd >= 0 or errno == EAGAIN


cdef int get_caps(caps_t *caps) except -1:
    """This process's capabilities: of threads, too, as they begin."""
    cdef h.__user_cap_header_struct header
    header.version = h.LINUX_CAPABILITY_VERSION_3
    header.pid = 0
    if h.syscall(h.SYS_capget, &header, caps) < 0:
        raise OSError(errno, os.strerror(errno))
    return 0


cdef void check_empty(const tables_t *t) noexcept:
    """Every reference and descriptor has come back."""
    expect_none(t.n_inodes)
    expect_none(t.n_handles)
    expect_none(t.n_descriptors)
    expect_none(t.n_anchors)
    expect_none(t.n_by_name)
    expect_none(t.n_locks)
    expect_none(t.n_ranges)


def file_handles_work(int fd):
    """Whether inodes can be opened by file handle below a readable directory, by this process."""
    return handles_work(fd)


cdef void init_locks(tables_t *t) noexcept nogil:
    """All free, whoever held them."""
    cdef int i
    for i in range(SHARDS):
        pthread_mutex_init(&t.shard[i], NULL)
    for i in range(UNOPENED_MAX):
        pthread_mutex_init(&t.unopened[i].lock, NULL)
    pthread_mutex_init(&t.alloc, NULL)
    pthread_mutex_init(&t.evict, NULL)
    pthread_mutex_init(&t.mount, NULL)


@cython.final
cdef class Tables:
    """The inodes and handles of one guest, below the directory `root_fd`.

    root_fd: readable descriptor of the shared directory; kept open by the tables as their own.
    proc_fd: of this process's /proc/self/fd; becomes the tables'. -1: it is opened here.
    file_handles: bring evicted inodes back by file handle where that works, not only by name.
    OSError when the directory can't be read or address space runs out.
    """

    def __cinit__(self, int root_fd, bint file_handles, int proc_fd=-1):
        cdef tables_t *t
        self.t = t = <tables_t *>reserve(sizeof(tables_t))
        init_locks(t)
        t.proc_fd = t.selinux_proc_fd = -1
        t.inodes_top = FUSE_ROOT_ID + 1
        t.handles_top = 1
        t.long_names_top = 1
        t.hand = FUSE_ROOT_ID
        t.dax_size_min = UINT64_MAX
        t.file_handles = file_handles
        t.fds_max = t.evict_at = HANDLES_MAX
        t.handles_max = HANDLES_MAX - 1
        t.inodes = <inode_t *>reserve(INODES_MAX * sizeof(inode_t))
        t.handles = <handle_t *>reserve(HANDLES_MAX * sizeof(handle_t))
        t.buckets = <uint32_t *>reserve(BUCKETS * sizeof(uint32_t))
        t.listings = <listing_t *>reserve(LISTINGS * sizeof(listing_t))
        t.dirtiers = <int *>reserve(INODES_MAX * sizeof(int))
        t.anchored = <uint64_t *>reserve(INODES_MAX // 8)
        t.long_names = <long_name_t *>reserve(LONG_NAMES_MAX * sizeof(long_name_t))
        t.seen_names = <uint64_t *>reserve(SEEN_NAMES * sizeof(uint64_t))
        t.held = <held_t *>reserve(HELD_MAX * sizeof(held_t))
        t.uid = os.geteuid()
        t.gid = os.getegid()
        self.kept = []
        get_caps(t.caps)
        if proc_fd < 0:
            proc_fd = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        t.proc_fd = proc_fd
        self.set_root(root_fd)

    cdef int set_root(self, int root_fd) except -1:
        cdef inode_t *root = &self.t.inodes[FUSE_ROOT_ID]
        cdef h.statx_t st
        cdef h.statfs_t fs
        if h.statx(root_fd, b"", h.AT_EMPTY_PATH, ATTR_MASK, &st) < 0:
            raise OSError(errno, os.strerror(errno))
        if h.fstatfs(root_fd, &fs) < 0:
            raise OSError(errno, os.strerror(errno))
        self.t.in_memory = in_memory(fs.f_type)
        self.t.close_never_fails = close_never_fails(fs.f_type)
        self.t.never_revalidates = never_revalidates(fs.f_type)
        self.t.walks_tell = can_open_cached(root_fd)
        root.fd = h.c_dup(root_fd)
        if root.fd < 0:
            raise OSError(errno, os.strerror(errno))
        os.set_inheritable(root.fd, False)
        root.dev = device_of(&st)
        root.ino = st.stx_ino
        root.mnt_id = st.stx_mnt_id
        root.mode = st.stx_mode & h.S_IFMT
        root.nlookup = 1
        root.state = 1
        note_root(self.t)
        return 0

    def __dealloc__(self):
        self.close()
        release(<void **>&self.t, sizeof(tables_t))

    def set_timeouts(self, double entry_s, double attr_s, double negative_s):
        """How long the guest may keep names, attributes and the absence of names, in seconds."""
        cdef tables_t *t = self.t
        split_seconds(entry_s, &t.entry_valid, &t.entry_valid_nsec)
        split_seconds(attr_s, &t.attr_valid, &t.attr_valid_nsec)
        split_seconds(negative_s, &t.negative_valid, &t.negative_valid_nsec)

    def set_proc(self, int proc_fd):
        """This process's /proc/self/fd, in place of its maker's. It stays the caller's."""
        self.t.proc_fd = proc_fd

    def recover(self, State state not None):
        """After the death of the server that worked with them, before anybody else does. MemoryError."""
        cdef int i
        cdef uint32_t head
        cdef journal_t *journal
        cdef record_t *record
        init_locks(self.t)
        for i in range(state.queues):
            journal = state.journal(i)
            for head in range(journal.num if journal.live else 0):
                record = &journal.records[head]
                if record.stage & STAGE_MASK in (STAGE_TAKEN, STAGE_PARKED):
                    drop_unanswered(self.t, record.fh, record.nodeid)
                    record.fh = record.nodeid = 0
        if tables_recover(self.t) < 0:
            raise MemoryError

    def holding(self):
        """Descriptors by which a server had locks that has died."""
        return [fd for fd in range(self.t.held_top) if self.t.held[fd].kind != HELD_NOTHING]

    def regain(self, int fd, locks):
        """Of such a descriptor, what the host says it holds: (F_RDLCK or F_WRLCK, first byte, last byte) each."""
        cdef locks_t *l = <locks_t *>self.t.locks
        cdef int n = 0
        for kind, start, end in locks:
            if l != NULL and regain(l, self.t, fd, kind, start, end) == 0:
                n += 1
        if n == 0:
            if self.t.held[fd].kind == HELD_POSIX:
                h.close(fd)
            self.t.held[fd].kind = HELD_NOTHING

    def close_others(self, keep):
        """Close every descriptor of this process but those of the tables and of `keep`. MemoryError."""
        cdef fd_set_t known
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        known.n = limit
        known.bits = <uint64_t *>calloc((limit + 63) // 64, sizeof(uint64_t))
        if known.bits == NULL:
            raise MemoryError
        try:
            for fd in keep:
                note_fd(&known, fd)
            with nogil:
                tables_descriptors(self.t, &known)
                close_unknown(&known)
        finally:
            free(known.bits)

    def set_budget(self, uint64_t fds_max, uint64_t handles_max):
        """Descriptors to hold at most, and how many of them beside anchors. At any time.

        Anchors are evicted to stay below fds_max, as far as they can be. Open files, locks' owners and mapped
        files are refused beyond handles_max.
        """
        self.t.handles_max = min(handles_max, <uint64_t>(HANDLES_MAX - 1))
        self.t.fds_max = self.t.evict_at = fds_max

    def set_policy(self, uint32_t open_flags, uint32_t opendir_flags, bint xattr, bint file_capabilities):
        """FOPEN_* of OPEN's and OPENDIR's replies; whether extended attributes are passed through, and
        whether the guest may store file capabilities that are the host's."""
        self.t.open_flags = open_flags
        self.t.opendir_flags = opendir_flags
        self.t.xattr = xattr
        self.t.file_capabilities = file_capabilities

    def set_opening(self, uint32_t direct_flags, bint direct_io, bint noatime):
        """More FOPEN_* of a file opened with O_DIRECT; whether that and O_NOATIME reach the host."""
        # O_APPEND is applied to each write.
        cdef int direct = h.O_DIRECT if direct_io else 0
        self.t.direct_flags = direct_flags
        self.t.pass_flags = h.O_ACCMODE | h.O_TRUNC | h.O_SYNC | h.O_DSYNC | direct
        if noatime:
            self.t.pass_flags |= h.O_NOATIME
        self.t.follow_flags = self.t.pass_flags & (h.O_DIRECT | h.O_NOATIME)
        self.t.read_waits = direct
        self.t.write_waits = h.O_SYNC | h.O_DSYNC | direct

    def agree(self, bint writeback, int dirty, bint zero_open, uint32_t noflush_flags, bint submounts,
              bint maps_all):
        """What INIT has settled, before the guest's next request.

        dirty: what the guest may have changed without telling, a DIRTY_* of `_slots.pxd`.
        noflush_flags: more FOPEN_* where closing a file reports nothing. Where it has something to
        report files are opened and closed, whatever the guest can. maps_all: it has no cache of any file,
        but all in the DAX window.
        """
        self.t.noflush_flags = noflush_flags
        self.t.writeback = writeback
        self.t.dirty = dirty
        self.t.zero_open = zero_open and self.t.close_never_fails
        self.t.submounts = submounts
        self.t.maps_all = maps_all

    def set_id_maps(self, bytes uid_to_host, bytes uid_to_guest, bytes gid_to_host, bytes gid_to_guest):
        """Translation of ids, each direction as `idmap.pack` has it. Once."""
        self.set_map(&self.t.uid_to_host, uid_to_host)
        self.set_map(&self.t.uid_to_guest, uid_to_guest)
        self.set_map(&self.t.gid_to_host, gid_to_host)
        self.set_map(&self.t.gid_to_guest, gid_to_guest)

    cdef int set_map(self, id_map_t *m, bytes ranges) except -1:
        self.kept.append(ranges)
        m.ranges = <const id_range_t *><const char *>ranges
        m.n = len(ranges) // sizeof(id_range_t)
        return 0

    def set_xattr_rules(self, bytes rules, bytes capability):
        """Rules as `xattrmap.pack` has them; `xattrmap.host_capability`. Once."""
        self.kept.append(rules)
        self.t.xattr_rules = <const xattr_rule_t *><const char *>rules
        self.t.n_xattr_rules = len(rules) // sizeof(xattr_rule_t)
        if <size_t>len(capability) >= sizeof(self.t.capability):
            raise ValueError("the name is too long")
        memcpy(self.t.capability, <const char *>capability, len(capability) + 1)

    def agree_identity(self, bint posix_acl, bint killpriv_v2, bint setxattr_ext, bint security_ctx, bint supp_group):
        """What INIT has settled, before the guest's next request."""
        self.t.posix_acl = posix_acl
        self.t.killpriv_v2 = killpriv_v2
        self.t.setxattr_ext = setxattr_ext
        self.t.security_ctx = security_ctx
        self.t.supp_group = supp_group

    def set_selinux(self, int proc_fd):
        """What the guest sends as security.selinux, SELinux itself gives to what is made. Once.

        proc_fd: of /proc, of which only thread-self/attr is used; becomes the tables'.
        """
        self.t.selinux_proc_fd = proc_fd

    def set_readonly(self):
        """Open nothing for writing, change no attribute by ioctl (ACCESS says so too)."""
        self.t.readonly = True

    def set_dax(self, size_min, bint whole, bint writable, bint marked):
        """FUSE_ATTR_DAX of regular files: by size from size_min bytes on (None: not), whole: if it is a
        multiple of 2 MiB, writable: if it may be written; and if marked.
        """
        self.t.dax_size_min = UINT64_MAX if size_min is None else size_min
        self.t.dax_size_mask = FUSE_DAX_SZ - 1 if whole else 0
        self.t.dax_writable = writable
        self.t.dax_marked = marked

    @property
    def proc_fd(self):
        return self.t.proc_fd

    def set_mapped(self, uint64_t nodeid, bint mapped):
        """Whether that inode has parts in the DAX window, as far as the guest knows it still."""
        cdef int64_t index = inode_get(self.t, nodeid)
        if index >= 0:
            self.t.inodes[index].mapped = mapped
            inode_put(self.t, <uint32_t>index)

    def knows(self, uint64_t nodeid):
        """Whether the guest has looked that inode up and not forgotten it."""
        cdef int64_t index = inode_get(self.t, nodeid)
        if index < 0:
            return False
        inode_put(self.t, <uint32_t>index)
        return True

    def open(self, uint64_t nodeid, int flags):
        """A new descriptor of a regular file, until close_file. OSError, also for anything else."""
        cdef place_t p
        cdef int fd
        with nogil:
            fd = room_for_handle(self.t)
            if fd == 0:
                fd = place_get(self.t, nodeid, &p)
                if fd == 0:
                    fd = reopen(self.t, &p, flags)
                    place_put(self.t, &p)
                if fd < 0:
                    descriptor_put(self.t)
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd))
        return fd

    def close_file(self, int fd):
        """Close what open() gave."""
        h.close(fd)
        descriptor_put(self.t)

    def set_locks(self, Locks locks not None, bint flock, bint posix_lock):
        """Let the guest take locks of these kinds on the host, in the share's table."""
        self.locks = locks
        self.t.locks = &locks.l
        self.t.flock = flock
        self.t.posix_lock = posix_lock

    def close(self):
        """Close every descriptor and give the memory back. No request may come. Idempotent."""
        cdef tables_t *t = self.t
        cdef uint32_t i
        if t == NULL:
            return
        if t.buckets != NULL:
            self.clear()
            check_empty(t)
            if t.inodes[FUSE_ROOT_ID].state:
                h.close(t.inodes[FUSE_ROOT_ID].fd)
        for i in range(1, t.n_mounts):  # the first is the root's own
            if t.mounts[i].fd >= 0:
                h.close(t.mounts[i].fd)
        t.n_mounts = 0
        if t.proc_fd >= 0:
            h.close(t.proc_fd)
            t.proc_fd = -1
        if t.selinux_proc_fd >= 0:
            h.close(t.selinux_proc_fd)
            t.selinux_proc_fd = -1
        release(<void **>&t.inodes, INODES_MAX * sizeof(inode_t))
        release(<void **>&t.handles, HANDLES_MAX * sizeof(handle_t))
        release(<void **>&t.buckets, BUCKETS * sizeof(uint32_t))
        release(<void **>&t.listings, LISTINGS * sizeof(listing_t))
        release(<void **>&t.dirtiers, INODES_MAX * sizeof(int))
        release(<void **>&t.anchored, INODES_MAX // 8)
        release(<void **>&t.long_names, LONG_NAMES_MAX * sizeof(long_name_t))
        release(<void **>&t.seen_names, SEEN_NAMES * sizeof(uint64_t))
        release(<void **>&t.held, HELD_MAX * sizeof(held_t))
        t.inodes_top = t.handles_top = 0

    def clear(self):
        """Forget every inode but the root, release every handle and lock (DESTROY, reset)."""
        cdef tables_t *t = self.t
        cdef uint32_t index
        cdef uint64_t state
        with nogil:
            locks_drop(t)
            for index in range(1, t.handles_top):
                state = load_acquire_u64(&t.handles[index].state)
                if state & OPEN:
                    handle_close(t, (generation_of(state) << 32) | index)
            for index in range(FUSE_ROOT_ID + 1, t.inodes_top):
                state = load_acquire_u64(&t.inodes[index].state)
                if state & REFERENCES:
                    inode_forget(t, (generation_of(state) << 32) | index, <uint64_t>-1)

    def counts(self):
        """Now: inodes, handles, anchors (O_PATH descriptors held); since the start: evicted anchors,
        and names_left_out, entries that no listing had, as their names are too long.
        """
        return {
            "inodes": load_acquire_u64(&self.t.n_inodes),
            "handles": load_acquire_u64(&self.t.n_handles),
            "anchors": load_acquire_u64(&self.t.n_anchors),
            "evicted": load_acquire_u64(&self.t.evicted),
            "names_left_out": load_acquire_u64(&self.t.names_left_out),
        }
