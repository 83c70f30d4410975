"""Inodes and open handles of one guest: flat tables without pointers, indexed by what the guest holds.

A nodeid or fh is (generation << 32) | index, so one that has been given back is never mistaken
for the slot's next user. Whoever works with a slot holds a reference (`inode_get`, `handle_get`):
it keeps the descriptor open while another queue forgets or releases, so a guest that lies can
never make an operation reach a descriptor that has become something else.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vfsd._wire cimport fuse_attr, fuse_attr_out, fuse_entry_out
from vfsd.hostfs._host cimport pthread_mutex_t, statx_t

cdef enum:
    INODES_MAX = 1 << 24       # slots; address space is reserved, memory comes with use
    HANDLES_MAX = 1 << 20
    BUCKETS = 1 << 18
    SHARDS = 64                # locks over the buckets
    MOUNTS_MAX = 256
    HANDLE_BYTES_MAX = 64      # room for a host file handle; larger ones are not evicted


cdef struct inode_t:           # 128 bytes
    uint64_t state             # generation << 32 | BUSY | references; a looked-up inode holds one
    uint64_t dev
    uint64_t ino
    uint64_t mnt_id
    uint64_t nlookup           # under the shard's lock
    uint32_t next              # hash chain, or free list
    int fd                     # O_PATH anchor, -1 while evicted
    uint32_t mode              # S_IFMT bits
    uint32_t mount             # index of the mount its file handle is opened in
    int used                   # touched since the evictor's hand passed
    uint16_t handle_type
    uint16_t handle_bytes
    uint8_t handle[HANDLE_BYTES_MAX]


cdef struct handle_t:          # 16 bytes
    uint64_t state             # generation << 32 | OPEN | references; an open handle holds one
    int fd
    uint32_t next


cdef struct mount_t:
    uint64_t mnt_id
    int fd                     # readable descriptor for open_by_handle_at; -1: handles don't work there


cdef struct tables_t:
    inode_t *inodes
    handle_t *handles
    uint32_t *buckets          # index of the first inode, 0 = none
    uint32_t inodes_top        # slots ever used
    uint32_t inodes_free       # head of the free list, 0 = empty
    uint32_t handles_top
    uint32_t handles_free
    uint64_t n_inodes
    uint64_t n_handles
    uint64_t n_anchors         # O_PATH descriptors held
    uint64_t anchors_max
    uint64_t evicted           # anchors closed to stay within the budget
    uint32_t hand              # of the evictor
    mount_t mounts[MOUNTS_MAX]
    uint32_t n_mounts
    uint64_t entry_valid
    uint64_t attr_valid
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec
    pthread_mutex_t shard[SHARDS]
    pthread_mutex_t alloc      # free lists, tops
    pthread_mutex_t evict      # hand, mounts


# Index of the inode, referenced, or -ESTALE.
cdef int64_t inode_get(tables_t *t, uint64_t nodeid) noexcept nogil
cdef void inode_put(tables_t *t, uint32_t index) noexcept nogil
# The anchor of a referenced inode, re-opened when evicted, or -errno. Valid until inode_put.
cdef int inode_fd(tables_t *t, uint32_t index) noexcept nogil
# Take n from the lookup count; the inode goes with the last.
cdef void inode_forget(tables_t *t, uint64_t nodeid, uint64_t n) noexcept nogil
# The entry of a checked name; adds one to its lookup count. 0 or -errno.
cdef int lookup(tables_t *t, uint64_t parent, const char *name, fuse_entry_out *out) noexcept nogil

# Index of the handle, referenced, its descriptor in *fd; or -EBADF.
cdef int64_t handle_get(tables_t *t, uint64_t fh, int *fd) noexcept nogil
cdef void handle_put(tables_t *t, uint32_t index) noexcept nogil
# Own fd as a new open handle: *fh. 0 or -ENFILE (fd stays the caller's).
cdef int handle_open(tables_t *t, int fd, uint64_t *fh) noexcept nogil
# Give the handle up; its descriptor is closed with the last reference. 0 or -EBADF.
cdef int handle_release(tables_t *t, uint64_t fh) noexcept nogil

cdef void attr_fill(const statx_t *st, fuse_attr *attr) noexcept nogil
# Attributes of a descriptor; fills in the timeout. 0 or -errno.
cdef int attr_of(tables_t *t, int fd, fuse_attr_out *out) noexcept nogil
# Try to close up to n anchors that nobody uses. The number closed.
cdef int evict(tables_t *t, int n) noexcept nogil


cdef class Tables:
    cdef tables_t t

    cdef int set_root(self, int root_fd) except -1
