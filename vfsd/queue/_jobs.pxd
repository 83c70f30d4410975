"""Requests that may block, as jobs for the pool (docs/architecture.md, "Threads")."""

from libc.stdint cimport uint32_t

from vfsd.queue._pool cimport task_t
from vfsd._ring cimport chain_t
from vfsd.queue._state cimport job_t, queue_t
from vfsd.fuse.dispatch cimport request_t

cdef enum:
    JOBS_MIN = 64
    JOBS_BYTES = 1 << 25  # of all iovecs: where a job needs many there are less jobs than heads


# Room for as many requests as the ring has heads, each with iov_max iovecs; of a ring over 1024 for fewer.
# False: no memory. Memory is taken as it is touched.
cdef bint jobs_init(queue_t *q, uint32_t num, uint32_t iov_max) noexcept nogil
cdef void jobs_free(queue_t *q) noexcept nogil
# A request that may wait, with all it needs kept, for the pool, which may have others to do. foreseen: it was not
# tried, because its operation has been slow. NULL: no room.
cdef job_t *make_job(queue_t *q, chain_t *chain, request_t *r, bint foreseen) noexcept nogil
# What the pool does with job.task: run it, reply, call.
cdef void run_job(task_t *task) noexcept nogil
