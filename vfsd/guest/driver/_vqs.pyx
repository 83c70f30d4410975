"""Requests on the device's queues: submit, complete, retry, drain (fs/fuse/virtio_fs.c)."""

from libc.errno cimport E2BIG, EIO, ENOSPC, ENOTCONN
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy, memset

from vfsd.virtqueue._driver_ring cimport (
    driver_add, driver_disable_call, driver_enable_call, driver_pop_used, driver_publish, driver_wants_kick,
)
from vfsd.sys._threads cimport (
    pthread_cond_broadcast, pthread_cond_signal, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock,
)
from vfsd.fuse._wire cimport FUSE_IN_HEADER, FUSE_OUT_HEADER, fuse_forget_in, fuse_in_header, fuse_out_header

from vfsd.fuse.opcodes import NUMBER as OPCODE_NUMBER

cdef extern from "_atomics.h" nogil:
    uint64_t add_u64(uint64_t *p, uint64_t v)

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


cdef uint32_t add_part(transport_t *t, vq_t *q, uint32_t n, uint64_t gpa, uint32_t size,
                       uint32_t most) noexcept nogil:
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


cdef uint32_t add_head(transport_t *t, vq_t *q, uint32_t n, uint64_t gpa, uint32_t header,
                       uint32_t args) noexcept nogil:
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
