"""Requests that are done again, because the server that had begun them has died: it may have done them.

What it was asked for is then there: a name that was made after the request began, or one that is gone. Files tell
that by their times, which have the clock's ticks: a name that somebody else has made within the same one is
taken for the request's own.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vfsd.fuse.dispatch cimport request_t
from vfsd.hostfs.table._slots cimport tables_t
from vfsd.state._journal cimport FAIL_BEGUN, reach
from vfsd.sys cimport _syscalls as h

cdef enum:
    COMPARED_BYTES = 4096

cdef enum:
    BEGAN      # of record_t.witness: ns of CLOCK_REALTIME_COARSE, which is what files are given
    WITNESSED  # the operation's own


cdef inline uint64_t as_ns(int64_t seconds, uint64_t nanoseconds) noexcept nogil:
    return <uint64_t>seconds * 1000000000 + nanoseconds


cdef inline void note_begin(request_t *r) noexcept nogil:
    """Before something is done that must not be done twice."""
    cdef h.timespec now
    if r.record != NULL and not r.again:
        h.clock_gettime(h.CLOCK_REALTIME_COARSE, &now)
        r.record.witness[BEGAN] = as_ns(now.tv_sec, now.tv_nsec)
    reach(r.dispatch.failpoint, FAIL_BEGUN, r.header.opcode)


cdef inline bint was_begun(const request_t *r) noexcept nogil:
    return r.again and r.record.witness[BEGAN] != 0


cdef inline bint look(int parent, const char *name, h.statx_t *st) noexcept nogil:
    cdef unsigned int mask = h.STATX_INO | h.STATX_TYPE | h.STATX_CTIME | h.STATX_BTIME
    return h.statx(parent, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, mask, st) == 0


cdef inline uint64_t changed_at(const h.statx_t *st) noexcept nogil:
    return as_ns(st.stx_ctime.tv_sec, st.stx_ctime.tv_nsec)


cdef inline uint64_t born_at(const h.statx_t *st) noexcept nogil:
    """When it was made, at the latest."""
    if st.stx_mask & h.STATX_BTIME:
        return as_ns(st.stx_btime.tv_sec, st.stx_btime.tv_nsec)
    return changed_at(st)


cdef inline bint was_made(const request_t *r, int parent, const char *name, uint32_t kind) noexcept nogil:
    """Whether a name that is there has been made by this request. kind: S_IFMT bits."""
    cdef h.statx_t st
    return (was_begun(r) and look(parent, name, &st) and st.stx_mode & h.S_IFMT == kind
            and born_at(&st) >= r.record.witness[BEGAN])


cdef inline bint was_linked(const request_t *r, int parent, const char *name, int fd) noexcept nogil:
    """The same of another name of that file."""
    cdef h.statx_t st, file
    return (was_begun(r) and look(parent, name, &st) and look_at_file(fd, &file) and is_one(&st, &file)
            and changed_at(&st) >= r.record.witness[BEGAN])


cdef inline bint look_at_file(int fd, h.statx_t *st) noexcept nogil:
    return h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_INO, st) == 0


cdef inline bint is_one(const h.statx_t *a, const h.statx_t *b) noexcept nogil:
    return a.stx_ino == b.stx_ino and a.stx_dev_major == b.stx_dev_major and a.stx_dev_minor == b.stx_dev_minor


cdef inline bint is_another(const request_t *r, int parent, const char *name) noexcept nogil:
    """Whether a name that this request was to take away has been made anew since: then it is not the one."""
    cdef h.statx_t st
    return (was_begun(r) and look(parent, name, &st) and st.stx_mask & h.STATX_BTIME
            and born_at(&st) > r.record.witness[BEGAN])


cdef inline void note_moved(request_t *r, int parent, const char *name) noexcept nogil:
    """Before an exchange, which leaves a name in both places."""
    cdef h.statx_t st
    if r.record != NULL and not r.again:
        r.record.witness[WITNESSED] = st.stx_ino if look(parent, name, &st) else 0


cdef inline bint was_exchanged(const request_t *r, int parent, const char *name) noexcept nogil:
    """Whether what note_moved saw has got that name."""
    cdef h.statx_t st
    return (was_begun(r) and r.record.witness[WITNESSED] != 0 and look(parent, name, &st)
            and st.stx_ino == r.record.witness[WITNESSED])


cdef inline bint was_moved(const request_t *r, int parent, const char *name) noexcept nogil:
    """Whether a name that is there has come by a rename of this request, whose old one is gone."""
    cdef h.statx_t st
    return was_begun(r) and look(parent, name, &st) and changed_at(&st) >= r.record.witness[BEGAN]


cdef inline bint was_appended(const tables_t *t, const request_t *r, int fd, int64_t end, uint64_t size) noexcept nogil:
    """Whether a file that the guest took to end there has grown by that much, by this request: what follows is
    what it was to write.
    """
    cdef char number[h.FD_BYTES]
    cdef int reading
    cdef bint found
    if not was_begun(r):
        return False
    # It may be open for writing alone.
    reading = h.openat(t.proc_fd, h.fd_name(fd, number), h.O_RDONLY | h.O_CLOEXEC | h.O_NONBLOCK)
    if reading < 0:
        return False
    found = has_written(r, reading, end, size)
    h.close(reading)
    return found


cdef inline bint has_written(const request_t *r, int fd, int64_t end, uint64_t size) noexcept nogil:
    """Whether a file has the request's data there."""
    cdef char found[COMPARED_BYTES]
    cdef uint64_t at = 0, i
    cdef uint32_t piece = 0, within = 0
    cdef ssize_t n
    while at < size:
        n = h.pread(fd, found, min(size - at, <uint64_t>COMPARED_BYTES), end + <int64_t>at)
        if n <= 0:
            return False
        for i in range(<uint64_t>n):
            while within == r.body.iov[piece].iov_len:
                piece += 1
                within = 0
            if (<const char *>r.body.iov[piece].iov_base)[within] != found[i]:
                return False
            within += 1
        at += n
    return True
