"""Requests with buffers in files that may end any time: what they work on is a copy."""

from libc.errno cimport EFAULT
from libc.stdint cimport int64_t, uint32_t, uint64_t

from vfsd.memory._regions cimport iovec
from vfsd.queue._replies cimport (
    NOT_ON_RING, begin_on_ring, complete_unanswered, count_request, end_on_ring, push,
)
from vfsd._ring cimport chain_t
from vfsd.queue._state cimport REQUEST_MAX, queue_t
from vfsd.fuse.dispatch cimport WAIT, request_parse, request_reply, request_run, request_t, span_t

from vfsd.fuse.opcodes import NUMBER as OPCODE_NUMBER

__all__ = ()

cdef extern from "<sys/mman.h>" nogil:
    int memfd_create(const char *name, unsigned int flags)
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, int64_t offset)
    int munmap(void *addr, size_t length)
    void *MAP_FAILED
    int MAP_SHARED
    int PROT_READ
    int PROT_WRITE
    unsigned int MFD_CLOEXEC

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *iov, int n, int64_t offset)
    ssize_t pwritev(int fd, const iovec *iov, int n, int64_t offset)

cdef extern from "<unistd.h>" nogil:
    int ftruncate(int fd, int64_t size)
    int c_close "close"(int fd)

cdef enum:
    IOV_MAX = 1024

cdef uint32_t READ = OPCODE_NUMBER["READ"]
cdef uint32_t WRITE = OPCODE_NUMBER["WRITE"]


cdef bint make_bounce(queue_t *q) noexcept nogil:
    if q.bounce == NULL:
        if q.bounce_fd < 0:
            q.bounce_fd = memfd_create(b"bounce", MFD_CLOEXEC)
        if q.bounce_fd < 0 or ftruncate(q.bounce_fd, 2 * REQUEST_MAX) < 0:
            return False
        q.bounce = <char *>mmap(NULL, 2 * REQUEST_MAX, PROT_READ | PROT_WRITE, MAP_SHARED, q.bounce_fd, 0)
        if <void *>q.bounce == MAP_FAILED:
            q.bounce = NULL
    return q.bounce != NULL


cdef void bounce_free(queue_t *q) noexcept nogil:
    if q.bounce != NULL:
        munmap(q.bounce, 2 * REQUEST_MAX)
    if q.bounce_fd >= 0:
        c_close(q.bounce_fd)


cdef uint64_t bounce_move(queue_t *q, const iovec *iov, uint32_t n, int64_t at, bint out) noexcept nogil:
    """By the kernel, to which a page that is not there is no signal but an end: bytes moved."""
    cdef uint64_t done = 0, asked
    cdef uint32_t i = 0, j, part
    cdef ssize_t moved
    while i < n:
        part = min(n - i, <uint32_t>IOV_MAX)
        asked = 0
        for j in range(part):
            asked += iov[i + j].iov_len
        if out:
            moved = preadv(q.bounce_fd, iov + i, part, at + <int64_t>done)
        else:
            moved = pwritev(q.bounce_fd, iov + i, part, at + <int64_t>done)
        if moved > 0:
            done += moved
        if moved < <ssize_t>asked:
            break
        i += part
    return done


cdef uint32_t bounce_reply(queue_t *q, chain_t *chain, request_t *r, int rc) noexcept nogil:
    """Write the reply to the guest: bytes, 0 if it can't be."""
    cdef uint32_t written = request_reply(r, rc), left = written, n = 0
    cdef size_t last
    if written == 0:
        return 0
    while chain.writable[n].iov_len < left:
        left -= <uint32_t>chain.writable[n].iov_len
        n += 1
    last = chain.writable[n].iov_len
    chain.writable[n].iov_len = left
    if bounce_move(q, chain.writable, n + 1, REQUEST_MAX, True) < written:
        written = 0
    chain.writable[n].iov_len = last
    return written


cdef void serve_bounced(queue_t *q, chain_t *chain) noexcept nogil:
    """One request with buffers in a file that may end any time: what it works on is a copy.

    Data alone lies there in an honest guest: O_DIRECT to or from what it has mapped.
    """
    cdef request_t r
    cdef span_t readable, writable
    cdef iovec body, reply
    cdef uint32_t written
    cdef int rc = -EFAULT, how
    body.iov_len = readable.bytes = 0
    if (make_bounce(q) and chain.readable_bytes <= REQUEST_MAX
            and chain.writable_bytes <= REQUEST_MAX):
        readable.bytes = bounce_move(q, chain.readable, chain.n_readable, 0, False)
    body.iov_base = q.bounce
    body.iov_len = readable.bytes
    reply.iov_base = q.bounce + REQUEST_MAX
    reply.iov_len = writable.bytes = chain.writable_bytes
    readable.iov = &body
    writable.iov = &reply
    readable.n = writable.n = 1
    if readable.bytes == 0 or not request_parse(q.dispatch, readable, writable, &r):
        complete_unanswered(q, chain.head)
        return
    if (readable.bytes == chain.readable_bytes and not chain.unmapped
            and (r.header.opcode == READ or r.header.opcode == WRITE)):
        r.mode = WAIT
        rc = request_run(q.dispatch, &r)
    how = begin_on_ring(q)
    if how == NOT_ON_RING:
        return
    written = bounce_reply(q, chain, &r, rc)
    if written == 0 and r.n_head:
        rc = -EFAULT
        written = bounce_reply(q, chain, &r, rc)
    count_request(q, &r, chain.readable_bytes, written, rc)
    push(q, chain.head, written, r.header.opcode)
    end_on_ring(q, how)
