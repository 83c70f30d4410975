"""The locks of a share's guests, to those who take, test and end them (structures: `_holds`)."""

from libc.stdint cimport uint64_t

from vfsd.fuse.dispatch cimport parked_t
from vfsd.hostfs.lock._holds cimport locks_t, want_t
from vfsd.hostfs.table._slots cimport tables_t

# Take or give up a lock: 0, -EAGAIN, or another -errno. waits: WOULD_WAIT in place of -EAGAIN, and
# with `parked` WAITS; it is completed later, by any thread. -EDEADLK: it would wait for itself.
cdef int lock_set(want_t *w, bint waits, parked_t *parked) noexcept nogil
# What stands against a POSIX lock, in w; type F_UNLCK when nothing does. 0 or -errno.
cdef int lock_test(want_t *w) noexcept nogil
# FLUSH: the owner's POSIX locks on the file end, and its waits through this handle.
cdef void locks_flush(tables_t *guest, uint64_t fh, int fd, uint64_t owner) noexcept nogil
# INTERRUPT: the request of that number waits no more.
cdef void locks_interrupt(tables_t *guest, uint64_t unique) noexcept nogil
# RELEASE of fh: its flock ends, the locks that its file owns, and every wait through it. fd: its
# descriptor, still open; -1 while somebody uses it.
cdef void locks_release(tables_t *guest, uint64_t fh, int fd) noexcept nogil
# The guest has gone: everything of its ends.
cdef void locks_drop(tables_t *guest) noexcept nogil


cdef class Locks:
    cdef locks_t l
    cdef readonly object segment
    cdef object thread
