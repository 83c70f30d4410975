"""One virtqueue and its thread (docs/architecture.md, "One request, end to end")."""

cimport cython
from libc.errno cimport EAGAIN, EFAULT, ENOLCK, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vfsd cimport _ring as ring
from vfsd._ring cimport GuestMemory, chain_t
from vfsd._pool cimport Pool, pool_submit, task_t
from vfsd.fuse.dispatch cimport (
    WAITS, WOULD_BLOCK, WOULD_WAIT, Dispatch, parked_t, request_blocks, request_parse, request_reply,
    request_run, request_t, span_t,
)
from vfsd._threads cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

import logging
import os
import stat
import threading

from vfsd._ring import CHAIN_ERRORS
from vfsd.fuse.opcodes import NAME as OPCODE_NAME
from vfsd.fuse.opcodes import NUMBER as OPCODE_NUMBER

__all__ = ("Queue",)

log = logging.getLogger("vfsd.queue")

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec *wanted, timespec *left)

cdef extern from *:
    """
    static inline uint64_t clock_ns(void)
    {
    	struct timespec now;
    	clock_gettime(CLOCK_MONOTONIC, &now);
    	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    """
    uint64_t clock_ns() noexcept nogil

cdef extern from "_atomics.h" nogil:
    void cpu_relax()
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    uint64_t load_relaxed_u64(const uint64_t *p)
    void count_u64(uint64_t *p, uint64_t v)

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
    unsigned int EPOLLIN
    unsigned int EPOLLET

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
    short POLLOUT

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void *data, size_t n, int flags)
    ssize_t recv(int fd, void *data, size_t n, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t n)
    int c_close "close"(int fd)

cdef extern from "<sys/mman.h>" nogil:
    int memfd_create(const char *name, unsigned int flags)
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, int64_t offset)
    int munmap(void *addr, size_t length)
    void *MAP_FAILED
    int MAP_SHARED
    int PROT_READ
    int PROT_WRITE
    unsigned int MFD_CLOEXEC

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *iov, int n, int64_t offset)
    ssize_t pwritev(int fd, const iovec *iov, int n, int64_t offset)

cdef extern from "<unistd.h>" nogil:
    int ftruncate(int fd, int64_t size)

cdef uint32_t READ = OPCODE_NUMBER["READ"]
cdef uint32_t WRITE = OPCODE_NUMBER["WRITE"]

cdef enum:
    IOV_MAX = 1024
    BOUNCE_BYTES = 1 << 22  # a request of 1 MiB, the most there is, and its headers
    WAKE = 0
    KICK = 1
    CHANNEL_POLL_MS = 50
    POLL_MIN_NS = 4000
    CLOCK_EVERY = 32  # looks at the ring for one at the clock
    LINGER_NS = 200000  # what nobody waits for (FORGET) is gathered for so long
    IOV_SLACK = 1024  # iovecs beyond one per element: a batch, and elements that cross regions

cdef uint64_t ONE = 1
COUNTS = ("requests", "errors", "bytes_in", "bytes_out")
EVENT = b"\1\0\0\0\0\0\0\0"  # what calls the guest through an eventfd: adds one


# --- the queue thread ---

cdef void call_guest(queue_t *q) noexcept nogil:
    if q.call_fd < 0:
        return
    count_u64(&q.calls, 1)
    q.owes_call = False
    # A full socket or counter means that the front end has calls to read: none is lost.
    if not q.call_is_socket:
        if not q.call_may_block or writable(q.call_fd, 0):
            c_write(q.call_fd, q.call_bytes, q.call_len)
    elif q.call_len == sizeof(ONE):
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


cdef void finish(queue_t *q, request_t *r, uint32_t head, uint64_t bytes_in, int rc) noexcept nogil:
    """Write the reply, count, give the chain back."""
    give_back(q, r, head, bytes_in, request_reply(r, rc), rc)


