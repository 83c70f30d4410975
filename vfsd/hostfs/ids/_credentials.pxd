"""Who makes a file, and what the thread that works is: its ids, capabilities, umask and directory.

All per thread, by raw system calls (libc's wrappers would change every thread), and left as the last
request needed it where the next one sets it anyway: what does not change costs no system call.
"""

from libc.stdint cimport uint32_t

from vfsd.fuse.dispatch cimport request_t
from vfsd.hostfs.table._slots cimport NAME_BYTES, tables_t

cdef enum:
    EXTENSIONS_MAX = 4096 + 512  # bytes: a security context (at most a page to the kernel) and the rest
    NO_ID = 0xffffffff  # FUSE_INVALID_UIDGID; "leave it alone" to system calls


cdef struct creator_t:
    uint32_t uid               # host's
    uint32_t gid
    uint32_t group             # the supplementary group that matters
    uint32_t umask
    bint has_group
    bint other_uid             # than the daemon's
    bint other_gid
    uint32_t context_bytes     # 0: no security context was sent
    const char *context        # in extensions
    char context_name[NAME_BYTES]  # of the host's attribute
    char extensions[EXTENSIONS_MAX]


# Who a creating request is from, with its extensions, which end the body: 0 or -errno. umask: what
# is to be taken from the mode if the directory has no default ACL.
cdef int creator_read(tables_t *t, request_t *r, uint32_t umask, creator_t *c) noexcept nogil
# Who another request is from, as far as the guest says (FUSE_ALLOW_IDMAP); else it is the daemon
# itself, and the guest has checked: 0 or -errno.
cdef int caller_read(tables_t *t, request_t *r, creator_t *c) noexcept nogil
# Be the caller, until unbecome: 0, or -errno and the thread is as it was.
cdef int become(tables_t *t, const creator_t *c) noexcept nogil
cdef void unbecome(tables_t *t, const creator_t *c) noexcept nogil
# Whether it is worth trying once more what failed with -EACCES: the guest has checked, and it alone
# knows all of the caller's groups.
cdef bint override(tables_t *t, const creator_t *c, int rc) noexcept nogil
# Whether this thread's changes of a file leave its set-id bits alone (CAP_FSETID): 0 or -errno.
cdef int keep_setid(tables_t *t, bint keep) noexcept nogil
# After a system call failed that gives a thread back what it was: returns when it is worth trying once
# more. A thread that went on as somebody else would work with the wrong rights: if it is not, this ends
# the process. tries: 0 before the first.
cdef void must_restore(int *tries) noexcept nogil
# Make /proc/self/fd this thread's directory, so that a descriptor's number is a path: 0 or -errno.
cdef int enter_proc(tables_t *t) noexcept nogil
