"""The tables of one guest, for operations that live in Python."""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from vfsd._wire cimport FUSE_ROOT_ID, fuse_attr_out, fuse_entry_out
from vfsd.hostfs cimport _host as h
from vfsd.hostfs._anchors cimport EVICT_BATCH, evict, inode_fd
from vfsd.hostfs._handles cimport handle_get, handle_open, handle_put, handle_release
from vfsd.hostfs._inodes cimport ATTR_MASK, attr_of, device_of, inode_forget, inode_get, inode_put, lookup
from vfsd.hostfs._slots cimport (
    BUCKETS, HANDLES_MAX, INODES_MAX, OPEN, REFERENCES, SHARDS, generation_of, handle_t, inode_t,
    load_acquire_u64, tables_t,
)

import os

__all__ = ("Pin", "Tables")


cdef void *reserve(size_t size) except NULL:
    """Zeroed address space; memory is taken page by page as it is touched."""
    cdef void *at = h.mmap(NULL, size, h.PROT_READ | h.PROT_WRITE,
                           h.MAP_PRIVATE | h.MAP_ANONYMOUS | h.MAP_NORESERVE, -1, 0)
    if at == h.MAP_FAILED:
        raise OSError(errno, os.strerror(errno))
    return at


cdef object failed(int rc):
    return OSError(-rc, os.strerror(-rc))


@cython.final
cdef class Pin:
    """A descriptor that stays open, and its inode's type, while the `with` block runs."""

    cdef Tables owner
    cdef int64_t index
    cdef bint of_handle
    cdef readonly int fd
    cdef readonly uint32_t kind  # S_IFMT bits; 0 for a handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.drop()

    def __dealloc__(self):
        self.drop()

    cdef void drop(self) noexcept:
        if self.index == 0:
            return
        if self.of_handle:
            handle_put(&self.owner.t, self.index)
        else:
            inode_put(&self.owner.t, self.index)
        self.index = 0


