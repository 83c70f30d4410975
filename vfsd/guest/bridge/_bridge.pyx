"""The host kernel's FUSE client as the guest of a virtio-fs device.

A thread reads a frame from /dev/fuse into a slot's guest memory (fuse_dev_do_read), where a device
finds it as Linux's virtio-fs driver would have laid it out; the completion writes the reply from
there (fuse_dev_do_write). Neither is looked into, but for INIT, which promises what only a device
file can do, and for how much room a reply needs, which only virtio must know beforehand.
"""

cimport cython
from libc.errno cimport (
    E2BIG, EAGAIN, ECONNABORTED, EINTR, EIO, ENODEV, ENOENT, ENOLCK, ENOSYS, EPROTO, errno,
)
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove

from vfsd.memory._regions cimport iovec
from vfsd.fuse._wire cimport (
    FUSE_IN_HEADER, FUSE_OUT_HEADER, fuse_batch_forget_in, fuse_forget_in, fuse_forget_one,
    fuse_in_header, fuse_out_header,
)
from vfsd.guest.driver cimport _vqs as tr
from vfsd.guest.driver._transport cimport Transport
from vfsd.guest.driver._vqs cimport slot_t, transport_t

from vfsd.fuse.shapes import SHAPES

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    uint64_t load_relaxed_u64(const uint64_t *p)
    uint64_t add_u64(uint64_t *p, uint64_t v)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec *iov, int n)
    ssize_t writev(int fd, const iovec *iov, int n)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t n)

cdef enum:
    FORGET = 2
    INIT = 26
    SETLKW = 33
    INTERRUPT = 36
    BATCH_FORGET = 42
    OPCODES = 64
    PAGE = 4096
    ERRNO_MAX = 511            # fuse_dev_do_write refuses a reply with a larger one
    # What is read in front of the pages: as much as makes WRITE's data begin there.
    HEAD_ARGS = 40             # fuse_write_in
    HEAD = FUSE_IN_HEADER + HEAD_ARGS
    READ_BUFFER_MIN = 8192     # FUSE_MIN_READ_BUFFER
    ALIGNMENT = 64             # a transport may leave this much between parts of a slot
    INIT_PENDING = 1
    DEFAULT_PAGES = 32         # FUSE_DEFAULT_MAX_PAGES_PER_REQ

# INIT flags that both sides can do but not a bridge between them. Splicing is between a process and
# its device file; passthrough and io_uring need descriptors of this host; a request that the kernel
# gives up (timeout, resend) is still the device's; a virtio-fs device can notify of nothing.
cdef uint64_t SPLICE = 7 << 7           # WRITE, MOVE, READ
cdef uint64_t MAX_PAGES = 1 << 22
cdef uint64_t MAP_ALIGNMENT = 1 << 26
cdef uint64_t SUBMOUNTS = 1 << 27
cdef uint64_t INIT_EXT = 1 << 30
cdef uint64_t HAS_INODE_DAX = <uint64_t>1 << 33
cdef uint64_t HAS_EXPIRE_ONLY = <uint64_t>1 << 35
cdef uint64_t PASSTHROUGH = <uint64_t>1 << 37
cdef uint64_t HAS_RESEND = <uint64_t>1 << 39
cdef uint64_t OVER_IO_URING = <uint64_t>1 << 41
cdef uint64_t REQUEST_TIMEOUT = <uint64_t>1 << 42
cdef uint64_t HAS_IO_URING_BUFPOOL = <uint64_t>1 << 43
cdef uint64_t NOT_CARRIED = (
    SPLICE | MAP_ALIGNMENT | SUBMOUNTS | HAS_INODE_DAX | HAS_EXPIRE_ONLY | PASSTHROUGH
    | HAS_RESEND | OVER_IO_URING | REQUEST_TIMEOUT | HAS_IO_URING_BUFPOOL)

cdef uint64_t ONE = 1


cdef packed struct init_in:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint32_t flags2


cdef packed struct init_out:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint16_t max_background
    uint16_t congestion_threshold
    uint32_t max_write
    uint32_t time_gran
    uint16_t max_pages
    uint16_t map_alignment
    uint32_t flags2
    uint32_t max_stack_depth
    uint16_t request_timeout
    uint16_t unused[11]


