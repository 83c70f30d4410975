"""The queues of one virtio-fs device, driven as fs/fuse/virtio_fs.c drives them.

A request costs no Python object: it is a slot with its own piece of guest memory,

    args    in header, in arguments, out header, out arguments    SLOT_ARGS bytes
    pages   data of the last in or last out argument              max_pages * 4096 bytes

Linux sends data in elements of one page each, the rest as one element a part (A3 of the
reference): header, in arguments, in pages; out header, out arguments, out pages.
"""

from libc.stdint cimport uint32_t, uint64_t

from vfsd.virtqueue._driver_ring cimport driver_t, sg_t
from vfsd.sys._threads cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    QUEUE_NAME_LEN = 24    # VQ_NAME_LEN, with the NUL
    SLOT_ARGS = 139264     # bytes: twice an xattr value of 64 KiB, and headers
    KICK_BYTES_MAX = 32
    OPCODES_MAX = 64
    FORGET_BYTES = 64      # in header and fuse_forget_in take 48
    PAGE = 4096

cdef enum:                 # slot_t.flags, set by who submits
    REQ_ARGVAR = 1         # the last out argument may come back shorter
    REQ_MAY_BLOCK = 2      # what is done at the end may wait for another reply: give it a thread


# Called once, without the GIL, when the reply has been checked or the request has failed. Never in
# the context of who submitted it.
ctypedef void (*done_t)(slot_t *s, void *owner) noexcept nogil


cdef struct slot_t:
    uint32_t index
    # Set by who submits, after slot_get.
    uint32_t in_args       # bytes after the in header
    uint32_t in_pages      # bytes of pages the device reads
    uint32_t out_args      # bytes of the body that are not pages
    uint32_t out_pages     # bytes of pages the device writes
    uint32_t flags
    done_t done            # NULL: slot_wait
    void *owner
    # Set before done is called, or slot_wait returns.
    int error              # 0 or -errno
    uint32_t out_bytes     # of the body that came, arguments and pages together
    # The driver's own.
    uint32_t queue
    bint sent              # FR_SENT: on the ring. Who clears it, under the queue's lock, ends the request
    bint finished
    bint counted           # REQ_MAY_BLOCK: in flight until its own thread has ended it
    uint64_t unique
    slot_t *next
    pthread_mutex_t lock
    pthread_cond_t ended


cdef struct forget_t:
    uint64_t nodeid
    uint64_t nlookup


cdef struct vq_t:
    char name[QUEUE_NAME_LEN]
    driver_t *driver
    sg_t *sg               # driver.num elements, under the lock
    int kick_fd
    char kick_bytes[KICK_BYTES_MAX]
    uint32_t kick_len
    int call_fd
    int wake_fd
    bint polling           # completions are looked for all the time; the device need not call
    bint connected
    bint aborted           # nothing that comes back is looked at any more
    int broken             # 0, or the errno of a device that is not believed any more
    uint64_t in_flight     # on the ring and queued; what waits for its end only is not counted
    slot_t *queued         # found the ring full: first and last
    slot_t *queued_last
    bint retry             # the ring has room again
    uint64_t requests
    uint64_t kicks
    uint64_t calls
    uint64_t retries       # times a queued request was put on the ring after all
    pthread_mutex_t lock
    pthread_cond_t zero    # in_flight_zero


cdef struct transport_t:
    vq_t *vqs              # 0 is hiprio
    uint32_t n_vqs
    slot_t *slots
    uint32_t n_slots
    uint32_t max_pages
    char *arena            # host address of slot 0's memory
    uint64_t arena_gpa
    uint64_t stride        # bytes from one slot's memory to the next's
    uint64_t unique
    uint32_t scramble      # 0: elements as Linux makes them; else the state of a generator of odd ones
    uint64_t opcodes[OPCODES_MAX]
    # Free slots, last used first.
    slot_t *free
    pthread_mutex_t free_lock
    pthread_cond_t freed
    # The worker's: requests that failed in the context of who submitted them.
    slot_t *ending
    slot_t *ending_last
    pthread_mutex_t work_lock
    pthread_cond_t work
    bint stop
    bint worker_gone       # who submits ends it then
    # Forgets that found hiprio full, and the guest memory of those on it.
    forget_t *forgets
    uint64_t n_forgets
    uint64_t forgets_max
    char *forget_memory    # FORGET_BYTES for each element of hiprio
    uint64_t forget_gpa
    uint32_t *forget_free
    uint32_t n_forget_free


# A free slot, waiting for one if need be; NULL when the transport has been closed.
cdef slot_t *slot_get(transport_t *t) noexcept nogil
cdef void slot_put(transport_t *t, slot_t *s) noexcept nogil
# Where its parts lie.
cdef char *slot_header(transport_t *t, slot_t *s) noexcept nogil  # 40 bytes, then the in arguments
cdef char *slot_out(transport_t *t, slot_t *s) noexcept nogil     # the out header, then the out arguments
cdef char *slot_pages(transport_t *t, slot_t *s) noexcept nogil
# Submit to a queue (1 and up). len and unique of the in header are filled in here; the rest of it is
# the caller's. A new unique is taken unless `keep_unique` (a bridge's kernel has its own).
cdef void slot_send(transport_t *t, slot_t *s, uint32_t queue, bint keep_unique) noexcept nogil
# Wait for the end of a request without a done function: s.error.
cdef int slot_wait(transport_t *t, slot_t *s) noexcept nogil
# One forget, on hiprio, without a reply. Dropped silently when the queue is not connected.
cdef void forget_send(transport_t *t, uint64_t nodeid, uint64_t nlookup) noexcept nogil
# What the threads of a queue and the worker run, until transport_t.stop.
cdef void completion_loop(transport_t *t, vq_t *q) noexcept nogil
cdef void worker_loop(transport_t *t) noexcept nogil
# End all that is in flight on a queue with -error, and what comes with ENOTCONN.
cdef void abort_queue(transport_t *t, vq_t *q, int error) noexcept nogil
# End a request whose error is set. The slot may be somebody else's afterwards.
cdef void finish(slot_t *s) noexcept nogil
# n requests of a queue have ended. Under vq_t.lock.
cdef void drop_in_flight(vq_t *q, uint64_t n) noexcept nogil