@cython.final
cdef class Tables:
    """The inodes and handles of one guest, below the directory `root_fd`.

    root_fd: readable descriptor of the shared directory; kept open by the tables as their own.
    anchors_max: O_PATH descriptors to hold at most, as far as file handles allow.
    OSError when the directory can't be read or address space runs out.
    """

    def __cinit__(self, int root_fd, uint64_t anchors_max):
        cdef tables_t *t = &self.t
        cdef int i
        for i in range(SHARDS):
            h.pthread_mutex_init(&t.shard[i], NULL)
        h.pthread_mutex_init(&t.alloc, NULL)
        h.pthread_mutex_init(&t.evict, NULL)
        t.inodes_top = FUSE_ROOT_ID + 1
        t.handles_top = 1
        t.hand = FUSE_ROOT_ID
        t.anchors_max = anchors_max
        t.inodes = <inode_t *>reserve(INODES_MAX * sizeof(inode_t))
        t.handles = <handle_t *>reserve(HANDLES_MAX * sizeof(handle_t))
        t.buckets = <uint32_t *>reserve(BUCKETS * sizeof(uint32_t))
        self.set_root(root_fd)

    cdef int set_root(self, int root_fd) except -1:
        cdef inode_t *root = &self.t.inodes[FUSE_ROOT_ID]
        cdef h.statx_t st
        if h.statx(root_fd, b"", h.AT_EMPTY_PATH, ATTR_MASK, &st) < 0:
            raise OSError(errno, os.strerror(errno))
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
        return 0

    def __dealloc__(self):
        cdef tables_t *t = &self.t
        self.close()
        if t.inodes != NULL:
            h.munmap(t.inodes, INODES_MAX * sizeof(inode_t))
        if t.handles != NULL:
            h.munmap(t.handles, HANDLES_MAX * sizeof(handle_t))
        if t.buckets != NULL:
            h.munmap(t.buckets, BUCKETS * sizeof(uint32_t))

    def set_timeouts(self, double entry_s, double attr_s):
        """How long the guest may keep names and attributes, in seconds."""
        self.t.entry_valid = <uint64_t>entry_s
        self.t.entry_valid_nsec = <uint32_t>((entry_s - <uint64_t>entry_s) * 1e9)
        self.t.attr_valid = <uint64_t>attr_s
        self.t.attr_valid_nsec = <uint32_t>((attr_s - <uint64_t>attr_s) * 1e9)

    def close(self):
        """Close every descriptor. No request may come any more. Idempotent."""
        cdef tables_t *t = &self.t
        cdef uint32_t i
        if t.inodes != NULL and t.handles != NULL and t.buckets != NULL:
            self.clear()
            if t.inodes[FUSE_ROOT_ID].state:
                h.close(t.inodes[FUSE_ROOT_ID].fd)
                t.inodes[FUSE_ROOT_ID].state = 0
        for i in range(t.n_mounts):
            if t.mounts[i].fd >= 0:
                h.close(t.mounts[i].fd)
        t.n_mounts = 0

    def clear(self):
        """Forget every inode but the root and release every handle (DESTROY, reset)."""
        cdef tables_t *t = &self.t
        cdef uint32_t index
        cdef uint64_t state
        with nogil:
            for index in range(1, t.handles_top):
                state = load_acquire_u64(&t.handles[index].state)
                if state & OPEN:
                    handle_release(t, (generation_of(state) << 32) | index)
            for index in range(FUSE_ROOT_ID + 1, t.inodes_top):
                state = load_acquire_u64(&t.inodes[index].state)
                if state & REFERENCES:
                    inode_forget(t, (generation_of(state) << 32) | index, <uint64_t>-1)

    def lookup(self, uint64_t parent, bytes name):
        """fuse_entry_out of a checked name, its lookup counted. OSError."""
        cdef fuse_entry_out out
        cdef const char *text = name
        cdef int rc
        memset(&out, 0, sizeof(out))
        with nogil:
            rc = lookup(&self.t, parent, text, &out)
        if rc < 0:
            raise failed(rc)
        return (<char *>&out)[:sizeof(out)]

    def forget(self, uint64_t nodeid, uint64_t n):
        """Take n from the lookup count."""
        inode_forget(&self.t, nodeid, n)

    def attr(self, int fd):
        """fuse_attr_out of a descriptor. OSError."""
        cdef fuse_attr_out out
        cdef int rc
        with nogil:
            rc = attr_of(&self.t, fd, &out)
        if rc < 0:
            raise failed(rc)
        return (<char *>&out)[:sizeof(out)]

    def pin(self, uint64_t nodeid):
        """The inode's O_PATH descriptor. OSError: ESTALE when the guest does not know that nodeid."""
        cdef Pin pin = Pin.__new__(Pin)
        cdef int64_t index
        with nogil:
            index = inode_get(&self.t, nodeid)
            if index >= 0:
                pin.fd = inode_fd(&self.t, index)
        if index < 0:
            raise failed(<int>index)
        pin.owner = self
        pin.index = index
        pin.kind = self.t.inodes[index].mode
        if pin.fd < 0:
            raise failed(pin.fd)
        return pin

    def handle(self, uint64_t fh):
        """An open handle's descriptor. OSError: EBADF when the guest has no such handle."""
        cdef Pin pin = Pin.__new__(Pin)
        cdef int fd = -1
        cdef int64_t index = handle_get(&self.t, fh, &fd)
        if index < 0:
            raise failed(<int>index)
        pin.owner = self
        pin.index = index
        pin.of_handle = True
        pin.fd = fd
        return pin

    def open(self, int fd):
        """Own fd as a new handle: its fh. OSError ENFILE: fd has been closed."""
        cdef uint64_t fh = 0
        cdef int rc = handle_open(&self.t, fd, &fh)
        if rc < 0:
            h.close(fd)
            raise failed(rc)
        return fh

    def release(self, uint64_t fh):
        """Give a handle up; its descriptor goes when nobody works with it any more. OSError EBADF."""
        cdef int rc
        with nogil:
            rc = handle_release(&self.t, fh)
        if rc < 0:
            raise failed(rc)

    def make_room(self):
        """Close a few anchors that nobody uses, for a caller out of descriptors: whether any went."""
        cdef int closed
        with nogil:
            closed = evict(&self.t, EVICT_BATCH)
        return closed > 0

    def counts(self):
        """Now: inodes, handles, anchors (O_PATH descriptors held); since the start: evicted."""
        return {
            "inodes": load_acquire_u64(&self.t.n_inodes),
            "handles": load_acquire_u64(&self.t.n_handles),
            "anchors": load_acquire_u64(&self.t.n_anchors),
            "evicted": load_acquire_u64(&self.t.evicted),
        }
