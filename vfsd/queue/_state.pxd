"""One virtqueue as its threads see it: the ring, the gate, what is out or waits, what it counts."""

from libc.stdint cimport uint32_t, uint64_t

from vfsd.memory._regions cimport iovec
from vfsd.queue._pool cimport pool_t, task_t
from vfsd._ring cimport RING_ERRORS, chain_t, ring_t
from vfsd.sys._threads cimport pthread_cond_t, pthread_cond_wait, pthread_mutex_t
from vfsd.fuse.dispatch cimport OPCODES_MAX, dispatch_t, parked_t, request_t

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t n)

cdef enum:
    BATCH = 32          # chains taken at a time
    CALL_BYTES_MAX = 32
    CALLERS = 8         # a power of two
    REQUEST_MAX = (1 << 22) + (1 << 16)  # bytes of the largest (MAX_PAGES of fuse/init.py), with its headers


# What was done for one opcode. One writer (the queue thread); read at any time.
cdef struct op_count_t:
    uint64_t requests
    uint64_t errors
    uint64_t bytes_in   # whole request
    uint64_t bytes_out  # whole reply


# A request the pool runs: everything about it that the queue's own arrays would lose.
cdef struct job_t:
    task_t task
    queue_t *queue
    request_t request
    uint64_t readable_bytes
    uint32_t head
    iovec *iov
    job_t *next


# A request that waits for somebody: no thread, no place in the pool, and pause() passes it by.
cdef struct park_t:
    parked_t parked          # first: what the operation knows of it
    queue_t *queue
    request_t request        # without its iovecs: the arguments are in scratch, the reply is a header
    uint64_t readable_bytes
    uint32_t head
    int rc                   # once it is ready
    bint taken
    park_t *next             # of the free or the ready ones


# Whether somebody goes on without replies is tried after so many of them, twice as many each time it was not so.
cdef struct caller_t:
    uint32_t pid
    uint32_t patience        # replies


# Replies the guest is not called for yet, because their caller goes on without them.
cdef struct calls_t:
    uint32_t ahead           # that caller: fuse_in_header.pid in the guest, 0 for none
    uint32_t last            # who asked last for something that one may have several of
    bint awaited             # somebody else has been answered
    bint went_on             # `ahead` has asked for more since the first of the held replies
    uint32_t together        # replies to call for at once
    uint32_t held            # replies not called for
    uint64_t held_bytes
    uint32_t streak          # replies since `together` has changed
    uint32_t others          # replies to others since `ahead` asked
    caller_t callers[CALLERS]  # who was tried, by pid


cdef struct queue_t:
    ring_t ring
    dispatch_t *dispatch
    pool_t *pool
    job_t *jobs
    iovec *job_iov           # of all jobs
    job_t *free_jobs         # under used_lock
    uint32_t jobs_top        # ever used since the start, under used_lock
    uint32_t jobs_max
    uint32_t job_iov_max     # iovecs of each
    park_t *parks
    park_t *free_parks
    uint32_t parks_top       # ever used since the start
    park_t *ready            # to be answered, under park_lock
    int any_ready
    uint64_t poll_ns         # how long to look for more before sleeping, now
    uint64_t poll_max_ns
    uint64_t poll_again      # ns: not before, because others want the CPU
    uint64_t hold_ns         # how long that was, the last time
    uint64_t idle_since      # ns, when the ring was left
    bint beside_jobs         # who else wants the CPU are its own jobs
    bint lingers
    calls_t uncalled
    void *owner              # the Queue: borrowed
    int threads              # 1, or 2 once something has blocked
    int sleepers             # of those, waiting for a kick; under the gate
    chain_t chains[BATCH]
    int kick_fd
    bint kick_is_socket
    int call_fd
    bint call_is_socket
    bint call_may_block      # an eventfd or pipe without O_NONBLOCK
    bint owes_call           # a call that found the back-end channel full
    char call_bytes[CALL_BYTES_MAX]
    uint32_t call_len
    int err_fd
    int wake_fd              # ours: stop, resume, in-band kicks
    int epoll_fd
    int broken               # 0 or the ring code that stopped this queue
    int stop
    # The gate: the control thread changes what the queue thread uses only while it is closed.
    pthread_mutex_t gate
    pthread_mutex_t park_lock
    pthread_mutex_t used_lock   # the used ring and the counters: queue thread and jobs, while jobs_live
    pthread_cond_t gate_changed
    int pauses
    bint working
    bint away                # it works on copies alone, in the middle of a batch
    uint64_t removals        # of the memory's regions, when the batch was taken
    bint missed              # the other thread has woken meanwhile and gone back to sleep; under the gate
    int jobs_live            # made and not done: written under the gate
    int jobs_out             # with the pool; the gate is closed only when there are none
    int jobs_away            # of the pool's, those that use nothing of the queue just now
    int bounce_fd            # a memfd, and where it is mapped: for chains in fragile memory
    char *bounce
    op_count_t ops[OPCODES_MAX + 1]  # the last: opcodes past the table
    uint64_t ring_errors[RING_ERRORS]
    uint64_t unanswered      # chains without a whole in header, or without room for an out header
    uint64_t kicks
    uint64_t calls


cdef inline void wake_queue(queue_t *q) noexcept nogil:
    """Have a thread of the queue look at the ring, and at what is ready. By any thread."""
    cdef uint64_t one = 1
    c_write(q.wake_fd, &one, sizeof(one))


cdef inline void wait_open(queue_t *q) noexcept nogil:
    """Wait while the gate is closed, unless the queue is to stop. Under the gate."""
    while q.pauses and not q.stop:
        pthread_cond_wait(&q.gate_changed, &q.gate)


cdef inline bint closing(queue_t *q) noexcept nogil:
    """Whether the thread that has the ring is to leave it."""
    return load_acquire_int(&q.stop) or load_acquire_int(&q.pauses)
