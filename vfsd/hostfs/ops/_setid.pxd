"""Set-id bits of a file that is changed: who takes them away, and which (linux/fuse.h, FUSE_HANDLE_KILLPRIV_V2)."""

from libc.stdint cimport uint32_t

from vfsd.hostfs.table._slots cimport tables_t

# Before a file's contents or size are changed: 0 or -errno. fd: of the file, or its anchor. kills: set-user-id
# goes with the change, and set-group-id where the group may execute the file.
cdef int before_change(tables_t *t, int fd, bint kills) noexcept nogil
# Set a file's permissions and set-id bits, by its descriptor or anchor: 0 or -errno.
cdef int set_mode(tables_t *t, int fd, uint32_t mode) noexcept nogil