cdef void give_back(queue_t *q, request_t *r, uint32_t head, uint64_t bytes_in, uint32_t written, int rc) noexcept nogil:
    cdef uint32_t opcode = r.header.opcode
    cdef op_count_t *count = &q.ops[opcode if opcode < OPCODES_MAX else OPCODES_MAX]
    pthread_mutex_lock(&q.used_lock)
    count_u64(&count.requests, 1)
    count_u64(&count.bytes_in, bytes_in)
    count_u64(&count.bytes_out, written)
    if rc < 0:
        count_u64(&count.errors, 1)
    ring.ring_push(&q.ring, <uint16_t>head, written)
    pthread_mutex_unlock(&q.used_lock)
    if r.close_fd >= 0:
        c_close(r.close_fd)


cdef void call_if_wanted(queue_t *q) noexcept nogil:
    cdef bint wanted
    pthread_mutex_lock(&q.used_lock)
    wanted = ring.ring_wants_call(&q.ring)
    pthread_mutex_unlock(&q.used_lock)
    if wanted:
        call_guest(q)


cdef bint serve_chain(queue_t *q, chain_t *chain, bint last) noexcept nogil:
    """One request from parse to used element, or to the pool. False: this thread has lent the ring."""
    cdef request_t r
    cdef span_t readable, writable
    cdef job_t *job
    cdef int rc
    if chain.fragile:
        serve_fragile(q, chain)
        return True
    readable.iov = chain.readable
    readable.n = chain.n_readable
    readable.bytes = chain.readable_bytes
    writable.iov = chain.writable
    writable.n = chain.n_writable
    writable.bytes = chain.writable_bytes
    if not request_parse(q.dispatch, readable, writable, &r):
        pthread_mutex_lock(&q.used_lock)
        count_u64(&q.unanswered, 1)
        ring.ring_push(&q.ring, chain.head, 0)
        pthread_mutex_unlock(&q.used_lock)
        return True
    if chain.unmapped:
        r.error = -EFAULT
    rc = WOULD_BLOCK
    if not request_blocks(q.dispatch, &r):
        if r.in_python:
            call_if_wanted(q)
        rc = request_run(q.dispatch, &r)
        r.resumed = rc == WOULD_BLOCK
    if rc == WOULD_BLOCK:
        job = make_job(q, chain, &r)
        if job != NULL:
            if last and lend(q):
                run_job(&job.task)
                return False
            pool_submit(q.pool, &job.task)
            return True
        call_if_wanted(q)
        r.may_wait = True
        r.queue = q
        r.leave = leave_inline
        r.enter = enter_inline
        rc = request_run(q.dispatch, &r)
    if rc == WOULD_WAIT:
        park(q, chain, &r)
    else:
        finish(q, &r, chain.head, chain.readable_bytes, rc)
    return True


# --- buffers in files that may end ---

cdef bint make_bounce(queue_t *q) noexcept nogil:
    if q.bounce == NULL:
        q.bounce_fd = memfd_create(b"bounce", MFD_CLOEXEC)
        if q.bounce_fd < 0 or ftruncate(q.bounce_fd, 2 * BOUNCE_BYTES) < 0:
            return False
        q.bounce = <char *>mmap(NULL, 2 * BOUNCE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, q.bounce_fd, 0)
        if <void *>q.bounce == MAP_FAILED:
            q.bounce = NULL
    return q.bounce != NULL


cdef uint64_t bounce_move(queue_t *q, const iovec *iov, uint32_t n, int64_t at, bint out) noexcept nogil:
    """By the kernel, to which a page that is not there is no signal but an end: bytes moved."""
    cdef uint64_t done = 0, asked
    cdef uint32_t i = 0, j, part
    cdef ssize_t moved
    while i < n:
        part = min(n - i, <uint32_t>IOV_MAX)
        asked = 0
        for j in range(part):
            asked += iov[i + j].iov_len
        if out:
            moved = preadv(q.bounce_fd, iov + i, part, at + <int64_t>done)
        else:
            moved = pwritev(q.bounce_fd, iov + i, part, at + <int64_t>done)
        if moved > 0:
            done += moved
        if moved < <ssize_t>asked:
            break
        i += part
    return done


cdef uint32_t bounce_reply(queue_t *q, chain_t *chain, request_t *r, int rc) noexcept nogil:
    """Write the reply to the guest: bytes, 0 if it can't be."""
    cdef uint32_t written = request_reply(r, rc), left = written, n = 0
    cdef size_t last
    if written == 0:
        return 0
    while chain.writable[n].iov_len < left:
        left -= <uint32_t>chain.writable[n].iov_len
        n += 1
    last = chain.writable[n].iov_len
    chain.writable[n].iov_len = left
    if bounce_move(q, chain.writable, n + 1, BOUNCE_BYTES, True) < written:
        written = 0
    chain.writable[n].iov_len = last
    return written