cdef enum:
    INIT_OUT_FLAGS = 16        # up to and with flags
    INIT_OUT_MAX_WRITE = 24    # the form of minor 5 to 22
    INIT_OUT_WHOLE = 64

assert sizeof(init_out) == INIT_OUT_WHOLE


# vfsd.fuse.shapes.Shape; -1 for None.
cdef struct shape_t:
    bint known
    uint32_t out_args
    uint32_t out_pages
    int size_at
    bint in_pages
    bint argvar
    int data_from


cdef shape_t shapes[OPCODES]


cdef struct bridge_t:
    transport_t *t
    uint32_t capacity          # bytes of a slot's pages
    int init_fd
    int end_fd
    int init                   # 1: not answered yet; 0; -errno
    int ended
    uint64_t running
    uint64_t forgets
    uint64_t interrupts
    uint64_t lock_waits        # SETLKW in flight
    uint64_t refused


# What a reply needs to find its way back; by slot.
cdef struct pending_t:
    bridge_t *b
    int fd                     # the kernel looks for a request only at the clone it was read from
    uint32_t opcode
    uint64_t unique
    uint32_t queue
    bint sent
    uint64_t offered           # INIT flags


# --- replies ---

cdef void answer(bridge_t *b, int fd, uint64_t unique, int error, iovec *body, int n) noexcept nogil:
    """Write a reply; body: n iovecs, the first left free for the out header."""
    cdef fuse_out_header head
    cdef uint32_t size = FUSE_OUT_HEADER
    cdef int i
    for i in range(1, n):
        size += body[i].iov_len
    head.len = size
    head.error = error
    head.unique = unique
    body[0].iov_base = &head
    body[0].iov_len = FUSE_OUT_HEADER
    # ENOENT: who waited for it is gone. ENODEV: the file system is.
    if writev(fd, body, n) < 0 and errno != ENOENT and errno != ENODEV:
        add_u64(&b.refused, 1)


cdef void answer_error(bridge_t *b, int fd, uint64_t unique, int error) noexcept nogil:
    cdef iovec head
    answer(b, fd, unique, error, &head, 1)


cdef void say(int fd) noexcept nogil:
    c_write(fd, &ONE, sizeof(ONE))


cdef void init_ended(bridge_t *b, int error) noexcept nogil:
    store_release_int(&b.init, error)
    say(b.init_fd)


cdef uint64_t two_words(uint32_t flags, uint32_t flags2) noexcept nogil:
    return <uint64_t>flags | (<uint64_t>flags2 << 32 if flags & INIT_EXT else 0)


cdef void bound_init(bridge_t *b, pending_t *p, init_out *out, uint32_t size) noexcept nogil:
    """Promise the kernel no more than was offered, and than a queue carries."""
    cdef uint64_t flags
    cdef uint32_t pages = b.capacity // PAGE
    if size < INIT_OUT_FLAGS:
        return
    flags = two_words(out.flags, out.flags2 if size == INIT_OUT_WHOLE else 0) & p.offered
    if size == INIT_OUT_WHOLE:
        # Without the flag the kernel takes its default, which a short queue can't carry.
        if not flags & MAX_PAGES:
            out.max_pages = DEFAULT_PAGES
        if out.max_pages > pages:
            out.max_pages = pages
        if out.max_pages < DEFAULT_PAGES:
            flags |= MAX_PAGES & p.offered
        out.flags2 = flags >> 32
        out.map_alignment = 0
        out.max_stack_depth = 0
        out.request_timeout = 0
    out.flags = <uint32_t>flags
    if size >= INIT_OUT_MAX_WRITE and out.max_write > b.capacity:
        out.max_write = b.capacity


cdef void reply_init(slot_t *s, pending_t *p) noexcept nogil:
    cdef bridge_t *b = p.b
    cdef init_out out
    cdef iovec body[2]
    cdef int error = s.error
    if error == 0 and s.out_bytes > INIT_OUT_WHOLE:
        error = -EPROTO
    if error == 0:
        memcpy(&out, tr.slot_out(b.t, s) + FUSE_OUT_HEADER, s.out_bytes)
        # process_init_reply: only the same major is a connection.
        if s.out_bytes < 8 or out.major != 7:
            error = -EPROTO
    if error == 0:
        bound_init(b, p, &out, s.out_bytes)
        body[1].iov_base = &out
        body[1].iov_len = s.out_bytes
        answer(b, p.fd, p.unique, 0, body, 2)
    else:
        answer_error(b, p.fd, p.unique, error)
    tr.slot_put(b.t, s)
    init_ended(b, error)


