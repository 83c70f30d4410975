"""Driver side of a split virtqueue (virtio 1.3, section 2.7): what Linux's virtio_ring.c does for one.

As in _ring.pxd, tier 1 takes no GIL, allocates nothing and raises nothing.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd.memory._regions cimport GuestMemory, memory_t
from vfsd.virtqueue._layout cimport vring_desc


cdef struct sg_t:
    uint64_t gpa
    uint32_t len


cdef struct driver_t:
    uint32_t num
    vring_desc *desc
    uint16_t *avail
    uint16_t *used
    vring_desc *indirect     # num tables of indirect_max entries, or NULL
    uint64_t indirect_gpa
    uint32_t indirect_max    # a longer chain uses direct descriptors
    uint16_t *next           # free list and chains: private, the device can write desc.next
    uint16_t *chain_len      # ring slots of the chain at head, 0 = not in flight
    uint64_t *token          # the caller's word for the request at head
    uint16_t free_head
    uint16_t num_free
    uint16_t avail_idx
    uint16_t published_idx   # avail_idx as the device sees it
    uint16_t kicked_idx      # published_idx when the device was last considered for a kick
    uint16_t last_used
    bint event_idx


# 0, -EINVAL or -EFAULT as ring_init. The caller has zeroed d and set next, chain_len and token to
# arrays of num entries; indirect, indirect_gpa and indirect_max may be set at any time before the
# first add. Zeroes avail and used.
cdef int driver_init(driver_t *d, memory_t *m, uint32_t num, uint64_t desc_uva, uint64_t avail_uva,
                     uint64_t used_uva, bint event_idx) noexcept nogil
# Head of the new chain, or -ENOSPC (ring full now), -E2BIG (never fits), -EINVAL (no elements).
# With indirect tables a chain of more than one element takes one ring slot. Not yet visible:
# driver_publish releases all that was added.
cdef int driver_add(driver_t *d, const sg_t *sg, uint32_t n_readable, uint32_t n_writable,
                    uint64_t token) noexcept nogil
cdef void driver_publish(driver_t *d) noexcept nogil
# Whether the device asked for a kick for what was published since this was last asked. Full fence.
cdef bint driver_wants_kick(driver_t *d) noexcept nogil
# 1 and token, written; 0 nothing used; -EIO the device lies (id not in flight, used.idx runs away).
cdef int driver_pop_used(driver_t *d, uint64_t *token, uint32_t *written) noexcept nogil
cdef void driver_disable_call(driver_t *d) noexcept nogil
# 1 when used elements are already waiting. Full fence.
cdef bint driver_enable_call(driver_t *d) noexcept nogil


cdef class DriverRing:
    cdef driver_t driver
    cdef readonly GuestMemory memory
    cdef sg_t *sg
