"""The driver's queues: submit, complete, retry, drain (fs/fuse/virtio_fs.c)."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport E2BIG, EIO, ENOSPC, ENOTCONN, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset, strncpy

from vfsd._ring cimport (
    DriverRing, GuestMemory, driver_add, driver_disable_call, driver_enable_call, driver_pop_used,
    driver_publish, driver_wants_kick, memory_from_gpa, sg_t,
)
from vfsd._wire cimport FUSE_IN_HEADER, FUSE_OUT_HEADER, fuse_forget_in, fuse_in_header, fuse_out_header
from vfsd._threads cimport (
    pthread_cond_broadcast, pthread_cond_init, pthread_cond_signal, pthread_cond_wait,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

import logging
import os
import threading
from collections import namedtuple

from vfsd.fuse.opcodes import NAME as OPCODE_NAME
from vfsd.fuse.opcodes import NUMBER as OPCODE_NUMBER

__all__ = ("RingPlace", "Transport")

log = logging.getLogger("vfsd.guest")

cdef extern from "_atomics.h" nogil:
    uint64_t add_u64(uint64_t *p, uint64_t v)
    uint64_t load_relaxed_u64(const uint64_t *p)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    short POLLIN

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t n)
    ssize_t c_write "write"(int fd, const void *data, size_t n)

cdef enum:
    TAKEN_MAX = 64       # used elements taken from the ring before any is ended
    ERRNO_LIMIT = 512    # an error of a reply lies above its negative
    FORGET_SIZE = 48     # in header and fuse_forget_in

cdef uint64_t FORGET_TOKEN = 1ULL << 32
cdef uint32_t FORGET = OPCODE_NUMBER["FORGET"]

RingPlace = namedtuple(
    "RingPlace", "num desc avail used indirect kick_fd kick_message call_fd", module=__name__)


# --- slots ---

cdef slot_t *slot_get(transport_t *t) noexcept nogil:
    cdef slot_t *s
    pthread_mutex_lock(&t.free_lock)
    while t.free == NULL and not t.stop:
        pthread_cond_wait(&t.freed, &t.free_lock)
    s = NULL if t.stop else t.free
    if s != NULL:
        t.free = s.next
    pthread_mutex_unlock(&t.free_lock)
    if s != NULL:
        s.in_args = s.in_pages = s.out_args = s.out_pages = s.flags = 0
        s.done = NULL
        s.error = 0
        s.out_bytes = 0
        s.finished = s.sent = s.counted = False
        memset(slot_header(t, s), 0, FUSE_IN_HEADER)
    return s


cdef void slot_put(transport_t *t, slot_t *s) noexcept nogil:
    pthread_mutex_lock(&t.free_lock)
    s.next = t.free
    t.free = s
    pthread_cond_signal(&t.freed)
    pthread_mutex_unlock(&t.free_lock)


cdef char *slot_header(transport_t *t, slot_t *s) noexcept nogil:
    return t.arena + s.index * t.stride


cdef inline uint32_t out_offset(slot_t *s) noexcept nogil:
    return (FUSE_IN_HEADER + s.in_args + 7) & ~<uint32_t>7


cdef char *slot_out(transport_t *t, slot_t *s) noexcept nogil:
    return slot_header(t, s) + out_offset(s)


cdef char *slot_pages(transport_t *t, slot_t *s) noexcept nogil:
    return slot_header(t, s) + SLOT_ARGS


cdef bint slot_fits(transport_t *t, slot_t *s) noexcept nogil:
    cdef uint64_t limit = <uint64_t>t.max_pages * PAGE
    return (<uint64_t>s.in_args + s.out_args + FUSE_IN_HEADER + FUSE_OUT_HEADER + 8 <= SLOT_ARGS
            and s.in_pages <= limit and s.out_pages <= limit)


# --- scatter-gather ---

cdef uint32_t odd(transport_t *t) noexcept nogil:
    """The next number of a xorshift generator: element lengths nobody expects."""
    t.scramble ^= t.scramble << 13
    t.scramble ^= t.scramble >> 17
    t.scramble ^= t.scramble << 5
    return t.scramble


cdef uint32_t add_part(transport_t *t, vq_t *q, uint32_t n, uint64_t gpa, uint32_t size, uint32_t most) noexcept nogil:
    """Elements of at most `most` bytes for one part of a request: the number there are then."""
    cdef uint32_t length
    while size:
        if n >= q.driver.num:
            return n + 1  # more than the ring holds: refused by driver_add
        length = size if size < most else most
        # Whole parts once half of the ring is used: scrambling must not make a request too long.
        if t.scramble and n < q.driver.num // 2:
            length = 1 + odd(t) % (size if size < 3 * PAGE else 3 * PAGE)
            length = size if length > size else length
        elif t.scramble:
            length = size
        q.sg[n].gpa = gpa
        q.sg[n].len = length
        n += 1
        gpa += length
        size -= length
    return n


cdef uint32_t add_head(transport_t *t, vq_t *q, uint32_t n, uint64_t gpa, uint32_t header, uint32_t args) noexcept nogil:
    """A header and the arguments behind it: an element each, unless scrambled."""
    if t.scramble:
        return add_part(t, q, n, gpa, header + args, SLOT_ARGS)
    n = add_part(t, q, n, gpa, header, SLOT_ARGS)
    return add_part(t, q, n, gpa + header, args, SLOT_ARGS)


cdef int enqueue(transport_t *t, vq_t *q, slot_t *s) noexcept nogil:
    """virtio_fs_enqueue_req: 0, -ENOTCONN, -ENOSPC (full now), -E2BIG (never fits). Under q.lock."""
    cdef uint64_t gpa = t.arena_gpa + s.index * t.stride
    cdef uint64_t out = gpa + out_offset(s)
    cdef uint32_t readable, n
    cdef int rc
    if not q.connected:
        return -ENOTCONN
    n = add_head(t, q, 0, gpa, FUSE_IN_HEADER, s.in_args)
    n = add_part(t, q, n, gpa + SLOT_ARGS, s.in_pages, PAGE)
    readable = n
    n = add_head(t, q, n, out, FUSE_OUT_HEADER, s.out_args)
    n = add_part(t, q, n, gpa + SLOT_ARGS, s.out_pages, PAGE)
    if n > q.driver.num:
        return -E2BIG
    rc = driver_add(q.driver, q.sg, readable, n - readable, s.index)
    if rc < 0:
        return rc
    s.sent = True
    driver_publish(q.driver)
    return 0


cdef void kick(vq_t *q) noexcept nogil:
    """After publishing, and outside q.lock: a kick may wake the other side at once."""
    add_u64(&q.kicks, 1)
    c_write(q.kick_fd, q.kick_bytes, q.kick_len)


# --- submit ---

cdef void slot_send(transport_t *t, slot_t *s, uint32_t queue, bint keep_unique) noexcept nogil:
    cdef vq_t *q = &t.vqs[queue]
    cdef fuse_in_header *header = <fuse_in_header *>slot_header(t, s)
    cdef bint kicks = False
    cdef int rc = -E2BIG
    s.queue = queue
    header.len = FUSE_IN_HEADER + s.in_args + s.in_pages
    if not keep_unique:
        header.unique = add_u64(&t.unique, 2)
    s.unique = header.unique
    add_u64(&t.opcodes[header.opcode % OPCODES_MAX], 1)
    if slot_fits(t, s):
        pthread_mutex_lock(&q.lock)
        rc = enqueue(t, q, s)
        if rc == 0:
            q.in_flight += 1
            q.requests += 1
            kicks = driver_wants_kick(q.driver)
        elif rc == -ENOSPC:
            queue_add(q, s)
            q.in_flight += 1
            rc = 0
        pthread_mutex_unlock(&q.lock)
    if kicks:
        kick(q)
    if rc < 0:
        end_later(t, s, rc)


cdef void queue_add(vq_t *q, slot_t *s) noexcept nogil:
    s.next = NULL
    if q.queued == NULL:
        q.queued = s
    else:
        q.queued_last.next = s
    q.queued_last = s


cdef slot_t *queue_take(vq_t *q) noexcept nogil:
    cdef slot_t *s = q.queued
    if s != NULL:
        q.queued = s.next
    return s


cdef void end_later(transport_t *t, slot_t *s, int error) noexcept nogil:
    """Who submits may hold locks that the end of the request takes: the worker ends it."""
    cdef bint worker_gone
    s.error = error
    pthread_mutex_lock(&t.work_lock)
    worker_gone = t.worker_gone
    if not worker_gone:
        s.next = NULL
        if t.ending == NULL:
            t.ending = s
        else:
            t.ending_last.next = s
        t.ending_last = s
        pthread_cond_signal(&t.work)
    pthread_mutex_unlock(&t.work_lock)
    if worker_gone:
        finish(s)  # closed since it got its slot


cdef void finish(slot_t *s) noexcept nogil:
    """fuse_request_end. The slot may be somebody else's afterwards."""
    if s.done != NULL:
        s.done(s, s.owner)
        return
    pthread_mutex_lock(&s.lock)
    s.finished = True
    pthread_cond_signal(&s.ended)
    pthread_mutex_unlock(&s.lock)


