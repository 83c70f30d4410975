"""The offload pool: threads come as they are needed, up to a limit, and stay."""

cimport cython

from vfsd.sys._threads cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal,
    pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock,
)

import logging
import threading

__all__ = ("Pool",)

log = logging.getLogger("vfsd.queue")

cdef void pool_submit(pool_t *p, task_t *task) noexcept nogil:
    cdef bint grow
    task.next = NULL
    pthread_mutex_lock(&p.lock)
    if p.first == NULL:
        p.first = task
    else:
        p.last.next = task
    p.last = task
    p.waiting += 1
    grow = p.waiting > p.idle and p.threads < p.threads_max
    if grow:
        p.threads += 1
    pthread_cond_signal(&p.work)
    pthread_mutex_unlock(&p.lock)
    if grow:
        add_thread(p)


cdef void add_thread(pool_t *p) noexcept with gil:
    cdef Pool pool = <Pool>p.owner
    try:
        pool.add_thread()
    except RuntimeError:  # no thread can be had: those there are have more to do
        log.exception("no further thread for %s", pool.name)
        p.threads -= 1


cdef void work(pool_t *p) noexcept nogil:
    cdef task_t *task
    pthread_mutex_lock(&p.lock)
    while True:
        while p.first == NULL and not p.stop:
            p.idle += 1
            pthread_cond_wait(&p.work, &p.lock)
            p.idle -= 1
        task = p.first
        if task == NULL:
            pthread_mutex_unlock(&p.lock)
            return
        p.first = task.next
        p.waiting -= 1
        pthread_mutex_unlock(&p.lock)
        task.run(task)
        pthread_mutex_lock(&p.lock)


@cython.final
cdef class Pool:
    """Up to threads_max threads that run tasks; none until the first task comes."""

    def __cinit__(self, str name, unsigned int threads_max):
        self.name = name
        self.threads = []
        self.p.owner = <void *>self
        self.p.threads_max = threads_max
        pthread_mutex_init(&self.p.lock, NULL)
        pthread_cond_init(&self.p.work, NULL)

    def __dealloc__(self):
        pthread_cond_destroy(&self.p.work)
        pthread_mutex_destroy(&self.p.lock)

    cdef int add_thread(self) except -1:
        thread = threading.Thread(target=self._run, name=f"{self.name}.{len(self.threads)}", daemon=True)
        thread.start()
        self.threads.append(thread)
        return 0

    def _run(self):
        with nogil:
            work(&self.p)

    def close(self):
        """Run what has been submitted and end the threads. Nothing may be submitted any more."""
        with nogil:
            pthread_mutex_lock(&self.p.lock)
            self.p.stop = True
            pthread_cond_broadcast(&self.p.work)
            pthread_mutex_unlock(&self.p.lock)
        for thread in self.threads:
            thread.join()
        self.threads.clear()
