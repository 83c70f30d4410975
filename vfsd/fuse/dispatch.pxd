"""From a chain to a reply: parse the header, find the operation, run it, write the out header.

Knows FUSE and byte streams, nothing of rings: element borders carry no meaning (virtio 1.3,
2.7.4), so a request is a span of bytes to read and a span of bytes to fill.
"""

from libc.stdint cimport uint32_t, uint64_t

from vfsd.memory._regions cimport iovec
from vfsd.state._journal cimport failpoint_t, record_t
from vfsd.fuse._wire cimport fuse_in_header

cdef enum:
    OPCODES_MAX = 64
    FILE_SYSTEMS = 16        # a power of two
    NAME_MAX = 255           # bytes, without the NUL (limits.h)
    PYTHON_BODY_MAX = 262144 # bytes copied for a Python operation: names, or an xattr of 64 KiB
    FUSE_OUT_PIECES = 16
    SCRATCH_BYTES = 64
    NO_REPLY = 1             # an operation's answer when the guest expects none
    WOULD_BLOCK = 2          # its answer to TRY when it would have to wait for a disk: run it again with WAIT
    WOULD_WAIT = 3           # when it would wait for a guest or a process: run it again with PARK
    WAITS = 4                # to PARK: it waits, and parked.complete will be called


# What an operation may do.
cdef enum request_mode:
    TRY   # block for nothing: others wait for this thread
    WAIT  # block, for a disk or a network
    PARK  # be completed later, by r.parked


# A stream over iovecs; reading and skipping consume it (the iovecs are the caller's own copies).
cdef struct span_t:
    iovec *iov
    uint32_t n
    uint64_t bytes


# A request that waits for somebody, for however long, and holds no thread meanwhile.
cdef struct parked_t:
    # The queue's: answer with rc. Once, by any thread, also before the operation has returned; never waits.
    void (*complete)(parked_t *parked, int rc) noexcept nogil
    # The operation's: have it completed with -ENOLCK, unless it has been. Called while complete may be.
    void (*cancel)(parked_t *parked) noexcept nogil
    void *by                # the operation's
    void *waiter


cdef struct dispatch_t


cdef struct request_t:
    const dispatch_t *dispatch
    fuse_in_header header   # private copy
    span_t body             # after the header, ends at header.len
    span_t reply            # room after the out header
    uint64_t reply_bytes    # of the body, set by the operation
    int error               # 0 or -errno of a request that is refused before it is run
    int close_fd            # to be closed once the reply is out, -1 for none
    record_t *record        # for the next server, should this one die; NULL: nobody keeps any
    bint again              # one has died that had begun it, and may have done it
    uint64_t forgotten      # lookup counts that were to be lowered by it so far
    bint in_python
    bint streams            # whoever asks for it may have asked for more meanwhile
    request_mode mode
    uint32_t n_taken        # room for what has been taken from the body, in scratch or name; 0: nothing yet
    parked_t *parked        # with PARK
    char scratch[SCRATCH_BYTES]
    char name[NAME_MAX + 1]  # checked, of an operation that is run again for it
    iovec head[FUSE_OUT_PIECES]  # where the out header goes: at most 16 pieces of one byte
    uint32_t n_head


# 0, -errno, NO_REPLY, to TRY WOULD_BLOCK, WOULD_WAIT or WAITS. On 0 reply_bytes of r.reply have
# been filled.
ctypedef int (*hot_op_t)(void *fs, request_t *r) noexcept nogil


# Which of at most FILE_SYSTEMS the file of a nodeid lies on; some may share a number.
ctypedef uint32_t (*file_system_of_t)(void *fs, uint64_t nodeid) noexcept nogil


# A request of that nodeid came to ESTALE.
ctypedef void (*on_stale_t)(void *fs, uint64_t nodeid) noexcept nogil


# A part of an operation that several threads may run at a time, each until there is nothing left to do.
ctypedef void (*part_t)(void *work) noexcept nogil


cdef struct dispatch_t:
    # Runs it in this thread and in up to n - 1 others that are free, and returns when all have. NULL: there are none.
    void (*spread)(void *threads, part_t part, void *work, unsigned int n) noexcept nogil
    void *threads
    hot_op_t hot[OPCODES_MAX]
    void *hot_fs
    file_system_of_t file_system_of    # NULL: there is one
    on_stale_t on_stale                # NULL: nothing is to be done
    void *owner             # the Dispatch: borrowed
    unsigned char python[OPCODES_MAX]
    unsigned char blocks[OPCODES_MAX]  # never tried
    unsigned char streams[OPCODES_MAX] # one caller may have several under way
    int refused[OPCODES_MAX]           # errno of what the operator does not allow, 0
    uint64_t bytes_max      # of a request's body, and of its reply: what INIT agreed on
    uint32_t *latest        # opcode of the request that began last, for who asks when this process has died
    failpoint_t *failpoint  # of debug builds, or NULL
    int initialized         # INIT has been answered and DESTROY has not come


# Drop n bytes; -EINVAL when there are fewer.
cdef int span_skip(span_t *s, uint64_t n) noexcept nogil
# Copy n bytes out and drop them; -EINVAL when there are fewer.
cdef int span_read(span_t *s, void *to, uint64_t n) noexcept nogil
# Copy n bytes in and drop the room; -EINVAL when there is less.
cdef int span_write(span_t *s, const void *data, uint64_t n) noexcept nogil
# Forget what lies beyond the first n bytes.
cdef void span_limit(span_t *s, uint64_t n) noexcept nogil
# 0; -EINVAL empty, ".", "..", with "/"; -ENAMETOOLONG. n: bytes without the NUL.
cdef int name_check(const char *name, size_t n) noexcept nogil

# False: no in header, or no room for an out header where a reply is due: give the chain back unanswered.
cdef bint request_parse(dispatch_t *d, span_t readable, span_t writable, request_t *r) noexcept nogil
# Whether to hand it to the pool before it is even tried.
cdef bint request_blocks(dispatch_t *d, request_t *r) noexcept nogil
# Run it: 0, -errno, NO_REPLY, WOULD_BLOCK, WOULD_WAIT or WAITS.
cdef int request_run(dispatch_t *d, request_t *r) noexcept nogil
# Write the out header of what request_run came to. Bytes written to the guest, 0 for none.
cdef uint32_t request_reply(request_t *r, int rc) noexcept nogil
# Take the next arguments of a fixed size, also when run again. 0 or -EINVAL.
cdef int request_args(request_t *r, void *to, uint32_t n) noexcept nogil


cdef inline void spread(const dispatch_t *d, part_t part, void *work, unsigned int n) noexcept nogil:
    if d.spread == NULL:
        part(work)
    else:
        d.spread(d.threads, part, work, n)


cdef inline uint32_t file_system_of(const dispatch_t *d, uint64_t nodeid) noexcept nogil:
    return 0 if d.file_system_of == NULL else d.file_system_of(d.hot_fs, nodeid)


cdef class Dispatch:
    cdef dispatch_t table
    cdef object hot_owner
    cdef list handlers
    cdef object fs
    cdef uint32_t[::1] latest

    cdef int set_hot(self, uint32_t opcode, hot_op_t op, void *fs, object owner) except -1
    cdef int set_file_system_of(self, file_system_of_t of) except -1
    cdef int set_on_stale(self, on_stale_t on_stale) except -1