cdef int slot_wait(transport_t *t, slot_t *s) noexcept nogil:
    pthread_mutex_lock(&s.lock)
    while not s.finished:
        pthread_cond_wait(&s.ended, &s.lock)
    pthread_mutex_unlock(&s.lock)
    return s.error


# --- forgets ---

cdef int forget_enqueue(transport_t *t, uint64_t nodeid, uint64_t nlookup) noexcept nogil:
    """send_forget_request's virtqueue_add_outbuf: header and argument, nothing else. Under the lock."""
    cdef vq_t *q = &t.vqs[0]
    cdef fuse_in_header *header
    cdef fuse_forget_in *arg
    cdef uint32_t i
    cdef int rc
    if t.n_forget_free == 0:
        return -ENOSPC
    i = t.forget_free[t.n_forget_free - 1]
    header = <fuse_in_header *>(t.forget_memory + i * FORGET_BYTES)
    arg = <fuse_forget_in *>(header + 1)
    memset(header, 0, FORGET_SIZE)
    header.len = FORGET_SIZE
    header.opcode = FORGET
    header.unique = add_u64(&t.unique, 2)
    header.nodeid = nodeid
    arg.nlookup = nlookup
    q.sg[0].gpa = t.forget_gpa + i * FORGET_BYTES
    q.sg[0].len = FORGET_SIZE
    rc = driver_add(q.driver, q.sg, 1, 0, FORGET_TOKEN | i)
    if rc >= 0:
        t.n_forget_free -= 1
        driver_publish(q.driver)
        q.requests += 1
    return rc