cdef void reply(slot_t *s, void *owner) noexcept nogil:
    """The end of a request (`done` of its slot)."""
    cdef pending_t *p = <pending_t *>owner
    cdef iovec body[3]
    cdef uint32_t args
    cdef int n = 1
    if p.opcode == INIT:
        reply_init(s, p)
        return
    if p.opcode == INTERRUPT:
        if s.error == -ENOSYS:  # the device knows none: the kernel shall send no more
            answer_error(p.b, p.fd, p.unique, -ENOSYS)
        tr.slot_put(p.b.t, s)
        return
    if p.opcode == SETLKW:
        add_u64(&p.b.lock_waits, <uint64_t>-1)
    if s.error and p.b.t.vqs[s.queue].aborted:
        answer_error(p.b, p.fd, p.unique, -ECONNABORTED)  # as fuse_abort_conn has it
    elif s.error:
        answer_error(p.b, p.fd, p.unique, s.error if s.error >= -ERRNO_MAX else -EIO)
    else:
        args = s.out_bytes if s.out_bytes < s.out_args else s.out_args
        if args:
            body[n].iov_base = tr.slot_out(p.b.t, s) + FUSE_OUT_HEADER
            body[n].iov_len = args
            n += 1
        if s.out_bytes > args:
            body[n].iov_base = tr.slot_pages(p.b.t, s)
            body[n].iov_len = s.out_bytes - args
            n += 1
        answer(p.b, p.fd, p.unique, 0, body, n)
    tr.slot_put(p.b.t, s)


# --- requests ---

cdef void batch_forget(bridge_t *b, slot_t *s, uint32_t size) noexcept nogil:
    """One by one, as Linux does on virtio-fs."""
    cdef char *head = tr.slot_header(b.t, s)
    cdef char *pages = tr.slot_pages(b.t, s)
    cdef fuse_batch_forget_in *batch = <fuse_batch_forget_in *>(head + FUSE_IN_HEADER)
    cdef fuse_forget_one one
    cdef uint32_t at = FUSE_IN_HEADER + sizeof(fuse_batch_forget_in)
    cdef uint32_t left = batch.count
    # An item never lies across: HEAD is a multiple of its size away from the first.
    while left and at + sizeof(one) <= size:
        memcpy(&one, head + at if at < HEAD else pages + (at - HEAD), sizeof(one))
        tr.forget_send(b.t, one.nodeid, one.nlookup)
        at += sizeof(one)
        left -= 1
        add_u64(&b.forgets, 1)


cdef int place_data(bridge_t *b, slot_t *s, const shape_t *shape, uint32_t args) noexcept nogil:
    """Put what has been read where its shape says. -E2BIG: it does not fit there."""
    cdef char *head = tr.slot_header(b.t, s)
    cdef char *pages = tr.slot_pages(b.t, s)
    cdef uint32_t gap
    s.in_args = args
    s.in_pages = 0
    if shape.data_from >= 0 and args > <uint32_t>shape.data_from:
        s.in_args = shape.data_from
        s.in_pages = args - s.in_args
        gap = HEAD_ARGS - s.in_args
        if s.in_pages > b.capacity:
            return -E2BIG
        if gap:
            if s.in_pages > gap:
                memmove(pages + gap, pages, s.in_pages - gap)
            memcpy(pages, head + FUSE_IN_HEADER + s.in_args, min(gap, s.in_pages))
    elif args > HEAD_ARGS:
        if args > tr.SLOT_ARGS - FUSE_IN_HEADER:
            return -E2BIG
        memcpy(head + HEAD, pages, args - HEAD_ARGS)
    return 0


