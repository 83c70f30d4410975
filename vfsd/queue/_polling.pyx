"""Looking at a ring before its thread sleeps (docs/architecture.md, "Polling")."""

from libc.stdint cimport uint64_t

from vfsd cimport _ring as ring
from vfsd.queue._replies cimport call_guest
from vfsd.sys._clock cimport clock_ns, process_ns
from vfsd.sys._threads cimport sched_yield
from vfsd.queue._state cimport closing, load_acquire_int, queue_t

__all__ = ()

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec *wanted, timespec *left)

cdef extern from "_atomics.h" nogil:
    void cpu_relax()

cdef enum:
    POLL_MIN_NS = 4000
    CLOCK_EVERY = 32  # looks at the ring for one at the clock
    YIELD_NS = 4000   # of polling; from then on whoever else wants the CPU has it
    BUSY_NS = 200000  # somebody else had it for so long: it computes there
    OFF_NS = 20000000  # no polling for so long then, and twice as long each time it happens again
    OFF_MAX_NS = 640000000
    HEARD_NS = 50000  # a driver that was called has looked by then: waking a CPU takes up to 45 us
    GATHER_NS = 200000  # what nobody waits for (FORGET) is gathered for so long


cdef bint gather(queue_t *q) noexcept nogil:
    """Sleep for a moment without asking for kicks: a wake-up and a kick for each FORGET would cost more."""
    cdef timespec moment
    moment.tv_sec = 0
    moment.tv_nsec = GATHER_NS
    nanosleep(&moment, NULL)
    return ring.ring_has_chains(&q.ring)


cdef bint look_for_more(queue_t *q) noexcept nogil:
    """Poll the ring for a while before sleeping: a wake-up costs far more. True: there is more.

    The driver does not kick meanwhile. Only a CPU that nobody else wants is polled on: what the guest's
    own threads do there would come later.
    """
    if q.polling.gathers:
        return gather(q)
    if q.polling.ns == 0:
        return False
    if poll(q, q.polling.ns):
        return True
    if ring.ring_call_unheard(&q.ring) and not closing(q):
        call_again(q)
    return False


cdef bint poll(queue_t *q, uint64_t ns) noexcept nogil:
    cdef uint64_t began = clock_ns(), now = began, polled
    cdef int spins
    if not load_acquire_int(&q.jobs_live):
        q.polling.shares_with_jobs = False
    while not closing(q):
        spins = CLOCK_EVERY
        while spins:
            if ring.ring_has_chains(&q.ring):
                return True
            cpu_relax()
            spins -= 1
        now = clock_ns()
        polled = now - began
        if polled >= ns and (polled >= HEARD_NS or not ring.ring_call_unheard(&q.ring)):
            return False
        if polled >= YIELD_NS and not q.polling.shares_with_jobs and not give_way(q, &now):
            return False
    return False


cdef bint give_way(queue_t *q, uint64_t *now) noexcept nogil:
    """Let others have the CPU. False: they have much to do, and are not jobs of this daemon.

    With a job, which may be an fsync of a gigabyte, the CPU is shared in the scheduler's slices: if the
    queue's thread gave way each time, or slept, every request beside it would wait for a wake-up.
    """
    cdef bint jobs = load_acquire_int(&q.jobs_live) != 0
    cdef uint64_t before = now[0], ours = process_ns() if jobs else 0
    sched_yield()
    now[0] = clock_ns()
    if now[0] - before < BUSY_NS:
        return True
    q.polling.shares_with_jobs = jobs and 2 * (process_ns() - ours) >= now[0] - before
    if not q.polling.shares_with_jobs:
        suspend_polling(q, now[0])
    return q.polling.shares_with_jobs


cdef void call_again(queue_t *q) noexcept nogil:
    """Replies come so soon that user-mode Linux (up to 7.2 at least) is still about to go idle: a call that
    arrives then is lost in its um_idle_sleep() until the next tick, 10 ms later."""
    q.ring.called = False
    call_guest(q)


cdef void suspend_polling(queue_t *q, uint64_t now) noexcept nogil:
    """Somebody has much to do on this CPU: no polling for a while, for longer each time that comes again."""
    q.polling.off_ns = min(2 * q.polling.off_ns, <uint64_t>OFF_MAX_NS) if now < q.polling.off_until + q.polling.off_ns else OFF_NS
    q.polling.off_until = now + q.polling.off_ns
    q.polling.ns = 0


cdef void adapt(queue_t *q, uint64_t now) noexcept nogil:
    """Poll longer where that would have caught the kick, less where the guest was away for long."""
    cdef uint64_t slept_ns = now - q.polling.idle_since
    if slept_ns > q.polling.max_ns:
        q.polling.ns = q.polling.ns // 2 if q.polling.ns > POLL_MIN_NS else 0
    elif slept_ns > q.polling.ns and now >= q.polling.off_until:
        q.polling.ns = min(q.polling.max_ns, max(<uint64_t>POLL_MIN_NS, 2 * q.polling.ns))
