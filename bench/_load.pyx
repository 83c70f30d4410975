"""The closed-loop load generator: so many operations under way, each a sequence of requests.

A worker is a slot of the transport and the operation it is at. When a reply comes, the completion
thread checks it and sends the worker's next request, without the GIL and without allocating.
Everything of a worker and of a queue is touched by that queue's completion thread alone.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport ENOENT
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from vfsd.fuse._wire cimport (
    FUSE_IN_HEADER, FUSE_OUT_HEADER, fuse_attr, fuse_attr_out, fuse_entry_out, fuse_in_header,
    fuse_write_out,
)
from vfsd.guest.driver._transport cimport Transport
from vfsd.guest.driver._vqs cimport (
    REQ_ARGVAR, forget_send, slot_get, slot_header, slot_out, slot_pages, slot_put,
    slot_send, slot_t, transport_t,
)

import os

from .steps import Check, Node, Number, Order, Wrong

__all__ = ("Load",)

include "_common.pxi"

cdef extern from "_atomics.h" nogil:
    uint64_t add_u64(uint64_t *p, uint64_t v)
    uint64_t load_acquire_u64(const uint64_t *p)
    uint64_t load_relaxed_u64(const uint64_t *p)
    void store_release_u64(uint64_t *p, uint64_t v)
    void count_u64(uint64_t *p, uint64_t v)
    bint cas_u64(uint64_t *p, uint64_t expected, uint64_t desired)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t n)

cdef enum:
    FORGET = 2
    FORGETS_MAX = 128      # on their way before an operation waits for them
    ENTRY_SIZE = 128       # fuse_entry_out
    DIRENT_SIZE = 24       # without the name
    FORMAT_MASK = 0o170000

cdef enum: NODE_FIXED, NODE_ITEM, NODE_MADE
cdef enum: NUMBER_SLOT, NUMBER_ITEM
cdef enum: ORDER_SEQUENTIAL, ORDER_SCATTERED
cdef enum:
    CHECK_NOTHING, CHECK_ATTR, CHECK_KNOWN, CHECK_MADE, CHECK_ABSENT, CHECK_OPENED, CHECK_CREATED
    CHECK_DATA, CHECK_WRITTEN, CHECK_BYTES, CHECK_LISTING, CHECK_LISTING_PLUS
cdef enum:
    FAIL_ERROR = 1, FAIL_LENGTH, FAIL_NODE, FAIL_MODE, FAIL_SIZE, FAIL_DATA, FAIL_BYTES, FAIL_LISTING
    FAIL_ENTRIES

if (list(Node) != [NODE_FIXED, NODE_ITEM, NODE_MADE]
        or list(Number) != [NUMBER_SLOT, NUMBER_ITEM]
        or list(Order) != [ORDER_SEQUENTIAL, ORDER_SCATTERED]
        or list(Check) != list(range(CHECK_LISTING_PLUS + 1))
        or list(Wrong) != list(range(FAIL_ERROR, FAIL_ENTRIES + 1))):
    raise ImportError("steps.py and _load.pyx number things differently")

cdef uint64_t ANY_SIZE = <uint64_t>-1


cdef packed struct dirent_t:
    uint64_t ino
    uint64_t off
    uint32_t namelen
    uint32_t type


cdef struct step_t:
    uint32_t opcode
    uint32_t node_from
    uint64_t node
    const char *args
    uint32_t args_len
    uint32_t number
    int number_at
    int second_at
    int fh_at
    int offset_at
    uint32_t out_args
    uint32_t out_pages
    uint32_t in_pages
    uint32_t flags
    uint32_t check
    int error
    uint32_t mode
    uint64_t want
    const char *reply
    uint32_t reply_len


cdef struct queue_t:
    load_t *load
    uint32_t index         # 0 and up
    uint64_t next          # operations begun
    uint64_t ops           # and ended
    uint64_t requests      # answered; read by another thread
    uint64_t bytes         # of data read and written
    uint64_t entries
    hist_t *hists          # of the operation, then of each step


cdef struct worker_t:
    load_t *load
    queue_t *queue
    slot_t *slot
    uint32_t number
    uint32_t step
    uint64_t item
    uint64_t block
    uint64_t fh
    uint64_t position      # in a directory
    uint64_t entries
    uint64_t began         # ns: the operation
    uint64_t sent          # ns: the request
    uint64_t *made         # nodeids to forget
    uint32_t n_made


cdef struct load_t:
    transport_t *t
    step_t *steps
    uint32_t n_steps
    uint64_t *nodes
    uint64_t n_items
    uint32_t made_max
    uint32_t in_pages      # of the step that sends most
    uint64_t block
    unsigned block_bits
    uint64_t size
    uint32_t order
    uint64_t seed
    bint whole             # check all of the contents, not the ends of pages only
    queue_t *queues
    uint32_t n_queues
    worker_t *workers
    uint32_t n_workers
    uint64_t deadline      # ns
    uint64_t ops_min       # of each queue
    uint64_t stop
    uint64_t active        # workers that have not ended
    uint64_t ended         # ns
    int done_fd
    uint64_t failed        # a code; the first failure sets the rest
    uint32_t failed_step
    int64_t failed_got
    int64_t failed_want


# --- sending ---

cdef void begin(worker_t *w) noexcept nogil:
    """The worker's next operation."""
    cdef load_t *l = w.load
    w.item = w.queue.next * l.n_queues + w.queue.index
    w.queue.next += 1
    w.block = scattered(w.item, l.block_bits) if l.order == ORDER_SCATTERED else (
        w.item & ((<uint64_t>1 << l.block_bits) - 1))
    w.step = 0
    w.position = w.entries = 0
    w.n_made = 0


