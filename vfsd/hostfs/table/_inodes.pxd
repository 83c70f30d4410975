"""Names to inodes, and their attributes."""

from libc.stdint cimport uint32_t, uint64_t

from vfsd.fuse._wire cimport fuse_attr, fuse_attr_out, fuse_entry_out
from vfsd.sys._syscalls cimport statx_t
from vfsd.hostfs.table._slots cimport place_t, tables_t

# What a walk to a name may do, where the share is on a disk.
cdef enum walk_t:
    WAIT         # the name is in the host's memory, or it does not matter
    CACHED_ONLY  # not wait for the disk: -EAGAIN if it would
    WAIT_COLD    # it has been found not to be in memory

# Whether to open a name first and ask what it is then, not the other way round: where its inode is likely to
# be new, or the name may have to be read from a disk, which only openat2(2) can tell beforehand. likely_new:
# as the last one found there was. in_memory: it led to what is anchored, or to nothing lately.
cdef bint opens_first(const tables_t *t, uint32_t directory, bint likely_new, bint in_memory) noexcept nogil
# The entry of a checked name in a directory; adds one to its lookup count. open_first: see opens_first.
# Whether its inode was new, 0 or 1, or -errno.
cdef int entry_at(tables_t *t, const place_t *parent, const char *name, bint open_first, walk_t walk,
                  fuse_entry_out *out) noexcept nogil
# The entry of a file that may have no name, by the name of its descriptor below t.proc_fd; adds one
# to its lookup count. 0 or -errno.
cdef int entry_of_open(tables_t *t, const char *fd_name, fuse_entry_out *out) noexcept nogil
# The same as entry_at: 0 or -errno. may_wait: for the disk, after an -EAGAIN without.
cdef int lookup(tables_t *t, const place_t *p, const char *name, bint may_wait,
                fuse_entry_out *out) noexcept nogil

# Whether the guest may keep these attributes for a while.
cdef bint attr_is_kept(const tables_t *t, const statx_t *st) noexcept nogil
cdef void attr_fill(const tables_t *t, const statx_t *st, fuse_attr *attr) noexcept nogil
# Attributes of a descriptor; fills in the timeout. 0 or -errno.
cdef int attr_of(tables_t *t, int fd, fuse_attr_out *out) noexcept nogil
