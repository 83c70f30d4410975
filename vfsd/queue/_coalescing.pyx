"""When the guest is called for several replies at once (docs/architecture.md, "Called once").

A caller that asks for more before it is called for the last reply (asynchronous I/O) loses more by an
interrupt for each reply than by waiting for some of them. Who does so is found out by trying.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from vfsd.queue._polling cimport poll
from vfsd._ring cimport ring_call_due
from vfsd.queue._state cimport CALLERS, caller_t, calls_t, closing, queue_t

__all__ = ()

cdef enum:
    TOGETHER_MAX = 8        # replies
    TOGETHER_BYTES = 65536  # of requests and replies: with more, an interrupt is the smaller part
    GAP_NS = 60000          # the most between two requests of a caller that goes on
    PATIENCE_MIN = 64       # replies
    PATIENCE_MAX = 8192


cdef void calls_init(calls_t *c) noexcept nogil:
    memset(c, 0, sizeof(calls_t))


cdef void calls_made(calls_t *c) noexcept nogil:
    c.held = 0
    c.held_bytes = 0
    c.awaited = c.went_on = False


cdef bint call_later(queue_t *q, uint32_t n, uint64_t moved) noexcept nogil:
    cdef calls_t *c = &q.uncalled
    c.held += n
    c.held_bytes += moved
    if c.ahead == 0:
        look_for_caller(c)
    elif c.awaited or q.poll_ns == 0:
        c.others += n
        if c.others >= PATIENCE_MIN:
            c.ahead = c.streak = 0
        elif c.held > n and not c.went_on:
            shrink(c)
    elif c.held >= c.together:
        grow(c)
    elif c.held_bytes < TOGETHER_BYTES and ring_call_due(&q.ring):
        if poll(q, GAP_NS):
            return True
        if q.poll_ns and not closing(q):
            shrink(c)
    calls_made(c)
    return False


cdef caller_t *caller(calls_t *c, uint32_t pid) noexcept nogil:
    cdef caller_t *found = &c.callers[pid & (CALLERS - 1)]
    if found.pid != pid:
        found.pid = pid
        found.patience = PATIENCE_MIN
    return found


cdef void look_for_caller(calls_t *c) noexcept nogil:
    """After so many replies, try whether the last caller goes on without one."""
    c.streak += c.held
    if c.last and c.streak >= caller(c, c.last).patience:
        c.ahead = c.last
        c.together = 2
        c.streak = 0


cdef void grow(calls_t *c) noexcept nogil:
    c.streak = min(c.streak + c.held, <uint32_t>PATIENCE_MAX)
    if c.streak >= caller(c, c.ahead).patience:
        if c.together < TOGETHER_MAX:
            c.together *= 2
            c.streak = 0
        else:
            caller(c, c.ahead).patience = PATIENCE_MIN


cdef void shrink(calls_t *c) noexcept nogil:
    """It had no more to ask for until it was called. After a while that is how a burst ends."""
    cdef caller_t *tried = caller(c, c.ahead)
    if c.streak < PATIENCE_MIN:
        tried.patience = min(2 * tried.patience, <uint32_t>PATIENCE_MAX)
        c.together //= 2
        if c.together < 2:
            c.ahead = 0
    c.streak = 0