cdef void serve_fragile(queue_t *q, chain_t *chain) noexcept nogil:
    """One request with buffers in a file that may end any time: what it works on is a copy.

    Data alone lies there in an honest guest: O_DIRECT to or from what it has mapped.
    """
    cdef request_t r
    cdef span_t readable, writable
    cdef iovec body, reply
    cdef uint32_t written
    cdef int rc = -EFAULT
    body.iov_len = readable.bytes = 0
    # A batch may be interrupted by one that was away: what it refers to may have gone since.
    if (q.removals == q.ring.memory.removals and make_bounce(q)
            and chain.readable_bytes <= BOUNCE_BYTES and chain.writable_bytes <= BOUNCE_BYTES):
        readable.bytes = bounce_move(q, chain.readable, chain.n_readable, 0, False)
    body.iov_base = q.bounce
    body.iov_len = readable.bytes
    reply.iov_base = q.bounce + BOUNCE_BYTES
    reply.iov_len = writable.bytes = chain.writable_bytes
    readable.iov = &body
    writable.iov = &reply
    readable.n = writable.n = 1
    if readable.bytes == 0 or not request_parse(q.dispatch, readable, writable, &r):
        pthread_mutex_lock(&q.used_lock)
        count_u64(&q.unanswered, 1)
        ring.ring_push(&q.ring, chain.head, 0)
        pthread_mutex_unlock(&q.used_lock)
        return
    if (readable.bytes == chain.readable_bytes and not chain.unmapped
            and (r.header.opcode == READ or r.header.opcode == WRITE)):
        r.may_wait = True
        rc = request_run(q.dispatch, &r)
    written = bounce_reply(q, chain, &r, rc)
    if written == 0 and r.n_head:
        rc = -EFAULT
        written = bounce_reply(q, chain, &r, rc)
    give_back(q, &r, chain.head, chain.readable_bytes, written, rc)


# --- the pool's side ---

cdef uint32_t keep_iov(span_t *s, iovec *to) noexcept nogil:
    """Move a span's iovecs out of the queue's array, which the next batch overwrites."""
    memcpy(to, s.iov, s.n * sizeof(iovec))
    s.iov = to
    return s.n


cdef job_t *make_job(queue_t *q, chain_t *chain, request_t *r) noexcept nogil:
    """A request that may wait, with all it needs kept. NULL: enough of this queue's are out already."""
    cdef job_t *job
    cdef uint32_t n
    pthread_mutex_lock(&q.used_lock)
    job = q.free_jobs
    if job != NULL:
        q.free_jobs = job.next
    pthread_mutex_unlock(&q.used_lock)
    if job == NULL:
        return NULL
    job.request = r[0]
    job.request.may_wait = True
    job.request.queue = q
    job.request.leave = leave_job
    job.request.enter = enter_job
    job.head = chain.head
    job.readable_bytes = chain.readable_bytes
    n = keep_iov(&job.request.body, job.iov)
    keep_iov(&job.request.reply, job.iov + n)
    pthread_mutex_lock(&q.gate)
    q.jobs_out += 1
    pthread_mutex_unlock(&q.gate)
    return job


cdef void job_back(queue_t *q) noexcept nogil:
    """One that is out is done or away. Under the gate."""
    q.jobs_out -= 1
    if q.jobs_out == 0:
        pthread_cond_broadcast(&q.gate_changed)


cdef void leave_job(request_t *r) noexcept nogil:
    cdef queue_t *q = <queue_t *>r.queue
    pthread_mutex_lock(&q.gate)
    q.jobs_away += 1
    job_back(q)
    pthread_mutex_unlock(&q.gate)


cdef void leave_inline(request_t *r) noexcept nogil:
    cdef queue_t *q = <queue_t *>r.queue
    pthread_mutex_lock(&q.gate)
    q.away = True
    pthread_cond_broadcast(&q.gate_changed)
    pthread_mutex_unlock(&q.gate)


