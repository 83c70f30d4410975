"""Open files and directories, by the fh the guest holds."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vfsd.hostfs.table._slots cimport tables_t

# Index of the handle, referenced, its descriptor in *fd; or -EBADF.
cdef int64_t handle_get(tables_t *t, uint64_t fh, int *fd) noexcept nogil
cdef void handle_put(tables_t *t, uint32_t index) noexcept nogil
# A place within the guest's budget for one descriptor beside its anchors, before it is opened or a file is
# made: 0, or -ENFILE when it has as many as it may.
cdef int descriptor_take(tables_t *t) noexcept nogil
# Give such a place back: the descriptor has been closed, or there is none.
cdef void descriptor_put(tables_t *t) noexcept nogil
# Own fd, and the place taken for it, as a new open handle of an inode: its fh. flags: as handle_t has them.
# writable: fd is, so that the host can't execute the file. noted: where its fh stands before the guest can have
# it, NULL: nowhere.
cdef uint64_t handle_open(tables_t *t, int fd, uint32_t inode, int flags, bint writable, uint64_t *noted) noexcept nogil
# Own fd, and the place taken for it, as the second descriptor of a referenced handle: that, another one if a
# thread was faster.
cdef int handle_other(tables_t *t, uint32_t index, int fd) noexcept nogil
# The next handle after that index which was opened on an inode, referenced, its descriptor in *fd; or
# -EBADF. A slot may have had several inodes: compare.
cdef int64_t handle_next(tables_t *t, uint32_t inode, uint32_t after, int *fd) noexcept nogil
# Of a file that the guest reads without having opened it (fh 0): as handle_get, if it is open.
cdef int64_t unopened_get(tables_t *t, uint64_t nodeid, int *fd) noexcept nogil
# Keep fh for it, in the place of another.
cdef void unopened_keep(tables_t *t, uint64_t nodeid, uint64_t fh) noexcept nogil
# Close it: the guest has forgotten the inode.
cdef void unopened_drop(tables_t *t, uint64_t nodeid) noexcept nogil
# Give the handle up: -EBADF, or whether it was writable, 0 or 1. *fd: its descriptor, the caller's to
# close; -1 while another queue works with it, which closes it then.
cdef int handle_release(tables_t *t, uint64_t fh, int *fd) noexcept nogil
# The same, closed at once; nothing when there is none.
cdef void handle_close(tables_t *t, uint64_t fh) noexcept nogil
