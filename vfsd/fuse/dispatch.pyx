"""Dispatch of FUSE requests: hot operations without the GIL, the others in Python."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport E2BIG, EINVAL, EIO, ENAMETOOLONG, ENOSYS, ESTALE
from libc.string cimport memchr, memcpy, memset

from vfsd.fuse cimport _wire as w
from vfsd.fuse._wire cimport fuse_out_header

import errno
import logging

from vfsd.fuse.opcodes import NAME as OPCODE_NAME
from vfsd.fuse.opcodes import NUMBER as OPCODE_NUMBER
from vfsd.fuse.opcodes import OPERATIONS
from vfsd.fuse.opcodes import OPCODES_MAX as TABLE_SIZE

__all__ = ("Dispatch", "Request")

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    uint32_t load_relaxed_u32(const uint32_t *p)
    void store_relaxed_u32(uint32_t *p, uint32_t v)

log = logging.getLogger("vfsd.fuse")

assert sizeof(w.fuse_in_header) == w.FUSE_IN_HEADER
assert sizeof(w.fuse_out_header) == w.FUSE_OUT_HEADER
assert sizeof(w.fuse_attr) == 88
assert sizeof(w.fuse_entry_out) == 128
assert sizeof(w.fuse_attr_out) == 104
assert sizeof(w.fuse_forget_one) == 16
assert sizeof(w.fuse_getattr_in) == 16
assert sizeof(w.fuse_statx_in) == 24
assert sizeof(w.fuse_statx_out) == 288
assert sizeof(w.fuse_read_in) == 40
assert sizeof(w.fuse_write_in) == 40
assert sizeof(w.fuse_write_out) == 8
assert sizeof(w.fuse_setupmapping_in) == 40
assert sizeof(w.fuse_removemapping_in) == 4
assert sizeof(w.fuse_removemapping_one) == 16
assert sizeof(w.fuse_copy_file_range_in) == 56
assert sizeof(w.fuse_ioctl_in) == 32
assert sizeof(w.fuse_ioctl_out) == 16
assert TABLE_SIZE == OPCODES_MAX

cdef uint32_t INIT = OPCODE_NUMBER["INIT"]
cdef uint32_t FORGET = OPCODE_NUMBER["FORGET"]
cdef uint32_t BATCH_FORGET = OPCODE_NUMBER["BATCH_FORGET"]

cdef enum:
    # Of a reply by /dev/fuse. A virtio-fs guest does not check: its programs would see an errno that means nothing,
    # or ERESTARTSYS (512), which some file systems let out, as the guest's own.
    ERRNO_MAX = 511


cdef int span_skip(span_t *s, uint64_t n) noexcept nogil:
    if n > s.bytes:
        return -EINVAL
    s.bytes -= n
    while n:
        if n < s.iov.iov_len:
            s.iov.iov_base = <char *>s.iov.iov_base + n
            s.iov.iov_len -= n
            return 0
        n -= s.iov.iov_len
        s.iov += 1
        s.n -= 1
    return 0


cdef int span_copy(span_t *s, char *data, uint64_t n, bint fill) noexcept nogil:
    cdef uint64_t part
    if n > s.bytes:
        return -EINVAL
    while n:
        part = n if n < s.iov.iov_len else s.iov.iov_len
        if fill:
            memcpy(s.iov.iov_base, data, part)
        else:
            memcpy(data, s.iov.iov_base, part)
        data += part
        n -= part
        span_skip(s, part)
    return 0


cdef int span_read(span_t *s, void *to, uint64_t n) noexcept nogil:
    return span_copy(s, <char *>to, n, False)


cdef int span_write(span_t *s, const void *data, uint64_t n) noexcept nogil:
    return span_copy(s, <char *>data, n, True)


cdef void span_limit(span_t *s, uint64_t n) noexcept nogil:
    cdef uint32_t i = 0
    if n >= s.bytes:
        return
    s.bytes = n
    while n > s.iov[i].iov_len:
        n -= s.iov[i].iov_len
        i += 1
    s.iov[i].iov_len = n
    s.n = i + 1


cdef int name_check(const char *name, size_t n) noexcept nogil:
    if n > NAME_MAX:
        return -ENAMETOOLONG
    if n == 0 or memchr(name, c'/', n) != NULL or memchr(name, 0, n) != NULL:
        return -EINVAL
    if name[0] == c'.' and (n == 1 or (n == 2 and name[1] == c'.')):
        return -EINVAL
    return 0


cdef void take_head(request_t *r) noexcept nogil:
    """Set aside where the out header goes: it is written last, and may lie in pieces."""
    cdef uint64_t left = w.FUSE_OUT_HEADER, part
    r.n_head = 0
    while left:
        part = left if left < r.reply.iov.iov_len else r.reply.iov.iov_len
        r.head[r.n_head].iov_base = r.reply.iov.iov_base
        r.head[r.n_head].iov_len = part
        r.n_head += 1
        left -= part
        span_skip(&r.reply, part)


cdef bint request_parse(dispatch_t *d, span_t readable, span_t writable, request_t *r) noexcept nogil:
    cdef uint32_t opcode
    r.dispatch = d
    r.body = readable
    r.reply = writable
    r.reply_bytes = 0
    r.error = 0
    r.close_fd = -1
    r.record = NULL
    r.again = False
    r.forgotten = 0
    r.n_head = 0
    r.in_python = r.streams = False
    r.mode = TRY
    r.n_taken = 0
    r.parked = NULL
    if span_read(&r.body, &r.header, w.FUSE_IN_HEADER) < 0:
        memset(&r.header, 0, sizeof(r.header))
        return False
    opcode = r.header.opcode
    if opcode != FORGET and opcode != BATCH_FORGET:
        if r.reply.bytes < w.FUSE_OUT_HEADER:
            return False
        take_head(r)
    # However much room there is: a buffer may be named a thousand times.
    span_limit(&r.reply, d.bytes_max)
    if r.header.len < w.FUSE_IN_HEADER or r.header.len - w.FUSE_IN_HEADER > min(r.body.bytes, d.bytes_max):
        r.error = -EINVAL
    elif opcode >= OPCODES_MAX or (d.hot[opcode] == NULL and not d.python[opcode]):
        r.error = -ENOSYS
    elif not load_acquire_int(&d.initialized) and opcode != INIT:
        r.error = -EIO
    elif d.refused[opcode]:
        r.error = -d.refused[opcode]
    else:
        # Queues share the word: it is left alone while it stays the same.
        if load_relaxed_u32(d.latest) != opcode:
            store_relaxed_u32(d.latest, opcode)
        span_limit(&r.body, r.header.len - w.FUSE_IN_HEADER)
        r.in_python = d.hot[opcode] == NULL
        r.streams = d.streams[opcode]
    return True


cdef bint request_blocks(dispatch_t *d, request_t *r) noexcept nogil:
    return r.error == 0 and d.blocks[r.header.opcode]


cdef int request_run(dispatch_t *d, request_t *r) noexcept nogil:
    cdef int rc
    if r.error:
        return r.error
    if r.in_python:
        return run_python(d, r)
    rc = d.hot[r.header.opcode](d.hot_fs, r)
    if rc == -ESTALE and d.on_stale != NULL:
        d.on_stale(d.hot_fs, r.header.nodeid)
    return rc


cdef int request_args(request_t *r, void *to, uint32_t n) noexcept nogil:
    if r.n_taken == 0:
        if span_read(&r.body, r.scratch, n) < 0:
            return -EINVAL
        r.n_taken = n
    memcpy(to, r.scratch, n)
    return 0


cdef uint32_t request_reply(request_t *r, int rc) noexcept nogil:
    cdef fuse_out_header out
    cdef char *at = <char *>&out
    cdef uint32_t i
    if rc == NO_REPLY or r.n_head == 0:
        return 0
    if rc < -ERRNO_MAX:
        rc = -EIO
    out.len = w.FUSE_OUT_HEADER + (<uint32_t>r.reply_bytes if rc == 0 else 0)
    out.error = rc
    out.unique = r.header.unique
    for i in range(r.n_head):
        memcpy(r.head[i].iov_base, at, r.head[i].iov_len)
        at += r.head[i].iov_len
    return out.len


cdef int run_python(dispatch_t *d, request_t *r) noexcept with gil:
    cdef Dispatch dispatch = <Dispatch>d.owner
    cdef Request request
    try:
        if r.body.bytes > PYTHON_BODY_MAX:
            return -E2BIG
        request = Request.__new__(Request)
        request.load(r)
        handler = dispatch.handlers[r.header.opcode]
        reply = handler(dispatch.fs, request)
        if reply is None:
            return 0
        return fill_reply(r, reply)
    except OSError as problem:
        if problem.errno is None or problem.errno <= 0:
            return -EIO
        return -<int>problem.errno
    except BaseException:
        # A guest must not end the daemon: it gets EIO, the operator the traceback.
        log.exception("%s failed", OPCODE_NAME.get(r.header.opcode, r.header.opcode))
        return -EIO


cdef int fill_reply(request_t *r, bytes reply) except -1000:
    cdef int rc = span_write(&r.reply, PyBytes_AS_STRING(reply), PyBytes_GET_SIZE(reply))
    if rc == 0:
        r.reply_bytes = PyBytes_GET_SIZE(reply)
    return rc


@cython.final
cdef class Request:
    """The body of a request, as a Python operation reads it."""

    cdef readonly uint64_t nodeid
    cdef bytes body
    cdef Py_ssize_t at

    cdef int load(self, request_t *r) except -1:
        self.nodeid = r.header.nodeid
        self.body = PyBytes_FromStringAndSize(NULL, r.body.bytes)
        span_read(&r.body, PyBytes_AS_STRING(self.body), r.body.bytes)
        return 0

    def take(self, layout):
        """The next fields, by a `struct.Struct`. OSError EINVAL when the body is too short."""
        if len(self.body) - self.at < layout.size:
            raise OSError(errno.EINVAL, "request too short")
        fields = layout.unpack_from(self.body, self.at)
        self.at += layout.size
        return fields


@cython.final
cdef class Dispatch:
    """The operations of one connection, by opcode.

    `fs` is handed to each Python operation as its first argument; it is let in to every request
    only after `open()` and until `shut()` (INIT and DESTROY). latest: four bytes of shared memory, which
    have the opcode of the request that began last.
    """

    def __cinit__(self, fs, latest=None):
        self.fs = fs
        self.latest = memoryview(bytearray(4) if latest is None else latest).cast("I")
        self.table.latest = &self.latest[0]
        self.handlers = [None] * OPCODES_MAX
        self.table.owner = <void *>self
        self.table.bytes_max = PYTHON_BODY_MAX
        for op in OPERATIONS:
            self.table.blocks[<int>op.opcode] = op.blocks
            self.table.streams[<int>op.opcode] = op.streams

    cdef int set_hot(self, uint32_t opcode, hot_op_t op, void *fs, object owner) except -1:
        self.table.hot[opcode] = op
        self.table.hot_fs = fs
        self.hot_owner = owner
        return 0

    cdef int set_file_system_of(self, file_system_of_t of) except -1:
        self.table.file_system_of = of
        return 0

    cdef int set_on_stale(self, on_stale_t on_stale) except -1:
        self.table.on_stale = on_stale
        return 0

    def set_python(self, opcode, handler):
        """Let handler(fs, request) -> bytes | None answer this opcode; OSError is the errno."""
        self.handlers[opcode] = handler
        self.table.python[opcode] = 1

    def refuse(self, opcode, int error):
        """Answer every request of this opcode with this errno; to be said before the first."""
        self.table.refused[opcode] = error

    def open(self, uint64_t bytes_max):
        """Let requests in whose bodies, and replies, have at most that many bytes; the rest is EINVAL."""
        self.table.bytes_max = bytes_max
        store_release_int(&self.table.initialized, 1)

    def shut(self):
        store_release_int(&self.table.initialized, 0)

    def close(self):
        """Let go of the file system; no request may be under way or follow."""
        self.shut()
        self.fs = None
        self.handlers = [None] * OPCODES_MAX
        for opcode in range(OPCODES_MAX):
            self.table.hot[opcode] = NULL
            self.table.python[opcode] = 0
