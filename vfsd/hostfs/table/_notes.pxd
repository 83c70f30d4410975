"""What brings evicted inodes back: the mounts whose file handles can be opened, and names."""

from libc.stdint cimport uint64_t

from vfsd.sys._syscalls cimport file_handle
from vfsd.hostfs.table._slots cimport HANDLE_BYTES_MAX, inode_t, note_t, tables_t

cdef extern from *:
    """
    /* struct file_handle with room for the bytes */
    struct vfsd_handle { unsigned int handle_bytes; int handle_type; unsigned char bytes[64]; };
    """
    struct vfsd_handle:
        unsigned int handle_bytes
        int handle_type
        unsigned char bytes[HANDLE_BYTES_MAX]

# The file handle of an open inode, of at most HANDLE_BYTES_MAX bytes. 0 or -errno.
cdef int handle_of(int fd, vfsd_handle *handle) noexcept nogil
# Whether inodes can be opened by file handle below the readable directory fd, also after the host has
# forgotten them.
cdef bint handles_work(int fd) noexcept nogil
# Once the root has its anchor: see whether file handles work in its mount.
cdef void note_root(tables_t *t) noexcept nogil
# Notes of a file handle, and of a name below a parent. False: it can't be noted.
cdef bint note_handle(tables_t *t, const inode_t *inode, note_t *note) noexcept nogil
cdef bint note_name(tables_t *t, uint64_t parent, uint64_t born, const char *name, size_t n,
                    note_t *note) noexcept nogil
# The name in a note of a name; valid as long as the note.
cdef const char *noted_name(tables_t *t, const note_t *note) noexcept nogil
# Give up what a note holds.
cdef void note_drop(tables_t *t, note_t *note) noexcept nogil
