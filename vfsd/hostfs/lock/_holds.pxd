"""The locks that guests hold on the files of one share, and the requests that wait for one.

Two kinds of owners, each a lock owner of the host's own, so that the host's processes take part:

- an open file of a guest, for flock: flock(2) on its handle's descriptor;
- a process of a guest and a file, for POSIX locks: open file description locks (F_OFD_SETLK of
  fcntl(2)) on a descriptor opened for the two, closed with the last lock.

The table mirrors what was granted, because the host tells neither who stands in the way nor when
that ends: conflicts between guests, who waits for whom, and whom to try again are answered here.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from vfsd.hostfs.lock._published cimport published_t
from vfsd.sys._threads cimport pthread_cond_t, pthread_mutex_t
from vfsd.fuse.dispatch cimport parked_t
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.table._slots cimport tables_t

cdef enum:
    BUCKETS = 1024
    RANGES_MAX = 16384  # a guest's; then ENOLCK. Conflicts are searched one by one, as Linux does

cdef extern from *:
    """
    #define VFSD_OFFSET_MAX INT64_MAX
    """
    uint64_t OFFSET_MAX "VFSD_OFFSET_MAX"  # end of a lock that has none


# A locked part of a file, both ends included.
cdef struct range_t:
    uint64_t start
    uint64_t end
    int type            # F_RDLCK, F_WRLCK
    uint32_t pid        # as the guest numbers it
    range_t *next       # by start, apart from each other


# What owns locks: (guest, number, kind). Exists while it holds some or waits.
cdef struct owner_t:
    tables_t *guest
    uint64_t number     # POSIX: lock_owner of the request; flock: fh
    bint flock
    uint32_t users      # hold_t and waiter_t that refer to it
    hold_t *holds       # flock: one at most
    waiter_t *waiters
    uint32_t id         # among the server's, as others know it
    uint16_t rows       # published: what it holds, while it waits (_published.pxd)
    uint64_t visited    # the last search that came here
    owner_t *to_visit
    owner_t *next       # in the bucket


# What one owner holds on one file.
cdef struct hold_t:
    owner_t *owner
    file_t *file
    range_t *ranges     # never empty between calls; flock has one over the whole file
    int fd              # the lock owner of the host's: our own, or the handle's
    bint reads_only     # fd can't take F_WRLCK
    int64_t handle      # flock: the handle, referenced; else -1
    uint64_t through    # POSIX: the fh its last lock was asked for with
    hold_t *next        # of the file
    hold_t *same_owner


# By identity on the host: two guests, and two nodeids of one, mean the same file.
cdef struct file_t:
    uint64_t dev
    uint64_t ino
    hold_t *holds
    uint32_t waiters
    uint64_t weakened   # locks_t.changes when one of its locks was last given up or became weaker
    file_t *next        # in the bucket


# One GETLK, SETLK or SETLKW.
cdef struct want_t:
    tables_t *guest
    uint64_t unique     # of the request
    uint64_t fh
    uint64_t number     # of the owner
    uint64_t start
    uint64_t end
    int type            # F_RDLCK, F_WRLCK, F_UNLCK
    uint32_t pid
    bint flock
    uint64_t dev        # the file's identity, see file_t
    uint64_t ino
    int fd              # of fh, which is referenced
    bint reads_only     # fh's
    bint by_host        # outcome of a refusal: nobody of ours stands against it


cdef struct waiter_t:
    want_t want
    file_t *file
    owner_t *owner
    int64_t handle      # keeps want.fd open
    parked_t *parked
    waiter_t *previous  # of all, in the order they came
    waiter_t *next
    waiter_t *same_owner
    uint16_t row        # published
    uint64_t since      # CLOCK_MONOTONIC
    bint suspect        # it was part of a deadlock with other servers' guests when it was last tried


cdef struct locks_t:
    pthread_mutex_t lock     # everything below, and what hangs on it
    pthread_cond_t changed   # the waking thread: there is something to try again
    file_t *files[BUCKETS]
    owner_t *owners[BUCKETS]
    waiter_t *first
    waiter_t *last
    waiter_t *cursor         # of the waking thread, while it lets others in
    uint64_t changes         # locks given up or weakened so far
    uint64_t tried           # changes when the last pass over the waiters began
    bint by_host             # a waiter has only the host against it: try again after retry_ns
    bint asleep              # the waking thread is, until published.changes does or retry_ns are over
    published_t published
    uint32_t seen_changes    # published.changes when the last pass began
    uint64_t last_pass       # CLOCK_MONOTONIC
    uint32_t owner_ids
    uint64_t retry_ns
    uint64_t visit           # searches for a deadlock so far
    uint64_t n_waiters
    uint64_t n_holds
    bint stop


# All of these under locks_t.lock, but for the first two.

# Which file w.fd stands for: 0 or -errno.
cdef int identify(want_t *w) noexcept nogil
cdef void as_host(const want_t *w, h.flock_t *fl) noexcept nogil
# NULL when nobody has locks on it, or without memory.
cdef file_t *file_of(locks_t *l, const want_t *w, bint make) noexcept nogil
cdef owner_t *owner_of(locks_t *l, const want_t *w, bint make) noexcept nogil
# What the owner has on the file, or NULL; either may be NULL.
cdef hold_t *hold_of(file_t *file, const owner_t *owner) noexcept nogil
# Forget a file or an owner without holds and waiters.
cdef void drop_file(locks_t *l, file_t *file) noexcept nogil
cdef void drop_owner(locks_t *l, owner_t *owner) noexcept nogil
# The waking thread shall look. Under the lock, as all of these.
cdef void wake_waker(locks_t *l) noexcept nogil
# An owner that waits holds something else than before: tell other servers.
cdef void publish_holds(locks_t *l, owner_t *owner) noexcept nogil
cdef void withdraw_holds(locks_t *l, owner_t *owner) noexcept nogil
# Give up all an owner has on a file.
cdef void drop_hold(locks_t *l, hold_t *hold) noexcept nogil
# A lock of another owner of ours that stands against it, or NULL.
cdef range_t *conflict(file_t *file, const owner_t *owner, const want_t *w, hold_t **by) noexcept nogil
# A lock that a server had taken by that descriptor which has died, and that the host says is held: 0, or -errno and
# it has no owner any more.
cdef int regain(locks_t *l, tables_t *guest, int fd, int type, uint64_t start, uint64_t end) noexcept nogil
# Take or give it up now: 0, -EAGAIN somebody stands against it, or another -errno.
cdef int attempt(locks_t *l, file_t *file, owner_t *owner, want_t *w) noexcept nogil
