"""Requests that may block, as jobs for the pool (docs/architecture.md, "Threads")."""

from libc.stdint cimport uint32_t

from vfsd._pool cimport task_t
from vfsd._ring cimport chain_t
from vfsd._virtqueue cimport job_t, queue_t
from vfsd.fuse.dispatch cimport request_t

cdef enum:
    JOBS_MAX = 64       # requests of one queue that the pool has at a time; the next waits inline


# Room for what the pool may have at a time, each with iov_max iovecs. False: no memory.
# Memory is taken as it is touched.
cdef bint jobs_init(queue_t *q, uint32_t iov_max) noexcept nogil
cdef void jobs_free(queue_t *q) noexcept nogil
# A request that may wait, with all it needs kept. NULL: enough of this queue's are out already.
cdef job_t *make_job(queue_t *q, chain_t *chain, request_t *r) noexcept nogil
# What the pool does with job.task: run it, reply, call.
cdef void run_job(task_t *task) noexcept nogil
