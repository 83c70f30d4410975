"""When the guest is called for several replies at once (docs/architecture.md, "Interrupt coalescing").

A caller that asks for more before it is called for the last reply (asynchronous I/O) loses more by an
interrupt for each reply than by waiting for some of them. Who does so is found out by trying.
"""

from libc.stdint cimport uint32_t, uint64_t

from vfsd.queue._polling cimport poll
from vfsd._ring cimport ring_call_due
from vfsd.queue._state cimport CALLERS, caller_t, coalescing_t, closing, queue_t

__all__ = ()

cdef enum:
    BATCH_MAX = 8        # replies
    BATCH_BYTES = 65536  # of requests and replies: with more, an interrupt is the smaller part
    GAP_NS = 60000          # the most between two requests of a caller that goes on
    TRY_AFTER_MIN = 64       # replies
    TRY_AFTER_MAX = 8192


cdef void nothing_pending(coalescing_t *c) noexcept nogil:
    c.pending = 0
    c.pending_bytes = 0
    c.others_wait = c.asked_more = False


cdef bint coalesce(queue_t *q, uint32_t n, uint64_t moved) noexcept nogil:
    cdef coalescing_t *c = &q.coalescing
    c.pending += n
    c.pending_bytes += moved
    if c.pid == 0:
        choose_caller(c)
    elif c.others_wait or q.polling.ns == 0:
        c.to_others += n
        if c.to_others >= TRY_AFTER_MIN:
            c.pid = c.since_change = 0
        elif c.pending > n and not c.asked_more:
            reduce_batch(c)
    elif c.pending >= c.batch:
        enlarge_batch(c)
    elif c.pending_bytes < BATCH_BYTES and ring_call_due(&q.ring):
        if poll(q, GAP_NS):
            return True
        if q.polling.ns and not closing(q):
            reduce_batch(c)
    nothing_pending(c)
    return False


cdef caller_t *caller(coalescing_t *c, uint32_t pid) noexcept nogil:
    cdef caller_t *found = &c.callers[pid & (CALLERS - 1)]
    if found.pid != pid:
        found.pid = pid
        found.try_after = TRY_AFTER_MIN
    return found


cdef void choose_caller(coalescing_t *c) noexcept nogil:
    """After so many replies, try whether the last caller goes on without one."""
    c.since_change += c.pending
    if c.last_pid and c.since_change >= caller(c, c.last_pid).try_after:
        c.pid = c.last_pid
        c.batch = 2
        c.since_change = 0


cdef void enlarge_batch(coalescing_t *c) noexcept nogil:
    c.since_change = min(c.since_change + c.pending, <uint32_t>TRY_AFTER_MAX)
    if c.since_change >= caller(c, c.pid).try_after:
        if c.batch < BATCH_MAX:
            c.batch *= 2
            c.since_change = 0
        else:
            caller(c, c.pid).try_after = TRY_AFTER_MIN


cdef void reduce_batch(coalescing_t *c) noexcept nogil:
    """It had no more to ask for until it was called. After a while that is how a burst ends."""
    cdef caller_t *tried = caller(c, c.pid)
    if c.since_change < TRY_AFTER_MIN:
        tried.try_after = min(2 * tried.try_after, <uint32_t>TRY_AFTER_MAX)
        c.batch //= 2
        if c.batch < 2:
            c.pid = 0
    c.since_change = 0