cdef bint forget_keep(transport_t *t, uint64_t nodeid, uint64_t nlookup) noexcept nogil:
    cdef forget_t *more
    if t.n_forgets == t.forgets_max:
        more = <forget_t *>realloc(t.forgets, 2 * (t.forgets_max + 32) * sizeof(forget_t))
        if more == NULL:
            return False
        t.forgets = more
        t.forgets_max = 2 * (t.forgets_max + 32)
    t.forgets[t.n_forgets].nodeid = nodeid
    t.forgets[t.n_forgets].nlookup = nlookup
    t.n_forgets += 1
    return True


cdef void forget_send(transport_t *t, uint64_t nodeid, uint64_t nlookup) noexcept nogil:
    cdef vq_t *q = &t.vqs[0]
    cdef bint kicks = False
    cdef int rc
    pthread_mutex_lock(&q.lock)
    if q.connected:
        rc = forget_enqueue(t, nodeid, nlookup)
        if rc >= 0 or (rc == -ENOSPC and forget_keep(t, nodeid, nlookup)):
            q.in_flight += 1
        if rc >= 0:
            add_u64(&t.opcodes[FORGET], 1)
            kicks = driver_wants_kick(q.driver)
    pthread_mutex_unlock(&q.lock)
    if kicks:
        kick(q)


cdef void retry_forgets(transport_t *t) noexcept nogil:
    cdef vq_t *q = &t.vqs[0]
    cdef bint kicks = False
    pthread_mutex_lock(&q.lock)
    while t.n_forgets and q.connected:
        if forget_enqueue(t, t.forgets[t.n_forgets - 1].nodeid, t.forgets[t.n_forgets - 1].nlookup) < 0:
            break
        t.n_forgets -= 1
        q.retries += 1
        add_u64(&t.opcodes[FORGET], 1)
    if not q.connected:
        drop_in_flight(q, t.n_forgets)
        t.n_forgets = 0
    q.retry = False
    kicks = driver_wants_kick(q.driver)
    pthread_mutex_unlock(&q.lock)
    if kicks:
        kick(q)


# --- completion ---

cdef void drop_in_flight(vq_t *q, uint64_t n) noexcept nogil:
    """dec_in_flight_req. Under q.lock."""
    q.in_flight -= n
    if q.in_flight == 0:
        pthread_cond_broadcast(&q.zero)


cdef int verify(transport_t *t, slot_t *s, uint32_t written) noexcept nogil:
    """virtio_fs_verify_response of Linux 7.3: the reply's error, or -EIO for a reply that is none."""
    cdef fuse_out_header out
    cdef uint32_t whole = s.out_args + s.out_pages
    cdef uint32_t last = s.out_pages if s.out_pages else s.out_args
    if written < FUSE_OUT_HEADER:
        return -EIO
    memcpy(&out, slot_out(t, s), sizeof(out))
    if out.len != written or out.unique != s.unique or not -ERRNO_LIMIT < out.error <= 0:
        return -EIO
    written -= FUSE_OUT_HEADER
    if out.error:
        return out.error if written == 0 else -EIO
    if written > whole or (written < whole and not (s.flags & REQ_ARGVAR and whole - written <= last)):
        return -EIO
    s.out_bytes = written
    return 0


