"""Requests that may block, as jobs for the pool (docs/architecture.md, "Threads")."""

from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vfsd.memory._regions cimport iovec, memory_drop, memory_keep
from vfsd.queue._pool cimport task_t
from vfsd.queue._replies cimport call_if_wanted, complete_request
from vfsd._ring cimport chain_t
from vfsd.sys._threads cimport pthread_cond_broadcast, pthread_mutex_lock, pthread_mutex_unlock
from vfsd.queue._state cimport job_t, queue_t
from vfsd.queue._watcher cimport run_timed
from vfsd.fuse.dispatch cimport WAIT, request_run, request_t, span_t

__all__ = ()

cdef extern from "_atomics.h" nogil:
    int load_acquire_int(const int *p)
    void store_release_int(int *p, int v)


cdef bint jobs_init(queue_t *q, uint32_t num, uint32_t iov_max) noexcept nogil:
    jobs_free(q)
    q.jobs_max = min(num, max(<uint32_t>JOBS_MIN, <uint32_t>(JOBS_BYTES // (iov_max * sizeof(iovec)))))
    q.job_iov_max = iov_max
    q.jobs = <job_t *>calloc(q.jobs_max, sizeof(job_t))
    q.job_iov = <iovec *>calloc(<size_t>q.jobs_max * iov_max, sizeof(iovec))
    q.free_jobs = NULL
    q.jobs_top = 0
    return q.jobs != NULL and q.job_iov != NULL


cdef void jobs_free(queue_t *q) noexcept nogil:
    free(q.jobs)
    free(q.job_iov)
    q.jobs = NULL
    q.job_iov = NULL


cdef uint32_t keep_iov(span_t *s, iovec *to) noexcept nogil:
    """Move a span's iovecs out of the queue's array, which the next batch overwrites."""
    memcpy(to, s.iov, s.n * sizeof(iovec))
    s.iov = to
    return s.n


cdef job_t *take_job(queue_t *q) noexcept nogil:
    cdef job_t *job
    pthread_mutex_lock(&q.used_lock)
    job = q.free_jobs
    if job != NULL:
        q.free_jobs = job.next
    elif q.jobs_top < q.jobs_max:
        job = &q.jobs[q.jobs_top]
        job.task.run = run_job
        job.queue = q
        job.iov = q.job_iov + <size_t>q.jobs_top * q.job_iov_max
        q.jobs_top += 1
    pthread_mutex_unlock(&q.used_lock)
    return job


cdef job_t *make_job(queue_t *q, chain_t *chain, request_t *r, bint foreseen) noexcept nogil:
    cdef job_t *job = take_job(q)
    cdef uint32_t n
    if job == NULL:
        return NULL
    job.request = r[0]
    job.request.mode = WAIT
    job.memory = memory_keep(q.ring.memory)
    job.head = chain.head
    job.foreseen = foreseen
    job.readable_bytes = chain.readable_bytes
    n = keep_iov(&job.request.body, job.iov)
    keep_iov(&job.request.reply, job.iov + n)
    pthread_mutex_lock(&q.gate)
    store_release_int(&q.jobs_live, q.jobs_live + 1)
    pthread_mutex_unlock(&q.gate)
    return job


cdef void run_job(task_t *task) noexcept nogil:
    cdef job_t *job = <job_t *>task
    cdef queue_t *q = job.queue
    cdef int rc
    # One that has waited for a thread for so long that its ring was abandoned is not begun any more.
    if not load_acquire_int(&q.abandoned):
        rc = run_timed(q, &job.request) if job.foreseen else request_run(q.dispatch, &job.request)
        complete_request(q, &job.request, job.head, job.readable_bytes, rc)
        call_if_wanted(q)
    memory_drop(job.memory)
    pthread_mutex_lock(&q.used_lock)
    job.next = q.free_jobs
    q.free_jobs = job
    pthread_mutex_unlock(&q.used_lock)
    pthread_mutex_lock(&q.gate)
    store_release_int(&q.jobs_live, q.jobs_live - 1)
    if q.jobs_live == 0:
        pthread_cond_broadcast(&q.gate_changed)
    pthread_mutex_unlock(&q.gate)