cdef void prepare(worker_t *w) noexcept nogil:
    """The worker's request, into its slot."""
    cdef load_t *l = w.load
    cdef step_t *p = &l.steps[w.step]
    cdef slot_t *s = w.slot
    cdef fuse_in_header *header = <fuse_in_header *>slot_header(l.t, s)
    cdef char *args = <char *>header + FUSE_IN_HEADER
    cdef uint64_t number = w.number if p.number == NUMBER_SLOT else w.item % l.n_items
    cdef uint64_t place, page
    header.opcode = p.opcode
    header.nodeid = p.node
    if p.node_from == NODE_ITEM:
        header.nodeid = l.nodes[w.item % l.n_items]
    elif p.node_from == NODE_MADE:
        header.nodeid = w.made[w.n_made - 1]
    memcpy(args, p.args, p.args_len)
    if p.number_at >= 0:
        put_hex8(args + p.number_at, number)
    if p.second_at >= 0:
        put_hex8(args + p.second_at, number)
    if p.fh_at >= 0:
        memcpy(args + p.fh_at, &w.fh, 8)
    if p.offset_at >= 0:
        place = w.position if p.check >= CHECK_LISTING else w.block * l.block
        memcpy(args + p.offset_at, &place, 8)
    s.in_args = p.args_len
    s.in_pages = p.in_pages
    s.out_args = p.out_args
    s.out_pages = p.out_pages
    s.flags = p.flags
    for page in range(p.in_pages // PAGE_BYTES):
        page_tags(slot_pages(l.t, s) + page * PAGE_BYTES, l.seed, w.block * l.block // PAGE_BYTES + page)


cdef void send(worker_t *w) noexcept nogil:
    w.sent = now_ns()
    if w.step == 0 and w.position == 0:
        w.began = w.sent
    slot_send(w.load.t, w.slot, 1 + w.queue.index, False)


# --- receiving ---

cdef bint fail(worker_t *w, uint64_t code, int64_t got, int64_t want) noexcept nogil:
    """Only the first counts: others may follow from it."""
    cdef load_t *l = w.load
    if cas_u64(&l.failed, 0, code):
        l.failed_step = w.step
        l.failed_got = got
        l.failed_want = want
    store_release_u64(&l.stop, 1)
    return False


cdef bint attr_right(worker_t *w, step_t *p, fuse_attr *attr) noexcept nogil:
    cdef uint32_t mask = 0o177777 if p.mode & 0o7777 else FORMAT_MASK
    if attr.mode & mask != p.mode:
        return fail(w, FAIL_MODE, attr.mode, p.mode)
    if p.mode & FORMAT_MASK == 0o100000 and p.want != ANY_SIZE and attr.size != p.want:
        return fail(w, FAIL_SIZE, <int64_t>attr.size, <int64_t>p.want)
    return True


cdef bint entry_right(worker_t *w, step_t *p, fuse_entry_out *entry) noexcept nogil:
    cdef uint64_t nodeid = entry.nodeid
    cdef uint64_t known
    if p.check == CHECK_KNOWN:
        known = w.load.nodes[w.item % w.load.n_items]
        if nodeid != known:
            return fail(w, FAIL_NODE, <int64_t>nodeid, <int64_t>known)
    else:
        if nodeid == 0:
            return fail(w, FAIL_NODE, 0, 1)
        w.made[w.n_made] = nodeid
        w.n_made += 1
    return attr_right(w, p, &entry.attr)


cdef bint data_right(worker_t *w, slot_t *s) noexcept nogil:
    cdef load_t *l = w.load
    cdef uint64_t start = w.block * l.block, page, want = 0
    cdef const char *data = slot_pages(l.t, s)
    cdef bint right
    if start < l.size:
        want = l.size - start if l.size - start < l.block else l.block
    if s.out_bytes != want:
        return fail(w, FAIL_LENGTH, s.out_bytes, <int64_t>want)
    w.queue.bytes += want
    for page in range(want // PAGE_BYTES):
        if l.whole:
            right = page_right(data, l.seed, start // PAGE_BYTES + page)
        else:
            right = page_tags_right(data, l.seed, start // PAGE_BYTES + page)
        if not right:
            return fail(w, FAIL_DATA, <int64_t>(start + page * PAGE_BYTES), 0)
        data += PAGE_BYTES
    return True


cdef bint listing_right(worker_t *w, step_t *p, slot_t *s, bint *again) noexcept nogil:
    """Walk the entries of one reply; an empty one is the end."""
    cdef uint32_t head = ENTRY_SIZE if p.check == CHECK_LISTING_PLUS else 0
    cdef const char *data = slot_pages(w.load.t, s)
    cdef uint64_t at = 0, end = s.out_bytes, size, nodeid = 0
    cdef dirent_t entry
    while at + head + DIRENT_SIZE <= end:
        memcpy(&entry, data + at + head, DIRENT_SIZE)
        size = (head + DIRENT_SIZE + <uint64_t>entry.namelen + 7) & ~<uint64_t>7
        if entry.namelen == 0 or at + size > end:
            break
        if head and w.load.made_max:
            memcpy(&nodeid, data + at, 8)
            if nodeid and w.n_made < w.load.made_max:
                w.made[w.n_made] = nodeid
                w.n_made += 1
        w.position = entry.off
        w.entries += 1
        at += size
    if at != end:
        return fail(w, FAIL_LISTING, <int64_t>at, <int64_t>end)
    again[0] = end > 0
    if end == 0 and w.entries != p.want:
        return fail(w, FAIL_ENTRIES, <int64_t>w.entries, <int64_t>p.want)
    if end == 0:
        w.queue.entries += w.entries
    return True


cdef bint accept(worker_t *w, step_t *p, slot_t *s, bint *again) noexcept nogil:
    """Whether the reply is right. again: the same step is to be sent once more."""
    cdef char *body = slot_out(w.load.t, s) + FUSE_OUT_HEADER
    cdef uint32_t n
    if p.check == CHECK_ABSENT:
        if s.error == -ENOENT or (s.error == 0 and (<fuse_entry_out *>body).nodeid == 0):
            return True
        return fail(w, FAIL_ERROR, -s.error, ENOENT)
    if s.error != -p.error:
        return fail(w, FAIL_ERROR, -s.error, p.error)
    if s.error or p.check == CHECK_NOTHING:
        return True
    if p.check == CHECK_ATTR:
        return attr_right(w, p, &(<fuse_attr_out *>body).attr)
    if p.check == CHECK_KNOWN or p.check == CHECK_MADE:
        return entry_right(w, p, <fuse_entry_out *>body)
    if p.check == CHECK_OPENED:
        memcpy(&w.fh, body, 8)
        return True
    if p.check == CHECK_CREATED:
        memcpy(&w.fh, body + ENTRY_SIZE, 8)
        return entry_right(w, p, <fuse_entry_out *>body)
    if p.check == CHECK_DATA:
        return data_right(w, s)
    if p.check == CHECK_WRITTEN:
        n = (<fuse_write_out *>body).size
        w.queue.bytes += n
        return n == p.in_pages or fail(w, FAIL_LENGTH, n, p.in_pages)
    if p.check == CHECK_BYTES:
        if p.out_pages:
            body = slot_pages(w.load.t, s)
        if s.out_bytes == p.reply_len and memcmp(body, p.reply, p.reply_len) == 0:
            return True
        return fail(w, FAIL_BYTES, s.out_bytes, p.reply_len)
    return listing_right(w, p, s, again)


cdef void forget_made(worker_t *w) noexcept nogil:
    """Forget what the operation has been given; not faster than the daemon takes them."""
    cdef load_t *l = w.load
    cdef uint32_t i
    for i in range(w.n_made):
        forget_send(l.t, w.made[i], 1)
    w.n_made = 0
    while load_relaxed_u64(&l.t.vqs[0].in_flight) > FORGETS_MAX:
        sched_yield()


cdef void retire(worker_t *w, uint64_t now) noexcept nogil:
    cdef load_t *l = w.load
    cdef int fd = l.done_fd
    cdef uint64_t one = 1
    if add_u64(&l.active, <uint64_t>-1) == 0:
        store_release_u64(&l.ended, now)
        c_write(fd, &one, sizeof(one))  # nothing of the load may be touched after this


cdef uint64_t next_step(worker_t *w, uint64_t now) noexcept nogil:
    """On to the next request of the operation, sending forgets that come before it: the time then."""
    cdef load_t *l = w.load
    w.step += 1
    w.position = 0
    w.entries = 0
    while w.step < l.n_steps and l.steps[w.step].opcode == FORGET:
        forget_made(w)
        w.step += 1
        now = now_ns()
    return now


cdef void on_reply(slot_t *s, void *owner) noexcept nogil:
    cdef worker_t *w = <worker_t *>owner
    cdef load_t *l = w.load
    cdef queue_t *q = w.queue
    cdef uint64_t now = now_ns()
    cdef bint again = False
    hist_add(&q.hists[1 + w.step], now - w.sent)
    count_u64(&q.requests, 1)
    if not accept(w, &l.steps[w.step], s, &again):
        retire(w, now)
        return
    if not again:
        now = next_step(w, now)
    if w.step == l.n_steps:
        hist_add(&q.hists[0], now - w.began)
        q.ops += 1
        if load_acquire_u64(&l.stop) or (now >= l.deadline and q.ops >= l.ops_min):
            retire(w, now)
            return
        begin(w)
    prepare(w)
    send(w)


# --- Python ---

@cython.final
cdef class Load:
    """A program on a transport. One start() at a time; its results can be read when wait_fd is ready."""

    cdef Transport transport
    cdef load_t l
    cdef list kept         # what pointers point to
    cdef readonly object program
    cdef readonly int wait_fd

    def __cinit__(self, Transport transport not None, program, uint32_t depth, uint32_t queues):
        """depth: operations under way. queues: the request queues, from the first, to spread them over."""
        cdef load_t *l = &self.l
        cdef uint32_t i
        self.transport = transport
        self.program = program
        self.kept = []
        l.done_fd = self.wait_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if not 1 <= depth <= transport.t.n_slots or not 1 <= queues < transport.t.n_vqs or depth < queues:
            raise ValueError(f"depth {depth} over {queues} queues: the transport has fewer")
        l.t = &transport.t
        l.n_items = program.items.count
        l.n_steps = len(program.steps)
        l.block = program.file.block
        l.block_bits = program.file.blocks.bit_length() - 1
        l.size = program.file.size
        l.order = program.file.order
        l.seed = program.file.seed
        l.n_queues = queues
        l.n_workers = depth
        l.steps = <step_t *>calloc(l.n_steps, sizeof(step_t))
        l.nodes = <uint64_t *>calloc(len(program.items.nodes) + 1, sizeof(uint64_t))
        l.queues = <queue_t *>calloc(queues, sizeof(queue_t))
        l.workers = <worker_t *>calloc(depth, sizeof(worker_t))
        if l.steps == NULL or l.nodes == NULL or l.queues == NULL or l.workers == NULL:
            raise MemoryError
        for i in range(<uint32_t>len(program.items.nodes)):
            l.nodes[i] = program.items.nodes[i]
        for i in range(l.n_steps):
            self.add_step(&l.steps[i], program.steps[i])
        self.add_workers()

    cdef int add_step(self, step_t *p, step) except -1:
        cdef bytes args = step.args
        cdef bytes reply = step.reply
        self.kept += [args, reply]
        p.opcode = step.opcode
        p.node_from = step.node_from
        p.node = step.node
        p.args = PyBytes_AS_STRING(args)
        p.args_len = len(args)
        p.number = step.number
        p.number_at = step.number_at
        p.second_at = step.second_at
        p.fh_at = step.fh_at
        p.offset_at = step.offset_at
        p.out_args = step.out_args
        p.out_pages = step.out_pages
        p.in_pages = step.in_pages
        self.l.in_pages = max(self.l.in_pages, p.in_pages)
        p.flags = REQ_ARGVAR if step.argvar else 0
        p.check = step.check
        p.error = step.error
        p.mode = step.mode
        p.want = step.want
        p.reply = PyBytes_AS_STRING(reply)
        p.reply_len = len(reply)
        if step.check in (Check.MADE, Check.CREATED):
            self.l.made_max += 1
        elif step.check == Check.LISTING_PLUS and FORGET in [s.opcode for s in self.program.steps]:
            self.l.made_max += step.want
        return 0

    cdef int add_workers(self) except -1:
        cdef load_t *l = &self.l
        cdef uint32_t i
        for i in range(l.n_queues):
            l.queues[i].load = l
            l.queues[i].index = i
            l.queues[i].hists = <hist_t *>calloc(1 + l.n_steps, sizeof(hist_t))
            if l.queues[i].hists == NULL:
                raise MemoryError
        for i in range(l.n_workers):
            l.workers[i].load = l
            l.workers[i].queue = &l.queues[i % l.n_queues]
            l.workers[i].number = i
            l.workers[i].made = <uint64_t *>calloc(l.made_max + 1, sizeof(uint64_t))
            if l.workers[i].made == NULL:
                raise MemoryError
        return 0

    def __dealloc__(self):
        cdef uint32_t i
        if self.l.active:
            return  # replies may still come: a leak is better than what they would write to
        if self.l.queues != NULL:
            for i in range(self.l.n_queues):
                free(self.l.queues[i].hists)
        if self.l.workers != NULL:
            for i in range(self.l.n_workers):
                free(self.l.workers[i].made)
        free(self.l.queues)
        free(self.l.workers)
        free(self.l.steps)
        free(self.l.nodes)
        os.close(self.wait_fd)

    def start(self, double seconds, uint64_t ops_min=0, bint whole=False, uint64_t seed=0):
        """Begin, and count from zero.

        No operation begins after `seconds`, once each queue has done ops_min. whole: compare all
        that is read. seed: of what is written or read, if not 0.
        """
        cdef load_t *l = &self.l
        cdef slot_t *s
        cdef uint32_t i, at
        if l.active:
            raise RuntimeError("it is running")
        for i in range(l.n_queues):
            l.queues[i].next = l.queues[i].ops = l.queues[i].requests = 0
            l.queues[i].bytes = l.queues[i].entries = 0
            memset(l.queues[i].hists, 0, (1 + l.n_steps) * sizeof(hist_t))
        l.stop = l.failed = l.ended = 0
        l.whole = whole
        l.ops_min = ops_min
        if seed:
            l.seed = seed
        for i in range(l.n_workers):
            with nogil:
                s = slot_get(l.t)
            if s == NULL:
                for at in range(i):
                    slot_put(l.t, l.workers[at].slot)
                raise OSError("the transport has been closed")
            l.workers[i].slot = s
            s.done = on_reply
            s.owner = &l.workers[i]
            for at in range(l.in_pages // PAGE_BYTES):
                page_fill(slot_pages(l.t, s) + at * PAGE_BYTES, 0, 0)
            # All before the first is sent: what they count is the completion thread's from then on.
            begin(&l.workers[i])
            prepare(&l.workers[i])
        l.active = l.n_workers
        l.deadline = now_ns() + <uint64_t>(seconds * 1e9)
        with nogil:
            for i in range(l.n_workers):
                send(&l.workers[i])

    def stop(self):
        """No operation begins any more; those under way are ended."""
        store_release_u64(&self.l.stop, 1)

    def finish(self):
        """Give the slots back, after wait_fd could be read."""
        cdef uint32_t i
        os.eventfd_read(self.wait_fd)
        assert load_acquire_u64(&self.l.active) == 0
        for i in range(self.l.n_workers):
            slot_put(self.l.t, self.l.workers[i].slot)

    @property
    def progress(self):
        """Requests answered so far; at any time."""
        cdef uint32_t i
        cdef uint64_t n = 0
        for i in range(self.l.n_queues):
            n += load_relaxed_u64(&self.l.queues[i].requests)
        return n

    @property
    def failure(self):
        """None, or (step, code of Wrong, got, wanted), of the first reply that was wrong."""
        cdef load_t *l = &self.l
        if l.failed == 0:
            return None
        return l.failed_step, l.failed, l.failed_got, l.failed_want

    def totals(self):
        """(operations, requests, bytes of data, entries, ns when the last ended by the monotonic clock)."""
        cdef uint32_t i
        cdef uint64_t ops = 0, n = 0, entries = 0
        for i in range(self.l.n_queues):
            ops += self.l.queues[i].ops
            n += self.l.queues[i].bytes
            entries += self.l.queues[i].entries
        return ops, self.progress, n, entries, self.l.ended

    def begun(self):
        """By queue: operations begun, whose items are number * queues + queue."""
        return [self.l.queues[i].next for i in range(self.l.n_queues)]

    def histogram(self, uint32_t queue, uint32_t which):
        """As _measure.count: of operations (0) or a step (1 and up)."""
        cdef hist_t *h
        if queue >= self.l.n_queues or which > self.l.n_steps:
            raise IndexError(queue, which)
        h = &self.l.queues[queue].hists[which]
        return h.n, h.sum, h.min, h.max, PyBytes_FromStringAndSize(<char *>h.counts, HIST_BUCKETS * 8)
