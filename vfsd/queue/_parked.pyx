"""Requests that wait for a guest or a process: parked, without a thread, until they are answered."""

from libc.errno cimport ENOLCK
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vfsd.memory._regions cimport memory_drop, memory_keep, memory_t
from vfsd.queue._notify cimport notify_wake
from vfsd.queue._replies cimport call_if_wanted, complete_request
from vfsd._ring cimport chain_t
from vfsd.state._journal cimport STAGE_PARKED
from vfsd.sys._threads cimport pthread_mutex_lock, pthread_mutex_unlock
from vfsd.queue._state cimport park_t, queue_t
from vfsd.fuse.dispatch cimport PARK, WAITS, parked_t, request_run, request_t

__all__ = ()

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)
    void store_release_u64(uint64_t *p, uint64_t v)

cdef enum:
    PARKS_KEPT = 16     # heads of a ring that no waiting request takes, at most half


cdef bint parks_init(queue_t *q, uint32_t num) noexcept nogil:
    parks_free(q)
    q.parks = <park_t *>calloc(num, sizeof(park_t))
    q.free_parks = NULL
    q.parks_top = 0
    return q.parks != NULL


cdef void parks_free(queue_t *q) noexcept nogil:
    free(q.parks)
    q.parks = NULL


cdef park_t *take_park(queue_t *q) noexcept nogil:
    """NULL: as many wait as may. Some heads must be left, or what they wait for could not be asked for."""
    cdef uint32_t kept = min(<uint32_t>PARKS_KEPT, q.ring.num // 2)
    cdef park_t *p
    pthread_mutex_lock(&q.park_lock)
    p = q.free_parks
    if p != NULL:
        q.free_parks = p.next
    elif q.parks_top < q.ring.num - kept:
        p = &q.parks[q.parks_top]
        q.parks_top += 1
    pthread_mutex_unlock(&q.park_lock)
    return p


cdef void park(queue_t *q, memory_t *memory, chain_t *chain, request_t *r) noexcept nogil:
    """Run it once more, now allowed to be completed later. Nothing of the queue waits for it."""
    cdef park_t *p = take_park(q)
    cdef int rc
    if p == NULL:
        complete_request(q, r, chain.head, chain.readable_bytes, -ENOLCK)
        return
    p.parked.complete = unpark
    p.parked.waiter = NULL
    p.parked.cancel = NULL
    p.queue = q
    p.memory = memory_keep(memory)
    p.request = r[0]
    p.request.body.n = p.request.reply.n = 0
    p.request.body.bytes = p.request.reply.bytes = 0
    p.request.mode = PARK
    p.request.parked = &p.parked
    p.head = chain.head
    p.readable_bytes = chain.readable_bytes
    p.taken = True
    store_release_u64(&p.request.record.stage, STAGE_PARKED)
    rc = request_run(q.dispatch, &p.request)
    if rc != WAITS:  # else it may have been answered by now
        complete_parked(q, p, rc)
    elif load_acquire_int(&q.abandoned):
        p.parked.cancel(&p.parked)


cdef void unpark(parked_t *parked, int rc) noexcept nogil:
    """The operation's thread leaves it to the queue's own, which the control thread stops."""
    cdef park_t *p = <park_t *>parked
    cdef queue_t *q = p.queue
    p.rc = rc
    pthread_mutex_lock(&q.park_lock)
    p.next = q.ready
    q.ready = p
    store_release_int(&q.any_ready, 1)
    pthread_mutex_unlock(&q.park_lock)
    notify_wake(q.notify)


cdef void complete_parked(queue_t *q, park_t *p, int rc) noexcept nogil:
    complete_request(q, &p.request, p.head, p.readable_bytes, rc)
    memory_drop(p.memory)
    pthread_mutex_lock(&q.park_lock)
    p.taken = False
    p.next = q.free_parks
    q.free_parks = p
    pthread_mutex_unlock(&q.park_lock)


cdef void complete_ready(queue_t *q) noexcept nogil:
    cdef park_t *p
    cdef park_t *next_p
    pthread_mutex_lock(&q.park_lock)
    p = q.ready
    q.ready = NULL
    store_release_int(&q.any_ready, 0)
    pthread_mutex_unlock(&q.park_lock)
    while p != NULL:
        next_p = p.next
        complete_parked(q, p, p.rc)
        p = next_p
    call_if_wanted(q)


cdef void cancel_parked(queue_t *q) noexcept nogil:
    """The ring has stopped: what waits is answered ENOLCK, as Linux does when a lock server is lost.

    Their chains could not be answered from another ring. In an abandoned one they are not answered at all.
    """
    cdef uint32_t i
    for i in range(q.parks_top):
        if q.parks[i].taken and q.parks[i].parked.cancel != NULL:
            q.parks[i].parked.cancel(&q.parks[i].parked)
    if load_acquire_int(&q.any_ready):
        complete_ready(q)
