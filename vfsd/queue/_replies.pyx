"""What a queue gives back: the used element, its counters, the call."""

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint64_t

from vfsd.queue._state cimport queue_t

__all__ = ()

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void count_u64(uint64_t *p, uint64_t v)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
    short POLLOUT

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void *data, size_t n, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t n)

cdef enum:
    CHANNEL_POLL_MS = 50


cdef void call_guest(queue_t *q) noexcept nogil:
    if q.call_fd < 0:
        return
    count_u64(&q.calls, 1)
    q.owes_call = False
    # A full socket or counter means that the front end has calls to read: none is lost.
    if not q.call_is_socket:
        if not q.call_may_block or writable(q.call_fd, 0):
            c_write(q.call_fd, q.call_bytes, q.call_len)
    elif q.call_len == sizeof(uint64_t):
        send(q.call_fd, q.call_bytes, q.call_len, MSG_NOSIGNAL | MSG_DONTWAIT)
    else:
        # A whole message on the back-end channel: it must not be lost. Nor may it keep the control
        # thread waiting, so it is tried again once the gate is open.
        while send(q.call_fd, q.call_bytes, q.call_len, MSG_NOSIGNAL | MSG_DONTWAIT) < 0:
            if errno != EAGAIN:
                return
            if load_acquire_int(&q.stop) or load_acquire_int(&q.pauses):
                q.owes_call = True
                return
            writable(q.call_fd, CHANNEL_POLL_MS)


cdef bint writable(int fd, int timeout_ms) noexcept nogil:
    cdef pollfd p
    p.fd = fd
    p.events = POLLOUT
    return poll(&p, 1, timeout_ms) == 1