cdef struct taken_t:
    uint64_t token
    uint32_t written


cdef int take_used(transport_t *t, vq_t *q, taken_t *taken) noexcept nogil:
    """Move used elements off the ring, claiming their requests: the number, or -EIO."""
    cdef int n = 0, rc = 0
    pthread_mutex_lock(&q.lock)
    while n < TAKEN_MAX and not q.aborted:
        rc = driver_pop_used(q.driver, &taken[n].token, &taken[n].written)
        if rc <= 0:
            break
        if taken[n].token & FORGET_TOKEN:
            t.forget_free[t.n_forget_free] = <uint32_t>taken[n].token
            t.n_forget_free += 1
            n += 1
        elif t.slots[taken[n].token].sent:
            t.slots[taken[n].token].sent = False
            n += 1
    pthread_mutex_unlock(&q.lock)
    return rc if rc < 0 and n == 0 else n


cdef void complete(transport_t *t, vq_t *q, taken_t *taken, int n) noexcept nogil:
    cdef slot_t *s
    cdef bint queued
    cdef int i, ended = n
    for i in range(n):
        if taken[i].token & FORGET_TOKEN:
            continue
        s = &t.slots[taken[i].token]
        s.error = verify(t, s, taken[i].written)
        s.counted = s.flags & REQ_MAY_BLOCK
        if s.counted:
            ended -= 1
        finish(s)
    pthread_mutex_lock(&q.lock)
    drop_in_flight(q, ended)
    queued = q.queued != NULL or (q == t.vqs and t.n_forgets > 0)
    q.retry = queued
    pthread_mutex_unlock(&q.lock)
    if queued:
        pthread_mutex_lock(&t.work_lock)
        pthread_cond_signal(&t.work)
        pthread_mutex_unlock(&t.work_lock)


cdef void wait_call(vq_t *q) noexcept nogil:
    cdef pollfd fds[2]
    cdef uint64_t count = 0
    cdef int i
    fds[0].fd = q.call_fd
    fds[1].fd = q.wake_fd
    fds[0].events = fds[1].events = POLLIN
    fds[0].revents = fds[1].revents = 0
    poll(fds, 2, -1)
    for i in range(2):
        if fds[i].revents:
            c_read(fds[i].fd, &count, sizeof(count))
    if fds[0].revents:
        add_u64(&q.calls, 1)


cdef void completion_loop(transport_t *t, vq_t *q) noexcept nogil:
    """virtio_fs_requests_done_work, and virtio_fs_hiprio_done_work."""
    cdef taken_t taken[TAKEN_MAX]
    cdef int n
    while not t.stop and not q.aborted:
        driver_disable_call(q.driver)
        n = 1
        while n > 0:
            n = take_used(t, q, taken)
            if n > 0:
                complete(t, q, taken, n)
        if n < 0:
            q.broken = EIO
            abort_queue(t, q, EIO)
            return
        if not q.polling and not driver_enable_call(q.driver):
            wait_call(q)


# --- the worker: ends what may not end elsewhere, and retries (virtio_fs_request_dispatch_work) ---

cdef void retry_queued(transport_t *t, vq_t *q) noexcept nogil:
    """One pass over the queued requests; one that finds the ring full goes to the tail."""
    cdef slot_t *s
    cdef bint kicks = False
    cdef int rc
    while True:
        pthread_mutex_lock(&q.lock)
        q.retry = False
        s = queue_take(q)
        rc = -ENOSPC
        if s != NULL:
            rc = enqueue(t, q, s)
            if rc == 0:
                q.requests += 1
                q.retries += 1
            elif rc == -ENOSPC:
                queue_add(q, s)
            else:
                drop_in_flight(q, 1)
        kicks = driver_wants_kick(q.driver)
        pthread_mutex_unlock(&q.lock)
        if kicks:
            kick(q)
        if rc == -ENOSPC:
            return
        if rc < 0:
            s.error = rc
            finish(s)


cdef bint has_work(transport_t *t) noexcept nogil:
    cdef uint32_t i
    if t.ending != NULL or t.stop:
        return True
    for i in range(t.n_vqs):
        if t.vqs[i].retry:
            return True
    return False


cdef void worker_loop(transport_t *t) noexcept nogil:
    cdef slot_t *ending
    cdef slot_t *s
    cdef uint32_t i
    while True:
        pthread_mutex_lock(&t.work_lock)
        while not has_work(t):
            pthread_cond_wait(&t.work, &t.work_lock)
        ending = t.ending
        t.ending = NULL
        pthread_mutex_unlock(&t.work_lock)
        if ending == NULL and t.stop:
            return
        while ending != NULL:
            s = ending
            ending = s.next
            finish(s)
        if t.vqs[0].retry:
            retry_forgets(t)
        for i in range(1, t.n_vqs):
            if t.vqs[i].retry:
                retry_queued(t, &t.vqs[i])