cdef int make_room(bridge_t *b, slot_t *s, const shape_t *shape) noexcept nogil:
    """What the reply needs. -E2BIG: more than a slot has. -EIO: the request is too short to say."""
    cdef uint32_t size = 0
    s.out_args = shape.out_args
    s.out_pages = shape.out_pages
    s.flags = tr.REQ_ARGVAR if shape.argvar else 0
    if shape.size_at >= 0:
        if s.in_args < shape.size_at + sizeof(size):
            return -EIO
        memcpy(&size, tr.slot_header(b.t, s) + FUSE_IN_HEADER + shape.size_at, sizeof(size))
        if shape.in_pages:
            s.out_pages = max(s.out_pages, size)
        elif size:  # 0 asks how much there is: getxattr_out
            s.out_args = size
            s.flags = tr.REQ_ARGVAR
    if s.out_pages > b.capacity or s.out_args > tr.SLOT_ARGS or (
            FUSE_IN_HEADER + FUSE_OUT_HEADER + ALIGNMENT + <uint64_t>s.in_args + s.out_args
            > tr.SLOT_ARGS):
        return -E2BIG
    return 0


cdef void offer_init(slot_t *s, pending_t *p) noexcept nogil:
    """Offer the device nothing of what a bridge can't carry."""
    cdef init_in *i = <init_in *>(tr.slot_header(p.b.t, s) + FUSE_IN_HEADER)
    cdef bint extended = s.in_args >= sizeof(init_in)
    p.offered = two_words(i.flags, i.flags2 if extended else 0) & ~NOT_CARRIED
    i.flags = <uint32_t>p.offered
    if extended:
        i.flags2 = p.offered >> 32


cdef bint interrupt(bridge_t *b, pending_t *pending, slot_t *s, int fd, uint32_t size) noexcept nogil:
    """Pass it on for a lock, which alone can take for ever. True: the slot went with it."""
    cdef fuse_in_header *h = <fuse_in_header *>tr.slot_header(b.t, s)
    cdef pending_t *p = &pending[s.index]
    cdef uint64_t unique = 0
    cdef uint32_t i = 0
    add_u64(&b.interrupts, 1)
    if size < FUSE_IN_HEADER + sizeof(unique):
        return False
    memcpy(&unique, h + 1, sizeof(unique))
    while i < b.t.n_slots and pending[i].unique != unique:
        i += 1
    if i == b.t.n_slots or not pending[i].sent:
        # Another thread is about to send it, or it has been answered: the kernel knows, and asks again.
        answer_error(b, fd, h.unique, -EAGAIN)
        return False
    if pending[i].opcode != SETLKW:
        return False
    p.b = b
    p.fd = fd
    p.opcode = INTERRUPT
    p.unique = h.unique
    s.done = reply
    s.owner = p
    s.in_args = sizeof(unique)
    s.in_pages = s.out_args = s.out_pages = s.flags = 0
    tr.slot_send(b.t, s, pending[i].queue, True)  # the same queue: it comes there after it
    return True


cdef bint too_many_locks(bridge_t *b) noexcept nogil:
    """Half of the slots are left to others, or whoever has the lock could not give it up."""
    if add_u64(&b.lock_waits, 1) <= <uint64_t>b.t.n_slots // 2 + 1:
        return False
    add_u64(&b.lock_waits, <uint64_t>-1)
    return True


cdef bint carry(bridge_t *b, pending_t *pending, slot_t *s, int fd, uint32_t queue,
                uint32_t size) noexcept nogil:
    """Do with a frame of `size` bytes what is to be done. True: the slot went with it."""
    cdef fuse_in_header *h = <fuse_in_header *>tr.slot_header(b.t, s)
    cdef pending_t *p = &pending[s.index]
    cdef uint32_t opcode = h.opcode
    cdef int rc
    if size < FUSE_IN_HEADER or h.len != size:
        return False  # fuse_dev_do_read gives nothing else
    if opcode == FORGET:
        tr.forget_send(b.t, h.nodeid, (<fuse_forget_in *>(h + 1)).nlookup)
        add_u64(&b.forgets, 1)
        return False
    if opcode == BATCH_FORGET:
        batch_forget(b, s, size)
        return False
    if opcode == INTERRUPT:
        return interrupt(b, pending, s, fd, size)
    if opcode >= OPCODES or not shapes[opcode].known:
        answer_error(b, fd, h.unique, -ENOSYS)
        return False
    rc = place_data(b, s, &shapes[opcode], size - FUSE_IN_HEADER)
    if rc == 0:
        rc = make_room(b, s, &shapes[opcode])
    if rc < 0:
        add_u64(&b.refused, 1)
        answer_error(b, fd, h.unique, rc)
        return False
    if opcode == SETLKW and too_many_locks(b):
        answer_error(b, fd, h.unique, -ENOLCK)
        return False
    p.b = b
    p.fd = fd
    p.opcode = opcode
    p.queue = queue
    p.sent = False
    p.unique = h.unique
    s.done = reply
    s.owner = p
    if opcode == INIT:
        offer_init(s, p)
    tr.slot_send(b.t, s, queue, True)
    p.sent = True
    return True


