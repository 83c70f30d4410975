"""Anchors: the O_PATH descriptors of inodes, within a budget (docs/architecture.md, "Inodes and handles")."""

from libc.stdint cimport uint32_t, uint64_t

from vfsd.sys._syscalls cimport statx_t
from vfsd.hostfs.table._slots cimport inode_t, load_acquire_u64, load_relaxed_u8, store_relaxed_u8, tables_t

cdef enum:
    EVICT_BATCH = 16  # anchors closed at a time, so that the search is paid once for several

# The anchor of a referenced inode, re-opened when evicted, or -errno. Valid until inode_put.
cdef int inode_fd(tables_t *t, uint32_t index) noexcept nogil
# Whether fd is still the inode that was evicted, and no other one with its number.
cdef bint is_same(tables_t *t, const inode_t *inode, int fd) noexcept nogil
# The known inode of a name below a directory's descriptor, referenced and its anchor open if it is still
# there: *index, 0 for none. 0, or -ENFILE or -ENOMEM: it can't be opened now.
cdef int inode_pin_name(tables_t *t, int parent, const char *name, uint32_t *index) noexcept nogil
# After an operation came to ESTALE: let go of the number of a referenced inode if its file system says that it is
# stale. The next LOOKUP that finds that number is of another inode.
cdef void let_go_if_stale(tables_t *t, uint32_t index) noexcept nogil
cdef void inode_was_stale(void *fs, uint64_t nodeid) noexcept nogil
# The path of an inode, to which fd leads, as the kernel knows it now, into PATH_BYTES. False: it has been removed, is
# mounted over or on a mount that was taken away, or lies outside of the daemon's root.
cdef bint place_of(tables_t *t, const inode_t *inode, int fd, char *path) noexcept nogil
# When an inode was made, in one number; 0 where the file system does not know.
cdef uint64_t birth_of(const statx_t *st) noexcept nogil
# Try to close up to n anchors that nobody uses. The number closed.
cdef int evict(tables_t *t, int n) noexcept nogil
# Whether it is worth trying the system call that failed with this errno once more.
cdef bint out_of_descriptors(tables_t *t, int error) noexcept nogil


cdef inline void make_room(tables_t *t) noexcept nogil:
    """Before one more descriptor: stay within the budget, as far as anchors can be evicted."""
    if load_acquire_u64(&t.n_anchors) + load_acquire_u64(&t.n_descriptors) >= t.evict_at:
        evict(t, EVICT_BATCH)


cdef inline void note_used(inode_t *inode) noexcept nogil:
    """The evictor's hand passes once more before it takes the anchor."""
    if load_relaxed_u8(&inode.used) == 0:
        store_relaxed_u8(&inode.used, 1)