# --- the end ---

cdef void abort_queue(transport_t *t, vq_t *q, int error) noexcept nogil:
    """End all that is in flight on a queue, and what comes with ENOTCONN."""
    cdef slot_t *s
    cdef slot_t *ended = NULL
    cdef uint32_t i
    cdef uint64_t n = 0
    pthread_mutex_lock(&q.lock)
    q.connected = False
    if q.aborted:
        pthread_mutex_unlock(&q.lock)
        return
    q.aborted = True
    while q.queued != NULL:
        s = queue_take(q)
        s.next = ended
        ended = s
        s.counted = s.flags & REQ_MAY_BLOCK
        n += not s.counted
    for i in range(t.n_slots):
        s = &t.slots[i]
        if s.sent and &t.vqs[s.queue] == q:
            s.sent = False
            s.next = ended
            ended = s
            s.counted = s.flags & REQ_MAY_BLOCK
            n += not s.counted
    if q == t.vqs:
        n += t.n_forgets + (q.driver.num - t.n_forget_free)
        t.n_forgets = 0
    drop_in_flight(q, n)
    pthread_mutex_unlock(&q.lock)
    while ended != NULL:
        s = ended
        ended = s.next
        s.error = -error
        finish(s)


# --- Python ---

cdef void python_done(slot_t *s, void *owner) noexcept with gil:
    """The end of a request of Transport.submit."""
    pending = <Pending>owner
    try:
        pending.end(s)
    except BaseException:
        log.exception("the end of a request failed")
    Py_DECREF(pending)