cdef void enter_inline(request_t *r) noexcept nogil:
    cdef queue_t *q = <queue_t *>r.queue
    pthread_mutex_lock(&q.gate)
    while q.pauses and not q.stop:
        pthread_cond_wait(&q.gate_changed, &q.gate)
    q.away = False
    pthread_mutex_unlock(&q.gate)


cdef void enter_job(request_t *r) noexcept nogil:
    cdef queue_t *q = <queue_t *>r.queue
    pthread_mutex_lock(&q.gate)
    while q.pauses and not q.stop:
        pthread_cond_wait(&q.gate_changed, &q.gate)
    q.jobs_away -= 1
    q.jobs_out += 1
    pthread_mutex_unlock(&q.gate)


cdef bint lend(queue_t *q) noexcept nogil:
    """Leave the ring to this queue's other thread, to wait oneself. False: it is not asleep, or there is more.

    A kick wakes it; so a request that comes alone costs no hop to the pool, and one that comes
    after it does not wait.
    """
    if q.sleepers == 0 and (q.threads > 1 or not add_standby(q)):
        return False
    call_if_wanted(q)
    if ring.ring_enable_kick(&q.ring):
        ring.ring_disable_kick(&q.ring)
        return False
    leave(q)
    return True


cdef bint add_standby(queue_t *q) noexcept with gil:
    try:
        (<Queue>q.owner).add_thread()
    except RuntimeError:
        log.exception("no second thread for a queue: what blocks goes to the pool")
        return False
    return True


cdef void run_job(task_t *task) noexcept nogil:
    cdef job_t *job = <job_t *>task
    cdef queue_t *q = job.queue
    finish(q, &job.request, job.head, job.readable_bytes, request_run(q.dispatch, &job.request))
    call_if_wanted(q)
    pthread_mutex_lock(&q.used_lock)
    job.next = q.free_jobs
    q.free_jobs = job
    pthread_mutex_unlock(&q.used_lock)
    pthread_mutex_lock(&q.gate)
    job_back(q)
    pthread_mutex_unlock(&q.gate)


# --- requests that wait for somebody ---

