"""A queue's descriptors: the front end's, and our own."""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

__all__ = ()

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    uint64_t add_u64(uint64_t *p, uint64_t v)

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
    short POLLOUT

cdef extern from "<sys/epoll.h>" nogil:
    struct epoll_event:
        uint32_t events
        uint64_t u64 "data.u64"
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int n, int timeout)
    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    int EPOLL_CTL_DEL
    int EPOLL_CTL_MOD
    unsigned int EPOLLIN
    unsigned int EPOLLET

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void *data, size_t n, int flags)
    ssize_t send(int fd, const void *data, size_t n, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t n)
    int c_close "close"(int fd)
    int dup3(int oldfd, int newfd, int flags)

cdef enum:
    WAKE = 0
    KICK = 1
    CHANNEL_POLL_MS = 50
    DRAIN_BYTES = 256
    DRAINS_MAX = 16     # then the ring is looked at, and whether to stop

cdef uint64_t ONE = 1


cdef int watch(notify_t *n, int how, int fd, int what) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLET
    event.u64 = what
    return epoll_ctl(n.epoll_fd, how, fd, &event)


cdef bint notify_init(notify_t *n) noexcept nogil:
    cdef int kind
    memset(n, 0, sizeof(notify_t))
    n.kick_fd = n.err_fd = -1
    for kind in range(CALL_KINDS):
        n.call_fds[kind] = -1
    n.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    n.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    return n.wake_fd >= 0 and n.epoll_fd >= 0 and watch(n, EPOLL_CTL_ADD, n.wake_fd, WAKE) == 0


cdef void close_fd(int fd) noexcept nogil:
    if fd >= 0:
        c_close(fd)


cdef void notify_free(notify_t *n) noexcept nogil:
    cdef int kind
    for kind in range(CALL_KINDS):
        close_fd(n.call_fds[kind])
    close_fd(n.kick_fd)
    close_fd(n.err_fd)
    close_fd(n.wake_fd)
    close_fd(n.epoll_fd)


cdef int put_at(notify_t *n, int *at, int fd) noexcept nogil:
    """Have this number stand for that file from now on, for none that anybody minds if fd is -1."""
    cdef int rc = 0
    if at[0] < 0:
        at[0] = fd
    elif fd < 0:
        rc = dup3(n.wake_fd, at[0], O_CLOEXEC)
    else:
        rc = dup3(fd, at[0], O_CLOEXEC)
        c_close(fd)
    return -1 if rc < 0 else 0


cdef int notify_set_kick(notify_t *n, int fd, bint is_socket) noexcept nogil:
    if n.kick_watched:
        epoll_ctl(n.epoll_fd, EPOLL_CTL_DEL, n.kick_fd, NULL)
        n.kick_watched = False
    if put_at(n, &n.kick_fd, fd) < 0:
        return -1
    store_release_int(&n.kick_is_socket, is_socket)
    if fd >= 0:
        if watch(n, EPOLL_CTL_ADD, n.kick_fd, KICK) < 0:
            return -1
        n.kick_watched = True
    notify_wake(n)  # a kick by the last one may not have been seen
    return 0


cdef int notify_set_call(notify_t *n, int fd, int kind, const char *message, uint32_t n_message) noexcept nogil:
    cdef int last = n.call_kind
    if kind == CALL_CHANNEL:
        memcpy(n.message, message, n_message)
        n.message_bytes = n_message
    if kind != CALL_NONE and put_at(n, &n.call_fds[kind], fd) < 0:
        return -1
    store_release_int(&n.call_kind, kind)
    if last != kind and last != CALL_NONE:
        return put_at(n, &n.call_fds[last], -1)
    return 0


cdef int notify_set_err(notify_t *n, int fd) noexcept nogil:
    store_release_int(&n.err_set, 0)
    if put_at(n, &n.err_fd, fd) < 0:
        return -1
    store_release_int(&n.err_set, fd >= 0)
    return 0


cdef void notify_wake(notify_t *n) noexcept nogil:
    c_write(n.wake_fd, &ONE, sizeof(ONE))


cdef void notify_wait(notify_t *n) noexcept nogil:
    cdef epoll_event events[2]
    cdef int i, found = epoll_wait(n.epoll_fd, events, 2, -1)
    for i in range(found):
        if events[i].u64 == KICK:
            add_u64(&n.kicks, 1)
            # Edge triggered: an eventfd need not be read, a socket would fill up.
            if load_acquire_int(&n.kick_is_socket):
                drain(n)


cdef void drain(notify_t *n) noexcept nogil:
    """Read what there is, but no more than that: somebody may write all the time."""
    cdef char bytes[DRAIN_BYTES]
    cdef int left = DRAINS_MAX
    while left:
        left -= 1
        if recv(n.kick_fd, bytes, sizeof(bytes), MSG_DONTWAIT) < <ssize_t>sizeof(bytes):
            return
    watch(n, EPOLL_CTL_MOD, n.kick_fd, KICK)  # reports the rest once more


cdef bint writable(int fd, int timeout_ms) noexcept nogil:
    cdef pollfd p
    p.fd = fd
    p.events = POLLOUT
    return poll(&p, 1, timeout_ms) == 1


cdef void notify_call(notify_t *n, const int *stop) noexcept nogil:
    """A full socket or counter means that the front end has calls to read: none is lost.

    Whether an eventfd blocks is up to whoever else has it, at any time. A thread that is caught in the write
    is like one caught in a request: the ring is stopped without it.
    """
    cdef int kind = load_acquire_int(&n.call_kind)
    if kind == CALL_NONE:
        return
    add_u64(&n.calls, 1)
    if kind == CALL_CHANNEL:
        call_by_message(n, stop)
    elif kind == CALL_SOCKET:
        send(n.call_fds[kind], &ONE, sizeof(ONE), MSG_NOSIGNAL | MSG_DONTWAIT)
    elif kind == CALL_EVENTFD or writable(n.call_fds[kind], 0):
        c_write(n.call_fds[kind], &ONE, sizeof(ONE))


cdef void call_by_message(notify_t *n, const int *stop) noexcept nogil:
    """It must not be lost: the channel has other messages to be read as well."""
    store_release_int(&n.call_owed, 0)
    while load_acquire_int(&n.call_kind) == CALL_CHANNEL:
        if send(n.call_fds[CALL_CHANNEL], n.message, n.message_bytes, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0:
            return
        if errno != EAGAIN and errno != EINTR:
            return
        if load_acquire_int(stop):
            store_release_int(&n.call_owed, 1)
            return
        writable(n.call_fds[CALL_CHANNEL], CHANNEL_POLL_MS)


cdef void notify_error(notify_t *n) noexcept nogil:
    if load_acquire_int(&n.err_set) and writable(n.err_fd, 0):
        c_write(n.err_fd, &ONE, sizeof(ONE))
