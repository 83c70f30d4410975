"""Inodes by nodeid and by identity: references, lookup counts."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vfsd.sys._threads cimport pthread_mutex_t
from vfsd.sys._syscalls cimport statx_t
from vfsd.hostfs.table._slots cimport inode_t, note_t, tables_t

# Index of the inode, referenced, or -ESTALE.
cdef int64_t inode_get(tables_t *t, uint64_t nodeid) noexcept nogil
# For dispatch_t.file_system_of: by st_dev. fs: tables_t. Takes any number and no reference.
cdef uint32_t inode_file_system(void *fs, uint64_t nodeid) noexcept nogil
cdef void inode_put(tables_t *t, uint32_t index) noexcept nogil
# The slot of that identity, referenced and with one more lookup; 0 when there is none.
cdef uint32_t find(tables_t *t, const statx_t *st) noexcept nogil
# The nodeid of that identity, 0 when there is none. Takes no reference.
cdef uint64_t find_nodeid(tables_t *t, const statx_t *st) noexcept nogil
# Whether an inode of that identity is known and has its anchor, now. Takes no reference.
cdef bint is_anchored(tables_t *t, uint64_t dev, uint64_t ino, uint64_t mnt_id) noexcept nogil
# The slot of that identity as find() gives it, or else a new one whose anchor is fd: its `fd` tells
# which. 0: the table is full. note: NULL, or with fd -1 what brings a new one's anchor back; *note is empty
# afterwards if it was used.
cdef uint32_t insert(tables_t *t, int fd, const statx_t *st, note_t *note) noexcept nogil
# Before something is made: whether it and what all other threads make now have room in the table.
cdef bint room_for_inode(tables_t *t) noexcept nogil
# The lock over the lookup count of that inode, and over finding it.
cdef pthread_mutex_t *lock_of(tables_t *t, const inode_t *inode) noexcept nogil
# Nobody shall find this slot by its identity any more.
cdef void unhash(tables_t *t, uint32_t index) noexcept nogil
# Own fd as the anchor of a referenced inode that has none: the anchor, another one if a thread was faster.
cdef int anchor_set(tables_t *t, uint32_t index, int fd) noexcept nogil
# Close the anchor of an inode that the caller has for itself.
cdef void anchor_close(tables_t *t, uint32_t index) noexcept nogil
# Take n lookups from a referenced inode; their own reference goes with the last.
cdef void drop_lookups(tables_t *t, uint32_t index, uint64_t n) noexcept nogil
# Take n from the lookup count; the inode goes with the last.
cdef void inode_forget(tables_t *t, uint64_t nodeid, uint64_t n) noexcept nogil

# What of statx(2) identifies an inode and fills its attributes.
cdef unsigned int ATTR_MASK

cdef inline uint64_t device_of(const statx_t *st) noexcept nogil:
    return (<uint64_t>st.stx_dev_major << 32) | st.stx_dev_minor


cdef inline bint is_inode(const inode_t *inode, const statx_t *st) noexcept nogil:
    return inode.ino == st.stx_ino and inode.dev == device_of(st) and inode.mnt_id == st.stx_mnt_id


cdef inline uint32_t bucket_of(uint64_t dev, uint64_t ino, uint64_t mnt_id) noexcept nogil:
    """Of the hash table of identities."""
    cdef uint64_t x = (ino ^ (dev << 17) ^ (mnt_id << 41)) * 0x9E3779B97F4A7C15ULL
    return <uint32_t>(x >> 46)
