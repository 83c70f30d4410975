"""A queue's descriptors: the front end's, by which it kicks, is called and is told of errors, and our own.

The front end changes its descriptors at any time, QEMU whenever a guest masks an interrupt. Nobody waits for
that: each has a number of its own, at which the next file takes the last one's place (dup3(2)). A thread in the
middle of a write has the file for as long as the write lasts, and the number never becomes another's.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    CALL_MESSAGE_MAX = 32  # bytes

cdef enum:
    CALL_NONE
    CALL_EVENTFD           # or a pipe: never blocks
    CALL_EVENTFD_BLOCKING  # could block: is asked first
    CALL_SOCKET
    CALL_CHANNEL           # a whole message on the back-end channel
    CALL_KINDS


cdef struct notify_t:
    int epoll_fd
    int wake_fd              # ours: stop, requests that are ready, new memory, in-band kicks
    int kick_fd              # -1: there has been none
    int kick_watched
    int kick_is_socket
    int call_kind            # by which of these the guest is called now
    int call_fds[CALL_KINDS]
    char message[CALL_MESSAGE_MAX]  # for CALL_CHANNEL, always the same
    uint32_t message_bytes
    int call_owed            # a call found the channel full when its queue had to stop
    int err_fd
    int err_set
    uint64_t kicks
    uint64_t calls


# False, errno: it can't be had.
cdef bint notify_init(notify_t *n) noexcept nogil
cdef void notify_free(notify_t *n) noexcept nogil
# Own fd, -1 for none, in place of the last one: 0 or -1 and errno. By the control thread.
cdef int notify_set_kick(notify_t *n, int fd, bint is_socket) noexcept nogil
cdef int notify_set_call(notify_t *n, int fd, int kind, const char *message, uint32_t bytes) noexcept nogil
cdef int notify_set_err(notify_t *n, int fd) noexcept nogil
# Have a thread of the queue look at the ring, and at what is ready. By any thread.
cdef void notify_wake(notify_t *n) noexcept nogil
# Sleep until there is a kick or a wake.
cdef void notify_wait(notify_t *n) noexcept nogil
# Call the guest, if it has given a descriptor for it. `stop`: a word that ends a wait for the channel.
cdef void notify_call(notify_t *n, const int *stop) noexcept nogil
# Tell the front end that the ring is broken.
cdef void notify_error(notify_t *n) noexcept nogil
