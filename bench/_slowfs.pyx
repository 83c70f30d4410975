"""The loop of the slow file system: a FUSE request from the kernel, a delay, the operation, the reply."""

cimport cython
from libc.errno cimport EINTR, ENODEV, ENOENT, errno
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc

from vfsd.fuse.dispatch cimport (
    OPCODES_MAX, WAIT, Dispatch, dispatch_t, request_parse, request_reply, request_run, request_t, span_t,
)
from vfsd.sys._uio cimport iovec

import os

from vfsd.fuse.opcodes import NUMBER

__all__ = ("Server",)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t n)
    ssize_t c_write "write"(int fd, const void *data, size_t n)
    int c_close "close"(int fd)

cdef extern from "_atomics.h" nogil:
    uint32_t load_relaxed_u32(const uint32_t *p)
    void store_relaxed_u32(uint32_t *p, uint32_t v)

cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    int nanosleep(const timespec *wanted, timespec *left)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long value, ...)
    int PR_SET_TIMERSLACK

cdef enum:
    # The largest request and the largest reply: 1 MiB of data, headers and arguments.
    ROOM = (1 << 20) + 8192

cdef uint32_t INIT = NUMBER["INIT"]


cdef void pause_for(uint32_t us) noexcept nogil:
    cdef timespec left
    if us == 0:
        return
    left.tv_sec = us // 1000000
    left.tv_nsec = 1000 * <int64_t>(us % 1000000)
    while nanosleep(&left, &left) < 0 and errno == EINTR:
        pass


@cython.final
cdef class Server:
    """Answers what the kernel asks of a FUSE mount by the operations of `dispatch`.

    delay_us: how long each operation but INIT takes before it begins.
    """

    cdef Dispatch dispatch
    cdef uint32_t delay_us[OPCODES_MAX]

    def __cinit__(self, Dispatch dispatch not None, uint32_t delay_us):
        self.dispatch = dispatch
        for opcode in range(OPCODES_MAX):
            self.delay_us[opcode] = delay_us
        self.delay_us[INIT] = 0

    def set_delay(self, str operation, uint32_t delay_us):
        """Change the delay of one operation, for requests that begin from now on. KeyError: there is none."""
        store_relaxed_u32(&self.delay_us[<uint32_t>NUMBER[operation]], delay_us)

    def work(self, int fd):
        """Serve requests from /dev/fuse until it is unmounted. Any number of threads may. OSError."""
        cdef int rc
        with nogil:
            rc = work(&self.dispatch.table, self.delay_us, fd)
        if rc:
            raise OSError(rc, os.strerror(rc))


cdef int work(dispatch_t *d, const uint32_t *delay_us, int fd) noexcept nogil:
    cdef char *request = <char *>malloc(ROOM)
    cdef char *reply = <char *>malloc(ROOM)
    cdef ssize_t n
    cdef int rc = 0
    prctl(PR_SET_TIMERSLACK, 1)
    while request != NULL and reply != NULL:
        n = c_read(fd, request, ROOM)
        if n >= 0:
            answer(d, delay_us, fd, request, n, reply)
        elif errno == ENODEV:
            break
        elif errno != EINTR and errno != ENOENT:  # ENOENT: the caller has gone before it was read
            rc = errno
            break
    free(request)
    free(reply)
    return rc


cdef void answer(dispatch_t *d, const uint32_t *delay_us, int fd, char *request, size_t n, char *reply) noexcept nogil:
    cdef request_t r
    cdef iovec into, out
    cdef span_t readable, writable
    cdef uint32_t size
    into.iov_base = request
    into.iov_len = n
    out.iov_base = reply
    out.iov_len = ROOM
    readable.iov = &into
    writable.iov = &out
    readable.n = writable.n = 1
    readable.bytes = n
    writable.bytes = ROOM
    if not request_parse(d, readable, writable, &r):
        return
    if r.header.opcode < OPCODES_MAX:
        pause_for(load_relaxed_u32(&delay_us[r.header.opcode]))
    r.mode = WAIT
    size = request_reply(&r, request_run(d, &r))
    if size:
        c_write(fd, reply, size)  # ENOENT where the caller was interrupted
    if r.close_fd >= 0:
        c_close(r.close_fd)