@cython.final
cdef class Pending:
    """A request of Transport.submit on its way."""

    cdef Transport owner
    cdef object done

    cdef int end(self, slot_t *s) except -1:
        cdef transport_t *t = &self.owner.t
        result = self.owner.result(s)
        queue = s.queue if s.counted else -1
        own_thread = s.flags & REQ_MAY_BLOCK or t.worker_gone  # without a worker this is who submitted
        slot_put(t, s)
        if own_thread:
            thread = threading.Thread(target=self._run, args=(result, queue), name="virtiofs-end", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads: better here than never
                self._run(result, queue)
        else:
            self.done(*result)
        return 0

    def _run(self, result, int queue):
        """The body of a thread that may block; then the request is not in flight any more."""
        cdef vq_t *q
        try:
            self.done(*result)
        except BaseException:
            log.exception("the end of a request failed")
        finally:
            if queue >= 0:
                q = &self.owner.t.vqs[queue]
                pthread_mutex_lock(&q.lock)
                drop_in_flight(q, 1)
                pthread_mutex_unlock(&q.lock)


cdef object failed(int error):
    return OSError(-error, os.strerror(-error))


@cython.final
cdef class Transport:
    """The queues of one device. Index 0 is hiprio, 1 and up are request queues.

    memory, rings: where they lie (`RingPlace`); the arena of arena_bytes(slots, max_pages) at
    arena_gpa holds the requests. poll: look for completions all the time, on request queues.
    Descriptors stay the caller's until close().
    """

    def __cinit__(self, GuestMemory memory not None, rings, uint64_t arena_gpa, uint32_t slots,
                  uint32_t max_pages, bint event_idx=True, uint32_t scramble=0, bint poll=False):
        cdef transport_t *t = &self.t
        cdef uint32_t i
        self.memory = memory
        self.rings = []
        self.threads = []
        self.places = threading.local()
        self.lifecycle = threading.Lock()
        self.on_broken = None
        if slots == 0 or len(rings) < 2:
            raise ValueError("a transport has slots, hiprio and request queues")
        pthread_mutex_init(&t.free_lock, NULL)
        pthread_mutex_init(&t.work_lock, NULL)
        pthread_cond_init(&t.freed, NULL)
        pthread_cond_init(&t.work, NULL)
        t.max_pages = max_pages
        t.scramble = scramble
        t.stride = SLOT_ARGS + <uint64_t>max_pages * PAGE
        t.arena_gpa = arena_gpa
        t.arena = memory_from_gpa(&memory.table, arena_gpa,
                                  Transport.arena_bytes(slots, max_pages, rings[0].num), 1)
        if t.arena == NULL:
            raise ValueError("the arena is outside memory")
        t.slots = <slot_t *>calloc(slots, sizeof(slot_t))
        t.vqs = <vq_t *>calloc(len(rings), sizeof(vq_t))
        if t.slots == NULL or t.vqs == NULL:
            raise MemoryError
        for i in range(slots):
            t.slots[i].index = i
            pthread_mutex_init(&t.slots[i].lock, NULL)
            pthread_cond_init(&t.slots[i].ended, NULL)
            t.slots[i].next = &t.slots[i + 1] if i + 1 < slots else NULL
        t.free = t.slots
        t.n_slots = slots
        for i, place in enumerate(rings):
            self.add_queue(i, place, event_idx, poll and i > 0)
        self.add_forgets(arena_gpa + slots * t.stride, rings[0].num)

    cdef int add_queue(self, uint32_t i, place, bint event_idx, bint poll) except -1:
        cdef vq_t *q = &self.t.vqs[i]
        cdef DriverRing ring = DriverRing(
            self.memory, place.num, place.desc, place.avail, place.used, event_idx, place.indirect)
        cdef bytes message = place.kick_message
        cdef bytes name = b"hiprio" if i == 0 else b"requests.%u" % (i - 1)
        cdef const char *text = name
        assert len(message) <= KICK_BYTES_MAX
        self.rings.append(ring)
        q.wake_fd = -1
        self.t.n_vqs = i + 1
        strncpy(q.name, text, QUEUE_NAME_LEN - 1)  # the last byte stays NUL
        q.driver = &ring.driver
        q.sg = <sg_t *>calloc(place.num + 1, sizeof(sg_t))
        if q.sg == NULL:
            raise MemoryError
        q.kick_fd = place.kick_fd
        q.kick_len = len(message)
        memcpy(q.kick_bytes, PyBytes_AS_STRING(message), len(message))
        q.call_fd = place.call_fd
        q.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        q.connected = True
        q.polling = poll
        pthread_mutex_init(&q.lock, NULL)
        pthread_cond_init(&q.zero, NULL)
        return 0

    cdef int add_forgets(self, uint64_t gpa, uint32_t n) except -1:
        cdef transport_t *t = &self.t
        cdef GuestMemory memory = self.memory
        cdef uint32_t i
        t.forget_gpa = gpa
        t.forget_memory = memory_from_gpa(&memory.table, gpa, <uint64_t>n * FORGET_BYTES, 1)
        t.forget_free = <uint32_t *>calloc(n, sizeof(uint32_t))
        if t.forget_memory == NULL or t.forget_free == NULL:
            raise MemoryError
        for i in range(n):
            t.forget_free[i] = i
        t.n_forget_free = n
        return 0

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.t.n_vqs):
            free(self.t.vqs[i].sg)
            if self.t.vqs[i].wake_fd >= 0:
                os.close(self.t.vqs[i].wake_fd)
        free(self.t.vqs)
        free(self.t.slots)
        free(self.t.forgets)
        free(self.t.forget_free)

    @staticmethod
    def arena_bytes(slots, max_pages, hiprio_num):
        """How much guest memory that many slots, and a hiprio queue's forgets, take."""
        return slots * (SLOT_ARGS + max_pages * PAGE) + hiprio_num * FORGET_BYTES

    @property
    def names(self):
        """The queues' names, as the kernel gives them."""
        return [self.t.vqs[i].name.decode() for i in range(self.t.n_vqs)]

    @property
    def max_pages(self):
        """Data pages of one request."""
        return self.t.max_pages

    @property
    def in_flight(self):
        """Requests and forgets on rings and queued."""
        cdef uint32_t i
        cdef uint64_t n = 0
        for i in range(self.t.n_vqs):
            n += self.t.vqs[i].in_flight
        return n

    # threads

    def start(self):
        """Start the completion threads and the worker."""
        loops = [(self._run_completion, (i,), self.t.vqs[i].name.decode()) for i in range(self.t.n_vqs)]
        for body, args, name in [*loops, (self._run_worker, (), "virtiofs-worker")]:
            thread = threading.Thread(target=body, args=args, name=name, daemon=True)
            self.threads.append(thread)
            thread.start()

    def _run_completion(self, uint32_t queue):
        """The body of a queue's completion thread."""
        with nogil:
            completion_loop(&self.t, &self.t.vqs[queue])
        if self.t.vqs[queue].broken:
            why = f"{self.t.vqs[queue].name.decode()}: the device's used ring can't be true"
            log.error("%s; the queue is given up", why)
            if self.on_broken is not None:
                self.on_broken(why)

    def _run_worker(self):
        """The body of the worker thread."""
        with nogil:
            worker_loop(&self.t)

    # requests

    cdef slot_t *fill(self, uint32_t opcode, uint64_t nodeid, bytes args, uint32_t out, data, uint64_t into,
                      uint32_t uid, uint32_t gid, uint32_t pid, uint16_t extlen) except NULL:
        """A slot with a request in it. OSError E2BIG, ENOTCONN."""
        cdef transport_t *t = &self.t
        cdef slot_t *s
        cdef fuse_in_header *header
        cdef const unsigned char[::1] view = None
        cdef uint64_t size = 0
        cdef uint64_t limit = <uint64_t>t.max_pages * PAGE
        if data is not None:
            view = data
            size = view.shape[0]
        if <uint64_t>len(args) + out + 64 > SLOT_ARGS or size > limit or into > limit:
            raise failed(-E2BIG)
        with nogil:
            s = slot_get(t)
        if s == NULL:
            raise failed(-ENOTCONN)
        header = <fuse_in_header *>slot_header(t, s)
        header.opcode = opcode
        header.nodeid = nodeid
        header.uid = uid
        header.gid = gid
        header.pid = pid
        header.total_extlen = extlen
        s.in_args = len(args)
        memcpy(header + 1, PyBytes_AS_STRING(args), len(args))
        s.in_pages = <uint32_t>size
        if size:
            memcpy(slot_pages(t, s), &view[0], size)
        s.out_args = out
        s.out_pages = <uint32_t>into
        return s

    cdef uint32_t place(self, queue) except 0:
        """The request queue to use: the one asked for, or this thread's."""
        cdef uint32_t n = self.t.n_vqs - 1
        if queue is not None:
            if not 0 < queue <= n:
                raise ValueError(f"there is no request queue {queue}")
            return queue
        mine = getattr(self.places, "queue", None)
        if mine is None:
            mine = self.places.queue = threading.get_native_id() % n + 1
        return mine

    cdef object result(self, slot_t *s):
        """(errno or 0, out arguments, data in pages)."""
        cdef uint32_t args = s.out_bytes if s.out_bytes < s.out_args else s.out_args
        cdef char *body = slot_out(&self.t, s) + FUSE_OUT_HEADER
        if s.error:
            return -s.error, b"", b""
        return (0, PyBytes_FromStringAndSize(body, args),
                PyBytes_FromStringAndSize(slot_pages(&self.t, s), s.out_bytes - args))

    def call(self, uint32_t opcode, uint64_t nodeid, bytes args=b"", *, uint32_t out=0, bint argvar=False,
             data=None, into=None, uint32_t uid=0, uint32_t gid=0, uint32_t pid=0, uint16_t extlen=0,
             queue=None):
        """Send one request and wait: (out arguments, bytes written to `into`).

        args: all in arguments that are no data, concatenated. out: bytes of out arguments.
        argvar: the last of them, or `into`, may come shorter. data: goes out in pages. into: a
        writable buffer, filled from pages. queue: a request queue; None takes this thread's.
        OSError: the reply's errno, or ENOTCONN, EIO (a reply that is none), E2BIG (longer than the
        ring or than max_pages allows).
        """
        cdef transport_t *t = &self.t
        cdef unsigned char[::1] view = None
        cdef uint64_t room = 0
        cdef slot_t *s
        cdef uint32_t q = self.place(queue), n
        cdef int error
        if into is not None:
            view = into
            room = view.shape[0]
        s = self.fill(opcode, nodeid, args, out, data, room, uid, gid, pid, extlen)
        s.flags = REQ_ARGVAR if argvar else 0
        with nogil:
            slot_send(t, s, q, False)
            error = slot_wait(t, s)
        if error:
            slot_put(t, s)
            raise failed(error)
        n = s.out_bytes if s.out_bytes < s.out_args else s.out_args
        reply = PyBytes_FromStringAndSize(slot_out(t, s) + FUSE_OUT_HEADER, n)
        n = s.out_bytes - n
        if n:
            memcpy(&view[0], slot_pages(t, s), n)
        slot_put(t, s)
        return reply, n

    def submit(self, done, uint32_t opcode, uint64_t nodeid, bytes args=b"", *, uint32_t out=0,
               bint argvar=False, data=None, uint64_t into=0, uint32_t uid=0, uint32_t gid=0,
               uint32_t pid=0, uint16_t extlen=0, queue=None, bint may_block=False):
        """The same without waiting: done(errno or 0, out arguments, data of `into` bytes at most).

        Called in a completion thread or the worker; with may_block in a thread of its own, so that
        it may wait for other replies.
        """
        cdef uint32_t q = self.place(queue)
        cdef slot_t *s = self.fill(opcode, nodeid, args, out, data, into, uid, gid, pid, extlen)
        cdef Pending pending = Pending.__new__(Pending)
        pending.owner = self
        pending.done = done
        Py_INCREF(pending)
        s.flags = (REQ_ARGVAR if argvar else 0) | (REQ_MAY_BLOCK if may_block else 0)
        s.owner = <void *>pending
        s.done = python_done
        with nogil:
            slot_send(&self.t, s, q, False)

    def forget(self, uint64_t nodeid, uint64_t nlookup):
        """One FORGET on hiprio, no reply. Dropped when the queue is not connected."""
        with nogil:
            forget_send(&self.t, nodeid, nlookup)

    # life

    def drain_queue(self, uint32_t queue):
        """virtio_fs_drain_queue: wait until nothing is in flight there."""
        cdef vq_t *q = &self.t.vqs[queue]
        if queue >= self.t.n_vqs:
            raise ValueError(f"there is no queue {queue}")
        with nogil:
            pthread_mutex_lock(&q.lock)
            while q.in_flight:
                pthread_cond_wait(&q.zero, &q.lock)
            pthread_mutex_unlock(&q.lock)

    def drain(self):
        """The same for all queues. A device that never answers is waited for."""
        for queue in range(self.t.n_vqs):
            self.drain_queue(queue)

    def _set_connected(self, bint connected, queue):
        if queue is not None and not 0 <= queue < self.t.n_vqs:
            raise ValueError(f"there is no queue {queue}")
        for i in range(self.t.n_vqs) if queue is None else (queue,):
            pthread_mutex_lock(&self.t.vqs[i].lock)
            self.t.vqs[i].connected = connected and not self.t.vqs[i].aborted
            pthread_mutex_unlock(&self.t.vqs[i].lock)

    def disconnect(self, queue=None):
        """New requests on that queue, or all, end with ENOTCONN; new forgets are dropped."""
        self._set_connected(False, queue)

    def connect(self):
        """Undo disconnect()."""
        self._set_connected(True, None)

    def restart_unique(self):
        """unique starts at 2 again (a new mount)."""
        self.t.unique = 0

    def abort(self, int error):
        """The device is gone: everything in flight ends with that errno, new requests with ENOTCONN."""
        cdef uint32_t i
        with nogil:
            for i in range(self.t.n_vqs):
                abort_queue(&self.t, &self.t.vqs[i], error)

    def close(self):
        """abort(ENOTCONN) and end the threads. Idempotent. Not for a completion thread to call."""
        cdef slot_t *s
        cdef slot_t *ending
        self.abort(ENOTCONN)
        with self.lifecycle:
            with nogil:
                pthread_mutex_lock(&self.t.free_lock)
                self.t.stop = True
                pthread_cond_broadcast(&self.t.freed)
                pthread_mutex_unlock(&self.t.free_lock)
                pthread_mutex_lock(&self.t.work_lock)
                pthread_cond_broadcast(&self.t.work)
                pthread_mutex_unlock(&self.t.work_lock)
            for i in range(self.t.n_vqs):
                if self.t.vqs[i].wake_fd >= 0:
                    os.eventfd_write(self.t.vqs[i].wake_fd, 1)
            for thread in self.threads:
                thread.join()
            self.threads.clear()
            for i in range(self.t.n_vqs):
                if self.t.vqs[i].wake_fd >= 0:
                    os.close(self.t.vqs[i].wake_fd)
                    self.t.vqs[i].wake_fd = -1
            with nogil:
                pthread_mutex_lock(&self.t.work_lock)
                self.t.worker_gone = True
                ending = self.t.ending
                self.t.ending = NULL
                pthread_mutex_unlock(&self.t.work_lock)
                while ending != NULL:  # what was refused after the worker's last look
                    s = ending
                    ending = s.next
                    finish(s)

    def counters(self):
        """By queue name: requests, kicks, calls, in_flight, queued, retries; "opcodes": requests by name."""
        cdef uint32_t i
        cdef vq_t *q
        cdef slot_t *s
        found = {}
        for i in range(self.t.n_vqs):
            q = &self.t.vqs[i]
            pthread_mutex_lock(&q.lock)
            queued = self.t.n_forgets if i == 0 else 0
            s = q.queued
            while s != NULL:
                queued += 1
                s = s.next
            found[q.name.decode()] = {
                "requests": q.requests, "kicks": q.kicks, "calls": q.calls,
                "in_flight": q.in_flight, "queued": queued, "retries": q.retries,
            }
            pthread_mutex_unlock(&q.lock)
        found["opcodes"] = opcodes = {}
        for opcode in range(OPCODES_MAX):
            n = load_relaxed_u64(&self.t.opcodes[opcode])
            if n:
                opcodes[OPCODE_NAME.get(opcode, str(opcode))] = n
        return found
