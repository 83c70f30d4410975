"""Which requests a queue has taken from its ring, and how far each of them is.

When a server dies, the next one finds here what the ring does not tell: a request that was taken and not
answered is done again, one that was done is answered. One record for each head of a descriptor chain, which
the guest does not use again before it is answered. A kill may come between any two stores: they are made in
an order that leaves no doubt.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef extern from "_atomics.h" nogil:
    uint64_t load_acquire_u64(const uint64_t *p)
    void store_release_u64(uint64_t *p, uint64_t v)
    uint16_t load_relaxed_u16(const uint16_t *p)
    void store_release_u16(uint16_t *p, uint16_t v)

cdef extern from "_failpoint.h" nogil:
    ctypedef struct failpoint_t:
        int deaths
        int crash
        int stage
        uint32_t opcode
        uint32_t skip
    int FAIL_TAKEN
    int FAIL_BEGUN
    int FAIL_RAN
    int FAIL_DONE
    int FAIL_PUSHED
    int FAIL_CLEARED
    int FAIL_STAGES
    void reach(failpoint_t *f, int stage, uint32_t opcode)

cdef enum:
    HEADS_MAX = 32768      # of a ring (virtio 1.3, 2.7)
    WITNESSES = 4
    STAGE_MASK = 0xff
    ONE_TRY = 1 << 8       # in record_t.stage, once for each time a server has begun it again
    TRIES_MASK = 0xff00

# record_t.stage
cdef enum:
    STAGE_FREE
    STAGE_TAKEN            # from the ring: to be done, or done again
    STAGE_DONE             # its reply lies in the guest's memory, and is so many bytes (stage >> 32)
    STAGE_PARKED           # taken, and waits for somebody: it can't be what a server dies of


cdef struct record_t:      # 64 bytes
    uint64_t stage
    uint64_t number        # of the queue's requests in the order they were taken, from 1
    uint64_t fh            # the handle that it has made or is just making, 0: none
    uint64_t witness[WITNESSES]  # the operation's: how it knows, when it is done again, whether it was done; the
                           # first is 0 until it has begun
    uint64_t nodeid        # of an inode whose lookups it has raised, 0: none


cdef struct journal_t:
    int live               # a server has started the queue
    int stopped            # and has stopped it, with all requests answered that ever will be
    uint32_t num           # elements of its ring
    uint16_t next_avail    # the avail entry of the first chain that nobody has begun
    uint64_t taken         # requests so far
    uint64_t pushing       # number << 16 | used.idx once it is pushed; 0: nothing is being pushed
    record_t records[HEADS_MAX]


cdef inline void journal_take(journal_t *j, uint16_t head, uint16_t next_avail) noexcept nogil:
    """A request is begun. next_avail: of the entry behind it."""
    cdef record_t *record = &j.records[head]
    j.taken += 1
    record.number = j.taken
    record.fh = record.nodeid = record.witness[0] = 0
    store_release_u64(&record.stage, STAGE_TAKEN)
    store_release_u16(&j.next_avail, next_avail)


cdef inline void journal_done(journal_t *j, uint16_t head, uint32_t written, uint16_t used_idx) noexcept nogil:
    """It is about to be pushed, which makes used.idx that."""
    cdef record_t *record = &j.records[head]
    store_release_u64(&record.stage, <uint64_t>written << 32 | STAGE_DONE)
    store_release_u64(&j.pushing, record.number << 16 | used_idx)


cdef inline void journal_pushed(journal_t *j, uint16_t head) noexcept nogil:
    store_release_u64(&j.records[head].stage, STAGE_FREE)
    store_release_u64(&j.pushing, 0)


# Nothing is under way in a ring of num elements: it starts anew from there.
cdef void journal_begin(journal_t *j, uint32_t num, uint16_t base) noexcept nogil
# A server has died: the heads of what is to be done again, in the order they were taken, and the entry to go
# on from; what was pushed is let go of. used_idx and the avail ring as the guest's memory has them. crashed:
# else it was nothing that the server did.
cdef int journal_recover(journal_t *j, uint32_t num, uint16_t used_idx, const uint16_t *avail, bint crashed,
                         uint16_t *heads) noexcept nogil


cdef class State:
    cdef journal_t *journals
    cdef readonly int queues
    cdef readonly int generation  # servers so far, but for the first
    cdef readonly bint crashed    # the last one did not end of a SIGKILL
    cdef object words
    cdef failpoint_t *failpoint   # in shared memory

    cdef journal_t *journal(self, int index) noexcept