cdef void read_frames(bridge_t *b, pending_t *pending, int fd, uint32_t queue) noexcept nogil:
    cdef iovec into[2]
    cdef slot_t *s = tr.slot_get(b.t)
    cdef ssize_t n
    while s != NULL:
        into[0].iov_base = tr.slot_header(b.t, s)
        into[0].iov_len = HEAD
        into[1].iov_base = tr.slot_pages(b.t, s)
        into[1].iov_len = b.capacity
        n = readv(fd, into, 2)
        if n > 0:
            if carry(b, pending, s, fd, queue, n):
                s = tr.slot_get(b.t)
        # 0: what stands for the device file in a test was closed.
        elif n == 0 or (errno != EINTR and errno != EAGAIN and errno != ENOENT):
            # ENODEV: unmounted. ECONNABORTED: aborted, and FUSE_ABORT_ERROR was agreed.
            if n < 0 and errno != ENODEV and errno != ECONNABORTED:
                store_release_int(&b.ended, errno)
            tr.slot_put(b.t, s)
            return


@cython.final
cdef class Bridge:
    """The host kernel's /dev/fuse joined to the queues of a device (see the stub)."""

    cdef bridge_t b
    cdef pending_t *pending
    cdef Transport transport
    cdef list fds

    def __cinit__(self, Transport transport not None, fds, int init_fd, int end_fd):
        self.transport = transport
        self.fds = list(fds)
        self.b.t = &transport.t
        self.b.capacity = transport.t.max_pages * PAGE
        self.b.init_fd = init_fd
        self.b.end_fd = end_fd
        self.b.init = INIT_PENDING
        self.b.running = len(self.fds)
        if transport.t.n_slots <= len(self.fds):
            raise ValueError(f"{transport.t.n_slots} slots for {len(self.fds)} threads")
        if HEAD + self.b.capacity < READ_BUFFER_MIN:
            raise ValueError(f"{transport.t.max_pages} pages a request are too few for /dev/fuse")
        if transport.t.n_vqs < 2:
            raise ValueError("no request queue")
        self.pending = <pending_t *>calloc(transport.t.n_slots, sizeof(pending_t))
        if self.pending == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.pending)

    def run(self, int thread):
        cdef int fd = self.fds[thread]
        cdef uint32_t queue = 1 + thread % (self.b.t.n_vqs - 1)
        with nogil:
            read_frames(&self.b, self.pending, fd, queue)
            if add_u64(&self.b.running, <uint64_t>-1) == 0:
                say(self.b.end_fd)

    @property
    def init(self):
        cdef int state = load_acquire_int(&self.b.init)
        return None if state == INIT_PENDING else state

    @property
    def running(self):
        return load_relaxed_u64(&self.b.running)

    @property
    def ended(self):
        return load_acquire_int(&self.b.ended)

    def counters(self):
        return {
            "forgets": load_relaxed_u64(&self.b.forgets),
            "interrupts": load_relaxed_u64(&self.b.interrupts),
            "refused": load_relaxed_u64(&self.b.refused),
        }


def fill_shapes():
    cdef shape_t *to
    for opcode, shape in SHAPES.items():
        assert shape.data_from is None or shape.data_from <= HEAD_ARGS
        to = &shapes[<int>opcode]
        to.known = True
        to.out_args = shape.out_args
        to.out_pages = shape.out_pages
        to.size_at = -1 if shape.size_at is None else shape.size_at
        to.in_pages = shape.in_pages
        to.argvar = shape.argvar
        to.data_from = -1 if shape.data_from is None else shape.data_from


fill_shapes()
