"""Anchors: the O_PATH descriptors of inodes, within a budget (docs/architecture.md, "Inodes and handles")."""

from libc.stdint cimport uint32_t

from vfsd.hostfs._slots cimport tables_t

cdef enum:
    EVICT_BATCH = 16  # anchors closed at a time, so that the search is paid once for several

# Once the root has its anchor: see whether file handles work in its mount.
cdef void note_root(tables_t *t) noexcept nogil
# The anchor of a referenced inode, re-opened when evicted, or -errno. Valid until inode_put.
cdef int inode_fd(tables_t *t, uint32_t index) noexcept nogil
# Try to close up to n anchors that nobody uses. The number closed.
cdef int evict(tables_t *t, int n) noexcept nogil
# Whether it is worth trying the system call that failed with this errno once more.
cdef bint out_of_descriptors(tables_t *t, int error) noexcept nogil
