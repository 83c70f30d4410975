"""Device side of a split virtqueue (virtio 1.3, section 2.7).

Tier 1 (the cdef functions below) is what queue threads call: no GIL, no allocation, nothing
raised. Each descriptor and each ring field the other side writes is read once into a private
copy and checked there. The ring knows nothing of FUSE, sockets or threads.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd.memory._regions cimport GuestMemory, iovec, memory_t
from vfsd.virtqueue._layout cimport vring_desc, vring_used_elem


# Why a chain or the ring was refused. Each has its own number, text and test.
cdef enum:
    CHAIN_LOOP = -1             # next leads back: more steps than the table has entries
    CHAIN_INDEX = -2            # head, next or avail entry outside the table
    CHAIN_ADDRESS = -3          # bytes outside every memory region
    CHAIN_OVERFLOW = -4         # address + length passes 2^64
    CHAIN_ORDER = -5            # readable after writable
    CHAIN_NESTED = -6           # indirect inside indirect
    CHAIN_INDIRECT_LENGTH = -7  # indirect table length 0 or not a multiple of 16
    CHAIN_TOO_LONG = -8         # more elements, indirect ones counted, than the queue has
    CHAIN_INDIRECT_NEXT = -9    # INDIRECT and NEXT on one descriptor
    CHAIN_TOTAL = -10           # more than 2^32 - 1 bytes in one direction
    CHAIN_FRAGMENTS = -11       # crosses memory regions more often than there are iovecs for
    RING_AVAIL = -12            # avail.idx runs ahead by more than the queue size
    CHAIN_TORN = -13            # memory of the guest is gone
    RING_ERRORS = 14            # number of codes above + 1: size of a counter array indexed by -code


# A popped chain. The iovecs are private copies in the ring's own array, adjacent elements
# merged, valid until the next ring_pop_batch: callers may consume them in place.
cdef struct chain_t:
    iovec *readable   # what the driver wrote for the device
    iovec *writable   # where the device may write
    uint32_t n_readable
    uint32_t n_writable
    uint64_t readable_bytes
    uint64_t writable_bytes
    uint16_t head
    vring_desc first  # the head's descriptor
    bint may_shrink      # some of it lies in a region that may shrink
    bint unmapped     # a direction ends early, at bytes outside of a memory that is incomplete


cdef struct ring_t:
    memory_t *memory
    uint64_t desc_uva     # where the parts are, by the front end's addresses
    uint64_t avail_uva
    uint64_t used_uva
    uint32_t num
    vring_desc *desc
    uint16_t *avail       # flags, idx, ring[num], used_event
    uint16_t *used        # flags, idx, elem[num], avail_event
    uint16_t last_avail   # next avail entry to take
    uint16_t avail_idx    # avail.idx as last loaded
    uint16_t used_idx     # next used entry to write
    uint16_t called_idx   # used_idx when the driver was last considered for a call
    uint16_t called_event # the driver's event index when it was last called
    bint called           # it was, and has not been seen to look at the used ring since
    bint event_idx
    uint32_t last_region  # region of the last translation, tried first
    iovec *iov
    uint32_t iov_max


# 0, or -EINVAL (num not a power of two in 1..32768), -EFAULT (a ring part outside memory or unaligned).
# Addresses are user addresses. iov is the caller's array of iov_max >= num entries, kept.
cdef int ring_init(ring_t *r, memory_t *m, uint32_t num, uint64_t desc_uva, uint64_t avail_uva,
                   uint64_t used_uva, uint16_t base, bint event_idx, iovec *iov,
                   uint32_t iov_max) noexcept nogil
# Whether all parts of a ring that runs are in that memory: 0 or -EFAULT.
cdef int ring_lies_in(const ring_t *r, const memory_t *m) noexcept nogil
# Use that memory from now on, in which all parts are. What was popped keeps its addresses.
cdef void ring_use_memory(ring_t *r, memory_t *m) noexcept nogil
# Up to max chains: number taken, 0 ring empty, < 0 one of the codes above. Chains before a bad
# one are returned first; the bad one stays at the front and is reported by the next call.
cdef int ring_pop_batch(ring_t *r, chain_t *chains, int max) noexcept nogil
# The chain of a head that was taken earlier and is not given back: 0, or one of the codes above. Its iovecs are as
# those of ring_pop_batch.
cdef int ring_chain_of(ring_t *r, chain_t *chain, uint16_t head) noexcept nogil
# Whether the driver has made chains available that were not taken yet.
cdef bint ring_has_chains(ring_t *r) noexcept nogil
# One chain given back: written and published (used.idx released) at once.
cdef void ring_push(ring_t *r, uint16_t head, uint32_t written) noexcept nogil
# n chains given back with one release of used.idx.
cdef void ring_push_batch(ring_t *r, const vring_used_elem *elems, int n) noexcept nogil
# Whether the driver asked for a call for what was pushed since this was last asked. Full fence.
cdef bint ring_wants_call(ring_t *r) noexcept nogil
# Whether ring_wants_call would say so now. With EVENT_IDX; without, never.
cdef bint ring_call_due(ring_t *r) noexcept nogil
# Whether the driver was called and has not looked at the used ring since: False without EVENT_IDX.
cdef bint ring_call_unheard(ring_t *r) noexcept nogil
# Tell the driver not to kick.
cdef void ring_disable_kick(ring_t *r) noexcept nogil
# Ask for a kick. 1 when chains are already waiting (then do not sleep). Full fence.
cdef bint ring_enable_kick(ring_t *r) noexcept nogil


cdef class DeviceRing:
    cdef ring_t ring      # keeps its memory
    cdef readonly GuestMemory memory
    cdef iovec *iov
    cdef chain_t *chains
    cdef vring_used_elem *elems