cdef park_t *take_park(queue_t *q) noexcept nogil:
    """NULL: as many wait as may. Some heads must be left, or what they wait for could not be asked for."""
    cdef park_t *p = q.free_parks
    cdef uint32_t kept = min(<uint32_t>PARKS_KEPT, q.ring.num // 2)
    if p != NULL:
        q.free_parks = p.next
    elif q.parks_top < q.ring.num - kept:
        p = &q.parks[q.parks_top]
        q.parks_top += 1
    return p


cdef void park(queue_t *q, chain_t *chain, request_t *r) noexcept nogil:
    """Run it once more, now allowed to be finished later. Nothing of the queue waits for it."""
    cdef park_t *p = take_park(q)
    cdef int rc
    if p == NULL:
        finish(q, r, chain.head, chain.readable_bytes, -ENOLCK)
        return
    p.parked.finish = unpark
    p.parked.waiter = NULL
    p.parked.cancel = NULL
    p.queue = q
    p.request = r[0]
    p.request.body.n = p.request.reply.n = 0
    p.request.body.bytes = p.request.reply.bytes = 0
    p.request.resumed = True
    p.request.parked = &p.parked
    p.head = chain.head
    p.readable_bytes = chain.readable_bytes
    p.taken = True
    rc = request_run(q.dispatch, &p.request)
    if rc != WAITS:  # else it may have been answered by now
        answer(q, p, rc)


cdef void unpark(parked_t *parked, int rc) noexcept nogil:
    """The operation's thread leaves it to the queue's own, which alone is stopped by the gate."""
    cdef park_t *p = <park_t *>parked
    cdef queue_t *q = p.queue
    p.rc = rc
    pthread_mutex_lock(&q.park_lock)
    p.next = q.ready
    q.ready = p
    store_release_int(&q.any_ready, 1)
    pthread_mutex_unlock(&q.park_lock)
    wake_queue(q)


cdef void answer(queue_t *q, park_t *p, int rc) noexcept nogil:
    finish(q, &p.request, p.head, p.readable_bytes, rc)
    p.taken = False
    p.next = q.free_parks
    q.free_parks = p


cdef void answer_ready(queue_t *q) noexcept nogil:
    cdef park_t *p
    cdef park_t *next_p
    pthread_mutex_lock(&q.park_lock)
    p = q.ready
    q.ready = NULL
    store_release_int(&q.any_ready, 0)
    pthread_mutex_unlock(&q.park_lock)
    while p != NULL:
        next_p = p.next
        answer(q, p, p.rc)
        p = next_p
    call_if_wanted(q)


cdef void cancel_parked(queue_t *q) noexcept nogil:
    """The ring is to stop: what waits is answered ENOLCK, as Linux does when a lock server is lost.

    Their chains could not be answered from another ring. A pause leaves them alone: memory only comes
    then, none that they point to goes.
    """
    cdef uint32_t i
    for i in range(q.parks_top):
        if q.parks[i].taken:
            q.parks[i].parked.cancel(&q.parks[i].parked)
    if load_acquire_int(&q.any_ready):
        answer_ready(q)


# --- the queue thread's loop ---

cdef inline bint closing(queue_t *q) noexcept nogil:
    return load_acquire_int(&q.stop) or load_acquire_int(&q.pauses)


cdef bint linger(queue_t *q) noexcept nogil:
    """Sleep for a moment without asking for kicks: a wake-up and a kick for each FORGET would cost more."""
    cdef timespec moment
    moment.tv_sec = 0
    moment.tv_nsec = LINGER_NS
    nanosleep(&moment, NULL)
    return ring.ring_has_chains(&q.ring)


cdef bint look_for_more(queue_t *q) noexcept nogil:
    """Poll the ring for a while before sleeping: a wake-up costs far more. True: there is more.

    The driver does not kick meanwhile.
    """
    cdef uint64_t until
    cdef int spins
    if q.lingers:
        return linger(q)
    if q.poll_ns == 0:
        return False
    until = clock_ns() + q.poll_ns
    while not closing(q):
        spins = CLOCK_EVERY
        while spins:
            if ring.ring_has_chains(&q.ring):
                return True
            cpu_relax()
            spins -= 1
        if clock_ns() >= until:
            return False
    return False


cdef void adapt(queue_t *q, uint64_t slept_ns) noexcept nogil:
    """Poll longer where that would have caught the kick, less where the guest was away for long."""
    if slept_ns > q.poll_max_ns:
        q.poll_ns = q.poll_ns // 2 if q.poll_ns > POLL_MIN_NS else 0
    elif slept_ns > q.poll_ns:
        q.poll_ns = min(q.poll_max_ns, max(<uint64_t>POLL_MIN_NS, 2 * q.poll_ns))


cdef bint work(queue_t *q) noexcept nogil:
    """Answer all that is on the ring, then ask for a kick. Ends early when the gate is to close.

    False: this thread has lent the ring, and is not the one to leave it.
    """
    cdef int n, i
    if load_acquire_int(&q.any_ready):
        answer_ready(q)
    if q.broken:
        return True
    if q.owes_call:
        call_guest(q)
    ring.ring_disable_kick(&q.ring)
    while not closing(q):
        q.removals = q.ring.memory.removals
        n = ring.ring_pop_batch(&q.ring, q.chains, BATCH)
        for i in range(n):
            if not serve_chain(q, &q.chains[i], i == n - 1):
                return False
        if load_acquire_int(&q.any_ready):
            answer_ready(q)
        if n > 0:
            call_if_wanted(q)
        elif n < 0:
            break_ring(q, n)
            return True
        elif not look_for_more(q) and not closing(q):
            if not ring.ring_enable_kick(&q.ring):
                return True
            ring.ring_disable_kick(&q.ring)
    return True


cdef void break_ring(queue_t *q, int code) noexcept nogil:
    """The guest broke this ring: nothing more is taken from it until it is started anew."""
    q.broken = code
    count_u64(&q.ring_errors[-code], 1)
    if q.err_fd >= 0:
        c_write(q.err_fd, &ONE, sizeof(ONE))
    report_broken(q, code)


cdef void report_broken(queue_t *q, int code) noexcept with gil:
    log.warning("a guest broke a ring, the queue is stopped: %s", CHAIN_ERRORS[code])


cdef int enter(queue_t *q) noexcept nogil:
    """Through the gate, waiting while it is closed: 1 the ring is this thread's, 0 another has it, -1 the end."""
    cdef int rc = 1
    pthread_mutex_lock(&q.gate)
    while q.pauses and not q.stop:
        pthread_cond_wait(&q.gate_changed, &q.gate)
    if q.stop:
        rc = -1
    elif q.working:
        rc = 0
        q.missed = True
        q.sleepers += 1
    else:
        q.working = True
    pthread_mutex_unlock(&q.gate)
    return rc


cdef bint leave(queue_t *q) noexcept nogil:
    """Back out. True: the gate closed in the middle, there may be work left.

    A kick after the last look at the ring may have woken the other thread while this one still had it.
    """
    cdef bint again, missed
    pthread_mutex_lock(&q.gate)
    q.working = False
    missed = q.missed
    q.missed = False
    again = q.pauses > 0 or q.stop
    if again:
        pthread_cond_broadcast(&q.gate_changed)
    pthread_mutex_unlock(&q.gate)
    if missed:
        wake_queue(q)
    return again


cdef void count_sleepers(queue_t *q, int n) noexcept nogil:
    pthread_mutex_lock(&q.gate)
    q.sleepers += n
    pthread_mutex_unlock(&q.gate)


cdef void wait_kick(queue_t *q) noexcept nogil:
    cdef epoll_event events[2]
    cdef char drain[256]
    cdef int i, n = epoll_wait(q.epoll_fd, events, 2, -1)
    for i in range(n):
        if events[i].u64 == KICK:
            count_u64(&q.kicks, 1)
            # Edge triggered: an eventfd need not be read, a socket would fill up.
            if q.kick_is_socket:
                while recv(q.kick_fd, drain, sizeof(drain), MSG_DONTWAIT) == sizeof(drain):
                    pass


cdef void serve(queue_t *q) noexcept nogil:
    cdef bint slept = False
    cdef int rc
    while True:
        rc = enter(q)
        if rc < 0:
            wake_queue(q)  # an event wakes one thread: the next one's
            return
        if rc > 0:
            if slept:
                adapt(q, clock_ns() - q.idle_since)
            slept = False
            if not work(q):
                continue
            q.idle_since = clock_ns()
            if leave(q):
                continue
            count_sleepers(q, 1)
        wait_kick(q)
        count_sleepers(q, -1)
        slept = True


cdef void wake_queue(queue_t *q) noexcept nogil:
    c_write(q.wake_fd, &ONE, sizeof(ONE))


# --- the control thread ---

cdef bint is_socket(int fd) except -1:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


@cython.final
cdef class Queue:
    """One virtqueue of one connection and the thread that serves it, or two that take turns.

    All methods are for the control thread. Descriptors handed over are the queue's own from then
    on. index: 0 is hiprio. dispatch: where requests go. pool: runs what may block. poll_us: the most
    to poll before sleeping. lingers: nobody waits for its requests, they are gathered for a moment.
    """

    def __cinit__(self, int index, str name, Dispatch dispatch not None, Pool pool not None, int poll_us=0,
                  bint lingers=False):
        self.index = index
        self.threads = []
        self.q.owner = <void *>self
        self.q.lingers = lingers
        self.name = name
        self.dispatch = dispatch
        self.pool = pool
        self.q.pool = &pool.p
        self.q.poll_max_ns = self.q.poll_ns = 1000 * poll_us
        self.q.dispatch = &dispatch.table
        self.q.kick_fd = self.q.call_fd = self.q.err_fd = -1
        self.q.wake_fd = self.q.epoll_fd = self.q.bounce_fd = -1
        pthread_mutex_init(&self.q.gate, NULL)
        pthread_mutex_init(&self.q.park_lock, NULL)
        pthread_mutex_init(&self.q.used_lock, NULL)
        pthread_cond_init(&self.q.gate_changed, NULL)
        self.q.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.q.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.q.wake_fd < 0 or self.q.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.watch(self.q.wake_fd, WAKE)

    def __dealloc__(self):
        for fd in (self.q.kick_fd, self.q.call_fd, self.q.err_fd, self.q.wake_fd, self.q.epoll_fd,
                   self.q.bounce_fd):
            if fd >= 0:
                c_close(fd)
        if self.q.bounce != NULL:
            munmap(self.q.bounce, 2 * BOUNCE_BYTES)
        free(self.iov)
        free(self.q.jobs)
        free(self.job_iov)
        free(self.q.parks)
        pthread_mutex_destroy(&self.q.park_lock)
        pthread_mutex_destroy(&self.q.used_lock)
        pthread_cond_destroy(&self.q.gate_changed)
        pthread_mutex_destroy(&self.q.gate)

    cdef int watch(self, int fd, int what) except -1:
        cdef epoll_event event
        event.events = EPOLLIN | EPOLLET
        event.u64 = what
        if epoll_ctl(self.q.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        return 0

    def start(self, GuestMemory memory not None, uint32_t num, uint64_t desc, uint64_t avail,
              uint64_t used, uint16_t base, bint event_idx):
        """Set the ring up (user addresses) and start the thread; it looks at the ring at once.

        ValueError: a size that is no power of two, or a part of the ring outside memory.
        """
        cdef uint32_t iov_max = num + IOV_SLACK
        assert not self.started
        free(self.iov)
        self.iov = <iovec *>calloc(iov_max, sizeof(iovec))
        if self.iov == NULL:
            raise MemoryError
        self.make_jobs(iov_max)
        self.make_parks(num)
        if ring.ring_init(&self.q.ring, &memory.table, num, desc, avail, used, base, event_idx,
                          self.iov, iov_max) < 0:
            raise ValueError(
                f"ring of {num} at descriptors {desc:#x}, avail {avail:#x}, used {used:#x}"
                " is no power of two, unaligned or outside memory")
        self.memory = memory
        self.num = num
        self.q.broken = 0
        self.q.stop = 0
        self.started = True
        self.add_thread()

    cdef int add_thread(self) except -1:
        thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        thread.start()
        self.threads.append(thread)
        self.q.threads += 1
        return 0

    cdef int make_jobs(self, uint32_t iov_max) except -1:
        """Room for what the pool may have at a time; memory is taken as it is touched."""
        cdef uint32_t i
        free(self.q.jobs)
        free(self.job_iov)
        self.q.jobs = <job_t *>calloc(JOBS_MAX, sizeof(job_t))
        self.job_iov = <iovec *>calloc(<size_t>JOBS_MAX * iov_max, sizeof(iovec))
        if self.q.jobs == NULL or self.job_iov == NULL:
            raise MemoryError
        self.q.free_jobs = NULL
        for i in range(<uint32_t>JOBS_MAX):
            self.q.jobs[i].task.run = run_job
            self.q.jobs[i].queue = &self.q
            self.q.jobs[i].iov = self.job_iov + <size_t>i * iov_max
            self.q.jobs[i].next = self.q.free_jobs
            self.q.free_jobs = &self.q.jobs[i]
        return 0

    cdef int make_parks(self, uint32_t num) except -1:
        """Room for as many waits as the ring has heads; memory is taken as it is touched."""
        free(self.q.parks)
        self.q.parks = <park_t *>calloc(num, sizeof(park_t))
        if self.q.parks == NULL:
            raise MemoryError
        self.q.free_parks = NULL
        self.q.parks_top = 0
        return 0

    def _run(self):
        """The thread's body."""
        with nogil:
            serve(&self.q)

    def stop(self):
        """Finish what is in flight, end the thread, give the next avail index. Not started: 0.

        What waits for somebody is answered ENOLCK.
        """
        if not self.started:
            return 0
        pthread_mutex_lock(&self.q.gate)
        store_release_int(&self.q.stop, 1)
        pthread_cond_broadcast(&self.q.gate_changed)
        pthread_mutex_unlock(&self.q.gate)
        self.wake()
        while self.threads:  # one of them may be adding another
            self.threads.pop().join()
        self.q.threads = 0
        self.wait_jobs()
        with nogil:
            cancel_parked(&self.q)
        self.memory = None
        self.started = False
        return self.q.ring.last_avail

    @property
    def broken(self):
        """0, or the ring code (negative) that stopped this queue until it is started anew."""
        return self.q.broken

    cdef void wake(self) noexcept:
        wake_queue(&self.q)

    def kick(self):
        """Look at the ring (in-band kicks)."""
        self.wake()

    cdef void wait_jobs(self, bint jobs=True) noexcept:
        with nogil:
            pthread_mutex_lock(&self.q.gate)
            while (self.q.working and not self.q.away) or (jobs and self.q.jobs_out) or (self.q.stop and self.q.jobs_away):
                pthread_cond_wait(&self.q.gate_changed, &self.q.gate)
            pthread_mutex_unlock(&self.q.gate)

    def pause(self, bint jobs=True):
        """Return when no request of this queue is being worked on; none is begun until resume().

        jobs: wait for those that have been handed over too; without, only nobody looks at memory.
        """
        pthread_mutex_lock(&self.q.gate)
        store_release_int(&self.q.pauses, self.q.pauses + 1)
        pthread_mutex_unlock(&self.q.gate)
        self.wait_jobs(jobs)

    def resume(self):
        """End one pause(); the thread looks at the ring again."""
        pthread_mutex_lock(&self.q.gate)
        store_release_int(&self.q.pauses, self.q.pauses - 1)
        pthread_cond_broadcast(&self.q.gate_changed)
        pthread_mutex_unlock(&self.q.gate)
        self.wake()

    def set_kick(self, int fd):
        """Be kicked by this descriptor, eventfd or socket; -1: by kick() alone."""
        cdef bint socket = fd >= 0 and is_socket(fd)
        self.pause()
        try:
            if self.q.kick_fd >= 0:
                epoll_ctl(self.q.epoll_fd, EPOLL_CTL_DEL, self.q.kick_fd, NULL)
                c_close(self.q.kick_fd)
            self.q.kick_fd = fd
            self.q.kick_is_socket = socket
            if fd >= 0:
                self.watch(fd, KICK)
        finally:
            self.resume()

    def set_call(self, int fd, bytes message=EVENT):
        """Call the guest by writing `message` to this descriptor; -1: no calls.

        EVENT for an eventfd or its like; a whole VRING_CALL message for the back-end channel.
        """
        cdef bint socket = fd >= 0 and is_socket(fd)
        cdef const char *text = message
        assert len(message) <= CALL_BYTES_MAX
        self.pause()
        if self.q.call_fd >= 0:
            c_close(self.q.call_fd)
        self.q.call_fd = fd
        self.q.call_is_socket = socket
        self.q.call_may_block = fd >= 0 and os.get_blocking(fd)
        self.q.call_len = len(message)
        memcpy(self.q.call_bytes, text, len(message))
        self.resume()

    def set_err(self, int fd):
        """Tell the front end of a broken ring by this descriptor; -1: do not."""
        self.pause()
        if self.q.err_fd >= 0:
            c_close(self.q.err_fd)
        self.q.err_fd = fd
        self.resume()

    def close(self):
        """stop(), and close every descriptor. Idempotent; then only counters() works."""
        if self.q.epoll_fd < 0:
            return
        self.stop()
        self.set_kick(-1)
        self.set_call(-1)
        self.set_err(-1)
        c_close(self.q.wake_fd)
        c_close(self.q.epoll_fd)
        self.q.wake_fd = self.q.epoll_fd = -1

    def counters(self):
        """Since the beginning, by opcode name: requests, errors, bytes_in, bytes_out.

        "ring": kicks, calls, chains given back unanswered, and each ring error by its text.
        """
        cdef op_count_t *count
        found = {}
        for opcode in range(OPCODES_MAX + 1):
            count = &self.q.ops[opcode]
            if load_relaxed_u64(&count.requests) == 0:
                continue
            name = OPCODE_NAME.get(opcode, "UNKNOWN")
            sums = found.setdefault(name, dict.fromkeys(COUNTS, 0))
            for field, n in zip(COUNTS, (
                load_relaxed_u64(&count.requests), load_relaxed_u64(&count.errors),
                load_relaxed_u64(&count.bytes_in), load_relaxed_u64(&count.bytes_out),
            )):
                sums[field] += n
        found["ring"] = {
            "kicks": load_relaxed_u64(&self.q.kicks),
            "calls": load_relaxed_u64(&self.q.calls),
            "unanswered": load_relaxed_u64(&self.q.unanswered),
        }
        for code, text in CHAIN_ERRORS.items():
            found["ring"][text] = load_relaxed_u64(&self.q.ring_errors[-<int>code])
        return found
