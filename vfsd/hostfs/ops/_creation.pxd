"""Making names and files as the caller, with the security label the guest sends.

Where SELinux rules the host and the label is SELinux's own, the host's kernel labels what it makes. Else
a regular file gets its label before its name, where the file system makes files without names. Anything
else is labelled right after it was made.
"""

from libc.stdint cimport uint32_t

from vfsd.hostfs.ids._credentials cimport creator_t
from vfsd.hostfs.table._slots cimport tables_t

# How a new name is made: the system call's result.
ctypedef int (*make_t)(int parent, const char *name, const void *what) noexcept nogil

# Make a name by that call: 0 or -errno, and then it is not there.
cdef int make_name(tables_t *t, const creator_t *c, int parent, const char *name, make_t call,
                   const void *what) noexcept nogil
# Label what was just made: 0, or -errno and it is gone again. fd: open for it if it is a file, else -1. name: NULL
# if it has none.
cdef int label_made(tables_t *t, const creator_t *c, int parent, const char *name, int fd) noexcept nogil
# Make and open a regular file that must not be there: a descriptor or -errno. flags: of open(2), without O_CREAT.
cdef int make_file(tables_t *t, const creator_t *c, int parent, const char *name, int flags,
                   uint32_t mode) noexcept nogil
# Remove again what has been made and is open as fd, if the name is still its.
cdef void unmake(int parent, const char *name, int fd) noexcept nogil
# The same as make_file without a name, in the directory `parent`. O_EXCL: it never gets one.
cdef int make_nameless(tables_t *t, const creator_t *c, int parent, int flags, uint32_t mode) noexcept nogil
