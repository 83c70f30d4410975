"""One virtqueue as its threads see it, from a start of the ring to its stop: what is out or waits, what it counts."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd.memory._regions cimport iovec, memory_t
from vfsd.queue._notify cimport notify_t
from vfsd.queue._pool cimport pool_t, task_t
from vfsd._ring cimport RING_ERRORS, chain_t, ring_t
from vfsd.sys._threads cimport pthread_cond_t, pthread_mutex_t
from vfsd.state._journal cimport journal_t
from vfsd.fuse.dispatch cimport FILE_SYSTEMS, OPCODES_MAX, dispatch_t, parked_t, request_t

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)

# What the watcher has found out. Written by it and by jobs, read by queue threads.
cdef struct watch_t:
    int asleep                         # wake it when a ring is in use
    int any_slow                       # some operation is, or something is caught
    uint64_t now_ns                    # at its last look
    uint64_t slow_until[FILE_SYSTEMS][OPCODES_MAX]  # ns
    int caught[FILE_SYSTEMS]           # requests under way there that the ring was taken from
    uint64_t preemptions               # of this process's threads, up to the last look
    uint64_t contended_until           # ns: CPUs are short
    void *owner                        # the Watcher: borrowed
    pthread_mutex_t lock               # the list of queues
    pthread_mutex_t sleep_lock
    pthread_cond_t wake                # by CLOCK_MONOTONIC
    queue_t *first
    bint stop


cdef enum:
    BATCH = 32          # chains taken at a time
    CALLERS = 8         # a power of two
    REQUEST_MAX = (1 << 22) + (1 << 16)  # bytes of the largest (MAX_PAGES of fuse/init.py), with its headers


# What was done for one opcode. One writer at a time; read at any time.
cdef struct op_count_t:
    uint64_t requests
    uint64_t errors
    uint64_t bytes_in   # whole request
    uint64_t bytes_out  # whole reply


# What a queue counts, over all its starts.
cdef struct counters_t:
    op_count_t ops[OPCODES_MAX + 1]  # the last: opcodes past the table
    uint64_t ring_errors[RING_ERRORS]
    uint64_t unanswered      # chains without a whole in header, or without room for an out header


# A request the pool runs: everything about it that the queue's own arrays would lose.
cdef struct job_t:
    task_t task
    queue_t *queue
    request_t request
    memory_t *memory         # kept: where its buffers lie
    uint64_t readable_bytes
    uint32_t head
    bint foreseen            # handed over without a try, because its operation has been slow
    iovec *iov
    job_t *next


# A request that waits for somebody: no thread and no place in the pool.
cdef struct park_t:
    parked_t parked          # first: what the operation knows of it
    queue_t *queue
    request_t request        # without its iovecs: the arguments are in scratch, the reply is a header
    memory_t *memory         # kept: where that lies
    uint64_t readable_bytes
    uint32_t head
    int rc                   # once it is ready
    bint taken
    park_t *next             # of the free or the ready ones


# A thread of the queue, what it has popped and what it runs. While a request keeps it, another thread may be
# given the ring (_watcher): then these are still the first one's.
cdef struct worker_t:
    chain_t chains[BATCH]
    iovec *iov               # of the chains
    int in_request           # a request is being run in place
    int taken                # the ring may be another's by now: to be looked at under the gate
    int measure              # so many more requests are to be timed
    uint64_t nodeid          # of the request in place
    int caught_on            # the file system, by number, that has kept it since the ring was taken
    memory_t *memory         # kept since the ring was taken: where the request's buffers lie


# How long to look for more before sleeping.
cdef struct polling_t:
    uint64_t ns              # now
    uint64_t max_ns
    uint64_t off_until       # ns: others want the CPU
    uint64_t off_ns          # how long that was, the last time
    uint64_t idle_since      # ns, when the ring was left
    bint shares_with_jobs    # who else wants the CPU are the queue's own jobs
    bint gathers             # nobody waits for its requests


# Whether somebody goes on without being called is tried after so many replies, twice as many each time it was
# not so.
cdef struct caller_t:
    uint32_t pid
    uint32_t try_after       # replies


# Interrupt coalescing: replies the guest is not called for yet, because their caller goes on without.
cdef struct coalescing_t:
    uint32_t pid             # that caller: fuse_in_header.pid in the guest, 0 for none
    uint32_t last_pid        # who asked last for something that one may have several of
    bint others_wait         # somebody else has been answered
    bint asked_more          # `pid` has, since the first of the pending replies
    uint32_t batch           # replies to call for at once
    uint32_t pending         # replies not called for
    uint64_t pending_bytes
    uint32_t since_change    # replies since `batch` has changed
    uint32_t to_others       # replies to others since `pid` asked
    caller_t callers[CALLERS]  # who was tried, by pid


cdef struct queue_t:
    ring_t ring
    dispatch_t *dispatch
    pool_t *pool
    notify_t *notify
    counters_t *counters
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
    polling_t polling
    coalescing_t coalescing
    void *owner              # the Run: borrowed
    bint (*start_thread)(queue_t *q) noexcept nogil  # one more: False, none can be had
    watch_t *watch           # NULL: nobody sees to requests that keep the ring
    uint32_t iov_max         # of each worker
    journal_t *journal       # borrowed; with the avail entry of the first chain that nobody has begun
    uint16_t *again          # heads of what a server had taken that has died, in that order
    int n_again
    int at_again             # the next of them
    int broken               # 0 or the ring code that stopped this queue
    # Told by the control thread.
    int stop                 # begin nothing more
    int abandoned            # whoever still works on a request keeps his hands off the ring from now on
    memory_t *new_memory     # kept: to be used from the next batch on, NULL: none; under the gate
    int any_new_memory
    int on_ring              # the thread that has the ring is writing to it, alone
    # The gate: which of the threads has the ring.
    pthread_mutex_t gate
    pthread_cond_t gate_changed  # waits by CLOCK_MONOTONIC
    int threads              # 1, or 2 once something has blocked
    int sleepers             # of those, waiting for a kick
    worker_t *holder         # which of them has the ring, NULL: none
    bint call_due            # the ring was taken from who may have had replies to call for
    bint must_call           # nobody knows whether the guest was called for what was pushed
    bint missed              # the other thread has woken meanwhile and gone back to sleep
    int jobs_live            # made and not done: written under the gate
    # The watcher's: how it takes the ring from the holder, and its last look.
    bint (*take_ring)(queue_t *q) noexcept nogil
    uint16_t seen_avail
    bint seen_request
    uint32_t seen_again      # looks since that found the same request
    queue_t *next_watched
    pthread_mutex_t park_lock
    pthread_mutex_t used_lock   # the used ring and the counters: queue thread and jobs, while jobs_live
    int bounce_fd            # a memfd, and where it is mapped: for chains in memory that may shrink
    char *bounce


cdef inline bint closing(queue_t *q) noexcept nogil:
    """Whether the thread that has the ring is to leave it."""
    return load_acquire_int(&q.stop)
