"""Records of requests that outlive a server (see the .pxd)."""

cimport cython

from vfsd.state._memory cimport release, reserve

import os
import struct
from mmap import PAGESIZE, mmap

__all__ = ("CHECKED", "STAGES", "State")

cdef extern from * nogil:
    """
    #ifdef NDEBUG
    #define VFSD_CHECKED 0
    #else
    #define VFSD_CHECKED 1
    #endif
    """
    const int VFSD_CHECKED

CHECKED = bool(VFSD_CHECKED)

assert sizeof(record_t) == 64

# Of debug builds, "STAGE:OPCODE:SKIP[:CRASHES]": see _failpoint.h.
FAILPOINT = "VFSD_FAILPOINT"
STAGES = FAIL_STAGES

AGREED = struct.Struct("=QQQQ")  # 1, and what INIT agreed on: minor version, flags, pages of a request


cdef void journal_begin(journal_t *j, uint32_t num, uint16_t base) noexcept nogil:
    cdef uint32_t head
    j.live = j.stopped = 0
    for head in range(num):
        if j.records[head].stage:
            j.records[head].stage = STAGE_FREE
    j.pushing = 0
    j.num = num
    store_release_u16(&j.next_avail, base)
    j.live = 1


cdef int journal_recover(journal_t *j, uint32_t num, uint16_t used_idx, const uint16_t *avail, bint crashed,
                         uint16_t *heads) noexcept nogil:
    cdef record_t *record
    cdef uint32_t head, mask = num - 1
    cdef uint64_t pushed = 0
    cdef int n = 0, at
    if j.pushing and <uint16_t>j.pushing == used_idx:
        pushed = j.pushing >> 16
    for head in range(num):
        record = &j.records[head]
        if record.stage == STAGE_FREE:
            continue
        if record.number == pushed:
            record.stage = STAGE_FREE
            continue
        if not crashed:
            record.stage &= ~<uint64_t>TRIES_MASK
        # Taken just now, and not counted yet: nobody has that entry before it is answered.
        if avail[2 + (j.next_avail & mask)] == head and avail[1] != j.next_avail:
            j.next_avail += 1
        at = n
        while at > 0 and j.records[heads[at - 1]].number > record.number:
            heads[at] = heads[at - 1]
            at -= 1
        heads[at] = <uint16_t>head
        n += 1
    j.pushing = 0
    return n


@cython.final
cdef class State:
    """What is known of one guest's session and of the requests of its queues, for the next server.

    queues: at most so many. OSError: there is no address space.
    """

    def __cinit__(self, int queues):
        self.queues = queues
        self.journals = <journal_t *>reserve(queues * sizeof(journal_t))
        self.words = mmap(-1, PAGESIZE)
        self.failpoint = <failpoint_t *>reserve(sizeof(failpoint_t))
        if CHECKED and FAILPOINT in os.environ:
            self.set_failpoint(*map(int, os.environ[FAILPOINT].split(":")))

    def set_failpoint(self, int stage, uint32_t opcode, uint32_t skip, int crashes=0):
        """One death by SIGKILL, or so many crashes."""
        self.failpoint.stage = stage
        self.failpoint.opcode = opcode
        self.failpoint.skip = skip
        self.failpoint.crash = crashes > 0
        self.failpoint.deaths = max(1, crashes)

    def __dealloc__(self):
        release(<void **>&self.journals, self.queues * sizeof(journal_t))
        release(<void **>&self.failpoint, sizeof(failpoint_t))

    cdef journal_t *journal(self, int index) noexcept:
        return &self.journals[index]

    @property
    def agreed(self):
        """Minor version, flags, pages of a request, as INIT agreed on; None: no session."""
        known, *agreed = AGREED.unpack_from(self.words)
        return tuple(agreed) if known else None

    @agreed.setter
    def agreed(self, value):
        self.words[:8] = bytes(8)
        if value is not None:
            AGREED.pack_into(self.words, 0, 0, *value)
            self.words[:8] = (1).to_bytes(8, "little")

    def next_server(self, bint crashed):
        """By the keeper, when one server has ended and before it forks the next."""
        self.generation += 1
        self.crashed = crashed

    @property
    def taken(self):
        """Requests that were taken from rings, by all servers."""
        cdef uint64_t n = 0
        for i in range(self.queues):
            n += load_acquire_u64(&self.journals[i].taken)
        return n

    def next_avail(self, int index):
        """Where a server goes on with that ring; None: nobody has started it since it was described."""
        if not 0 <= index < self.queues or not self.journals[index].live:
            return None
        return load_relaxed_u16(&self.journals[index].next_avail)

    def set_up_anew(self, int index):
        """By the keeper: the front end describes that ring from its beginning. Nothing, while it runs."""
        if 0 <= index < self.queues and self.journals[index].stopped:
            self.journals[index].live = 0
