"""Inodes: references, identity, lookup counts, attributes."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vfsd._wire cimport fuse_attr, fuse_attr_out, fuse_entry_out
from vfsd.hostfs._host cimport statx_t
from vfsd.hostfs._slots cimport tables_t

# Index of the inode, referenced, or -ESTALE.
cdef int64_t inode_get(tables_t *t, uint64_t nodeid) noexcept nogil
cdef void inode_put(tables_t *t, uint32_t index) noexcept nogil
# The known inode of a name below a directory's descriptor, referenced and its anchor open; 0: none.
cdef uint32_t inode_hold(tables_t *t, int parent, const char *name) noexcept nogil
# Take n from the lookup count; the inode goes with the last.
cdef void inode_forget(tables_t *t, uint64_t nodeid, uint64_t n) noexcept nogil
# The entry of a checked name below a directory's descriptor; adds one to its lookup count. fresh:
# nobody is likely to know the inode yet, so open it first and ask then. Whether that was so, 0 or 1,
# or -errno.
cdef int entry_at(tables_t *t, int parent, const char *name, bint fresh, fuse_entry_out *out) noexcept nogil
# The entry of a file that may have no name, by the name of its descriptor below t.proc_fd; adds one
# to its lookup count. 0 or -errno.
cdef int entry_of_open(tables_t *t, const char *fd_name, fuse_entry_out *out) noexcept nogil
# The same as entry_at below a nodeid.
cdef int lookup(tables_t *t, uint64_t parent, const char *name, fuse_entry_out *out) noexcept nogil

cdef void attr_fill(const tables_t *t, const statx_t *st, fuse_attr *attr) noexcept nogil
# Attributes of a descriptor; fills in the timeout. 0 or -errno.
cdef int attr_of(tables_t *t, int fd, fuse_attr_out *out) noexcept nogil

# What of statx(2) identifies an inode and fills its attributes.
cdef unsigned int ATTR_MASK

cdef inline uint64_t device_of(const statx_t *st) noexcept nogil:
    return (<uint64_t>st.stx_dev_major << 32) | st.stx_dev_minor
