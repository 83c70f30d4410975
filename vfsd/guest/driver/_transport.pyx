"""The device's queues as a Python object: their memory, their threads, requests from Python."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport E2BIG, ENOTCONN
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strncpy

from vfsd.memory._regions cimport GuestMemory, memory_from_gpa
from vfsd.virtqueue._driver_ring cimport DriverRing, sg_t
from vfsd.sys._threads cimport (
    pthread_cond_broadcast, pthread_cond_init, pthread_cond_wait, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock,
)
from vfsd.fuse._wire cimport FUSE_OUT_HEADER, fuse_in_header
from vfsd.guest.driver._vqs cimport (
    FORGET_BYTES, KICK_BYTES_MAX, OPCODES_MAX, PAGE, QUEUE_NAME_LEN, REQ_ARGVAR, REQ_MAY_BLOCK, SLOT_ARGS,
    abort_queue, completion_loop, drop_in_flight, finish, forget_send, slot_get, slot_header, slot_out,
    slot_pages, slot_put, slot_send, slot_t, slot_wait, transport_t, vq_t, worker_loop,
)

import logging
import os
import threading
from collections import namedtuple

from vfsd.fuse.opcodes import NAME as OPCODE_NAME

__all__ = ("RingPlace", "Transport")

log = logging.getLogger("vfsd.guest")

cdef extern from "_atomics.h" nogil:
    uint64_t load_relaxed_u64(const uint64_t *p)

RingPlace = namedtuple(
    "RingPlace", "num desc avail used indirect kick_fd kick_message call_fd", module=__name__)


cdef void python_done(slot_t *s, void *owner) noexcept with gil:
    """The end of a request of Transport.submit."""
    pending = <Pending>owner
    try:
        pending.end(s)
    except BaseException:
        log.exception("the end of a request failed")
    Py_DECREF(pending)


@cython.final
cdef class Pending:
    """A request of Transport.submit on its way."""

    cdef Transport owner
    cdef object done

    cdef int end(self, slot_t *s) except -1:
        cdef transport_t *t = &self.owner.t
        result = self.owner.result(s)
        queue = s.queue if s.counted else -1
        own_thread = s.flags & REQ_MAY_BLOCK or t.worker_gone  # without a worker this is who submitted
        slot_put(t, s)
        if own_thread:
            thread = threading.Thread(
                target=self._run, args=(result, queue), name="virtiofs-end", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads: better here than never
                self._run(result, queue)
        else:
            self.done(*result)
        return 0

    def _run(self, result, int queue):
        """The body of a thread that may block; then the request is not in flight any more."""
        cdef vq_t *q
        try:
            self.done(*result)
        except BaseException:
            log.exception("the end of a request failed")
        finally:
            if queue >= 0:
                q = &self.owner.t.vqs[queue]
                pthread_mutex_lock(&q.lock)
                drop_in_flight(q, 1)
                pthread_mutex_unlock(&q.lock)


cdef object failed(int error):
    return OSError(-error, os.strerror(-error))


@cython.final
cdef class Transport:
    """The queues of one device. Index 0 is hiprio, 1 and up are request queues.

    memory, rings: where they lie (`RingPlace`); the arena of arena_bytes(slots, max_pages) at
    arena_gpa holds the requests. poll: look for completions all the time, on request queues.
    Descriptors stay the caller's until close().
    """

    def __cinit__(self, GuestMemory memory not None, rings, uint64_t arena_gpa, uint32_t slots,
                  uint32_t max_pages, bint event_idx=True, uint32_t scramble=0, bint poll=False):
        cdef transport_t *t = &self.t
        cdef uint32_t i
        self.memory = memory
        self.rings = []
        self.threads = []
        self.places = threading.local()
        self.lifecycle = threading.Lock()
        self.on_broken = None
        if slots == 0 or len(rings) < 2:
            raise ValueError("a transport has slots, hiprio and request queues")
        pthread_mutex_init(&t.free_lock, NULL)
        pthread_mutex_init(&t.work_lock, NULL)
        pthread_cond_init(&t.freed, NULL)
        pthread_cond_init(&t.work, NULL)
        t.max_pages = max_pages
        t.scramble = scramble
        t.stride = SLOT_ARGS + <uint64_t>max_pages * PAGE
        t.arena_gpa = arena_gpa
        t.arena = memory_from_gpa(memory.table, arena_gpa,
                                  Transport.arena_bytes(slots, max_pages, rings[0].num), 1)
        if t.arena == NULL:
            raise ValueError("the arena is outside memory")
        t.slots = <slot_t *>calloc(slots, sizeof(slot_t))
        t.vqs = <vq_t *>calloc(len(rings), sizeof(vq_t))
        if t.slots == NULL or t.vqs == NULL:
            raise MemoryError
        for i in range(slots):
            t.slots[i].index = i
            pthread_mutex_init(&t.slots[i].lock, NULL)
            pthread_cond_init(&t.slots[i].ended, NULL)
            t.slots[i].next = &t.slots[i + 1] if i + 1 < slots else NULL
        t.free = t.slots
        t.n_slots = slots
        for i, place in enumerate(rings):
            self.add_queue(i, place, event_idx, poll and i > 0)
        self.add_forgets(arena_gpa + slots * t.stride, rings[0].num)

    cdef int add_queue(self, uint32_t i, place, bint event_idx, bint poll) except -1:
        cdef vq_t *q = &self.t.vqs[i]
        cdef DriverRing ring = DriverRing(
            self.memory, place.num, place.desc, place.avail, place.used, event_idx, place.indirect)
        cdef bytes message = place.kick_message
        cdef bytes name = b"hiprio" if i == 0 else b"requests.%u" % (i - 1)
        cdef const char *text = name
        assert len(message) <= KICK_BYTES_MAX
        self.rings.append(ring)
        q.wake_fd = -1
        self.t.n_vqs = i + 1
        strncpy(q.name, text, QUEUE_NAME_LEN - 1)  # the last byte stays NUL
        q.driver = &ring.driver
        q.sg = <sg_t *>calloc(place.num + 1, sizeof(sg_t))
        if q.sg == NULL:
            raise MemoryError
        q.kick_fd = place.kick_fd
        q.kick_len = len(message)
        memcpy(q.kick_bytes, PyBytes_AS_STRING(message), len(message))
        q.call_fd = place.call_fd
        q.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        q.connected = True
        q.polling = poll
        pthread_mutex_init(&q.lock, NULL)
        pthread_cond_init(&q.zero, NULL)
        return 0

    cdef int add_forgets(self, uint64_t gpa, uint32_t n) except -1:
        cdef transport_t *t = &self.t
        cdef GuestMemory memory = self.memory
        cdef uint32_t i
        t.forget_gpa = gpa
        t.forget_memory = memory_from_gpa(memory.table, gpa, <uint64_t>n * FORGET_BYTES, 1)
        t.forget_free = <uint32_t *>calloc(n, sizeof(uint32_t))
        if t.forget_memory == NULL or t.forget_free == NULL:
            raise MemoryError
        for i in range(n):
            t.forget_free[i] = i
        t.n_forget_free = n
        return 0

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.t.n_vqs):
            free(self.t.vqs[i].sg)
            if self.t.vqs[i].wake_fd >= 0:
                os.close(self.t.vqs[i].wake_fd)
        free(self.t.vqs)
        free(self.t.slots)
        free(self.t.forgets)
        free(self.t.forget_free)

    @staticmethod
    def arena_bytes(slots, max_pages, hiprio_num):
        """How much guest memory that many slots, and a hiprio queue's forgets, take."""
        return slots * (SLOT_ARGS + max_pages * PAGE) + hiprio_num * FORGET_BYTES

    @property
    def names(self):
        """The queues' names, as the kernel gives them."""
        return [self.t.vqs[i].name.decode() for i in range(self.t.n_vqs)]

    @property
    def max_pages(self):
        """Data pages of one request."""
        return self.t.max_pages

    @property
    def in_flight(self):
        """Requests and forgets on rings and queued."""
        cdef uint32_t i
        cdef uint64_t n = 0
        for i in range(self.t.n_vqs):
            n += self.t.vqs[i].in_flight
        return n

    # threads

    def start(self):
        """Start the completion threads and the worker."""
        loops = [(self._run_completion, (i,), self.t.vqs[i].name.decode()) for i in range(self.t.n_vqs)]
        for body, args, name in [*loops, (self._run_worker, (), "virtiofs-worker")]:
            thread = threading.Thread(target=body, args=args, name=name, daemon=True)
            thread.start()
            self.threads.append(thread)

    def _run_completion(self, uint32_t queue):
        """The body of a queue's completion thread."""
        with nogil:
            completion_loop(&self.t, &self.t.vqs[queue])
        if self.t.vqs[queue].broken:
            why = f"{self.t.vqs[queue].name.decode()}: the device's used ring can't be true"
            log.error("%s; the queue is given up", why)
            if self.on_broken is not None:
                self.on_broken(why)

    def _run_worker(self):
        """The body of the worker thread."""
        with nogil:
            worker_loop(&self.t)

    # requests

    cdef slot_t *fill(self, uint32_t opcode, uint64_t nodeid, bytes args, uint32_t out, data, uint64_t into,
                      uint32_t uid, uint32_t gid, uint32_t pid, uint16_t extlen) except NULL:
        """A slot with a request in it. OSError E2BIG, ENOTCONN."""
        cdef transport_t *t = &self.t
        cdef slot_t *s
        cdef fuse_in_header *header
        cdef const unsigned char[::1] view = None
        cdef uint64_t size = 0
        cdef uint64_t limit = <uint64_t>t.max_pages * PAGE
        if data is not None:
            view = data
            size = view.shape[0]
        if <uint64_t>len(args) + out + 64 > SLOT_ARGS or size > limit or into > limit:
            raise failed(-E2BIG)
        with nogil:
            s = slot_get(t)
        if s == NULL:
            raise failed(-ENOTCONN)
        header = <fuse_in_header *>slot_header(t, s)
        header.opcode = opcode
        header.nodeid = nodeid
        header.uid = uid
        header.gid = gid
        header.pid = pid
        header.total_extlen = extlen
        s.in_args = len(args)
        memcpy(header + 1, PyBytes_AS_STRING(args), len(args))
        s.in_pages = <uint32_t>size
        if size:
            memcpy(slot_pages(t, s), &view[0], size)
        s.out_args = out
        s.out_pages = <uint32_t>into
        return s

    cdef uint32_t place(self, queue) except 0:
        """The request queue to use: the one asked for, or this thread's."""
        cdef uint32_t n = self.t.n_vqs - 1
        if queue is not None:
            if not 0 < queue <= n:
                raise ValueError(f"there is no request queue {queue}")
            return queue
        mine = getattr(self.places, "queue", None)
        if mine is None:
            mine = self.places.queue = threading.get_native_id() % n + 1
        return mine

    cdef object result(self, slot_t *s):
        """(errno or 0, out arguments, data in pages)."""
        cdef uint32_t args = s.out_bytes if s.out_bytes < s.out_args else s.out_args
        cdef char *body = slot_out(&self.t, s) + FUSE_OUT_HEADER
        if s.error:
            return -s.error, b"", b""
        return (0, PyBytes_FromStringAndSize(body, args),
                PyBytes_FromStringAndSize(slot_pages(&self.t, s), s.out_bytes - args))

    def call(self, uint32_t opcode, uint64_t nodeid, bytes args=b"", *, uint32_t out=0, bint argvar=False,
             data=None, into=None, uint32_t uid=0, uint32_t gid=0, uint32_t pid=0, uint16_t extlen=0,
             queue=None):
        """Send one request and wait: (out arguments, bytes written to `into`).

        args: all in arguments that are no data, concatenated. out: bytes of out arguments.
        argvar: the last of them, or `into`, may come shorter. data: goes out in pages. into: a
        writable buffer, filled from pages. queue: a request queue; None takes this thread's.
        OSError: the reply's errno, or ENOTCONN, EIO (a reply that is none), E2BIG (longer than the
        ring or than max_pages allows).
        """
        cdef transport_t *t = &self.t
        cdef unsigned char[::1] view = None
        cdef uint64_t room = 0
        cdef slot_t *s
        cdef uint32_t q = self.place(queue), n
        cdef int error
        if into is not None:
            view = into
            room = view.shape[0]
        s = self.fill(opcode, nodeid, args, out, data, room, uid, gid, pid, extlen)
        s.flags = REQ_ARGVAR if argvar else 0
        with nogil:
            slot_send(t, s, q, False)
            error = slot_wait(t, s)
        if error:
            slot_put(t, s)
            raise failed(error)
        n = s.out_bytes if s.out_bytes < s.out_args else s.out_args
        reply = PyBytes_FromStringAndSize(slot_out(t, s) + FUSE_OUT_HEADER, n)
        n = s.out_bytes - n
        if n:
            memcpy(&view[0], slot_pages(t, s), n)
        slot_put(t, s)
        return reply, n

    def submit(self, done, uint32_t opcode, uint64_t nodeid, bytes args=b"", *, uint32_t out=0,
               bint argvar=False, data=None, uint64_t into=0, uint32_t uid=0, uint32_t gid=0,
               uint32_t pid=0, uint16_t extlen=0, queue=None, bint may_block=False):
        """The same without waiting: done(errno or 0, out arguments, data of `into` bytes at most).

        Called in a completion thread or the worker; with may_block in a thread of its own, so that
        it may wait for other replies.
        """
        cdef uint32_t q = self.place(queue)
        cdef slot_t *s = self.fill(opcode, nodeid, args, out, data, into, uid, gid, pid, extlen)
        cdef Pending pending = Pending.__new__(Pending)
        pending.owner = self
        pending.done = done
        Py_INCREF(pending)
        s.flags = (REQ_ARGVAR if argvar else 0) | (REQ_MAY_BLOCK if may_block else 0)
        s.owner = <void *>pending
        s.done = python_done
        with nogil:
            slot_send(&self.t, s, q, False)

    def forget(self, uint64_t nodeid, uint64_t nlookup):
        """One FORGET on hiprio, no reply. Dropped when the queue is not connected."""
        with nogil:
            forget_send(&self.t, nodeid, nlookup)

    # life

    def drain_queue(self, uint32_t queue):
        """virtio_fs_drain_queue: wait until nothing is in flight there."""
        cdef vq_t *q = &self.t.vqs[queue]
        if queue >= self.t.n_vqs:
            raise ValueError(f"there is no queue {queue}")
        with nogil:
            pthread_mutex_lock(&q.lock)
            while q.in_flight:
                pthread_cond_wait(&q.zero, &q.lock)
            pthread_mutex_unlock(&q.lock)

    def drain(self):
        """The same for all queues. A device that never answers is waited for."""
        for queue in range(self.t.n_vqs):
            self.drain_queue(queue)

    def _set_connected(self, bint connected, queue):
        if queue is not None and not 0 <= queue < self.t.n_vqs:
            raise ValueError(f"there is no queue {queue}")
        for i in range(self.t.n_vqs) if queue is None else (queue,):
            pthread_mutex_lock(&self.t.vqs[i].lock)
            self.t.vqs[i].connected = connected and not self.t.vqs[i].aborted
            pthread_mutex_unlock(&self.t.vqs[i].lock)

    def disconnect(self, queue=None):
        """New requests on that queue, or all, end with ENOTCONN; new forgets are dropped."""
        self._set_connected(False, queue)

    def connect(self):
        """Undo disconnect()."""
        self._set_connected(True, None)

    def restart_unique(self):
        """unique starts at 2 again (a new mount)."""
        self.t.unique = 0

    def abort(self, int error):
        """The device is gone: everything in flight ends with that errno, new requests with ENOTCONN."""
        cdef uint32_t i
        with nogil:
            for i in range(self.t.n_vqs):
                abort_queue(&self.t, &self.t.vqs[i], error)

    def close(self):
        """abort(ENOTCONN) and end the threads. Idempotent. Not for a completion thread to call."""
        cdef slot_t *s
        cdef slot_t *ending
        self.abort(ENOTCONN)
        with self.lifecycle:
            with nogil:
                pthread_mutex_lock(&self.t.free_lock)
                self.t.stop = True
                pthread_cond_broadcast(&self.t.freed)
                pthread_mutex_unlock(&self.t.free_lock)
                pthread_mutex_lock(&self.t.work_lock)
                pthread_cond_broadcast(&self.t.work)
                pthread_mutex_unlock(&self.t.work_lock)
            for i in range(self.t.n_vqs):
                if self.t.vqs[i].wake_fd >= 0:
                    os.eventfd_write(self.t.vqs[i].wake_fd, 1)
            for thread in self.threads:
                thread.join()
            self.threads.clear()
            for i in range(self.t.n_vqs):
                if self.t.vqs[i].wake_fd >= 0:
                    os.close(self.t.vqs[i].wake_fd)
                    self.t.vqs[i].wake_fd = -1
            with nogil:
                pthread_mutex_lock(&self.t.work_lock)
                self.t.worker_gone = True
                ending = self.t.ending
                self.t.ending = NULL
                pthread_mutex_unlock(&self.t.work_lock)
                while ending != NULL:  # what was refused after the worker's last look
                    s = ending
                    ending = s.next
                    finish(s)

    def counters(self):
        """By queue name: requests, kicks, calls, in_flight, queued, retries; "opcodes": requests by name."""
        cdef uint32_t i
        cdef vq_t *q
        cdef slot_t *s
        found = {}
        for i in range(self.t.n_vqs):
            q = &self.t.vqs[i]
            pthread_mutex_lock(&q.lock)
            queued = self.t.n_forgets if i == 0 else 0
            s = q.queued
            while s != NULL:
                queued += 1
                s = s.next
            found[q.name.decode()] = {
                "requests": q.requests, "kicks": q.kicks, "calls": q.calls,
                "in_flight": q.in_flight, "queued": queued, "retries": q.retries,
            }
            pthread_mutex_unlock(&q.lock)
        found["opcodes"] = opcodes = {}
        for opcode in range(OPCODES_MAX):
            n = load_relaxed_u64(&self.t.opcodes[opcode])
            if n:
                opcodes[OPCODE_NAME.get(opcode, str(opcode))] = n
        return found
