"""Driver side of a split virtqueue (virtio 1.3, section 2.7)."""

cimport cython
from libc.errno cimport E2BIG, EINVAL, EIO, ENOSPC
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vfsd.memory._regions cimport GuestMemory, memory_from_gpa
from vfsd.virtqueue._layout cimport (
    FAR, RING_NUM_MAX, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY, avail_event, check_init, full_fence, load_acquire_u16,
    load_relaxed_u16, need_event, read_once, store_relaxed_u16, store_release_u16, used_event, used_ring,
    vring_map, vring_used_elem,
)

import os

cdef enum:
    INDIRECT_MAX = 1024  # entries of one table, so that a large queue's tables stay small

globals().update(RING_NUM_MAX=RING_NUM_MAX)


cdef int driver_init(driver_t *d, memory_t *m, uint32_t num, uint64_t desc_uva, uint64_t avail_uva,
                     uint64_t used_uva, bint event_idx) noexcept nogil:
    cdef uint32_t i
    cdef int rc = vring_map(m, num, desc_uva, avail_uva, used_uva, event_idx, &d.desc, &d.avail, &d.used)
    if rc < 0:
        return rc
    d.num = num
    d.event_idx = event_idx
    d.num_free = <uint16_t>num
    for i in range(num):
        d.next[i] = <uint16_t>((i + 1) & (num - 1))
    memset(d.avail, 0, 4 + 2 * num + (2 if event_idx else 0))
    memset(d.used, 0, 4 + 8 * num + (2 if event_idx else 0))
    return 0


cdef inline void desc_set(vring_desc *desc, const sg_t *sg, bint writable, bint last,
                          uint16_t next) noexcept nogil:
    desc.addr = sg.gpa
    desc.len = sg.len
    desc.flags = (VRING_DESC_F_WRITE if writable else 0) | (0 if last else VRING_DESC_F_NEXT)
    desc.next = 0 if last else next


cdef void add_indirect(driver_t *d, const sg_t *sg, uint32_t n_readable, uint32_t total) noexcept nogil:
    cdef uint64_t first = <uint64_t>d.free_head * d.indirect_max
    cdef vring_desc *desc = &d.desc[d.free_head]
    cdef uint32_t i
    for i in range(total):
        desc_set(&d.indirect[first + i], &sg[i], i >= n_readable, i + 1 == total, <uint16_t>(i + 1))
    desc.addr = d.indirect_gpa + first * sizeof(vring_desc)
    desc.len = total * sizeof(vring_desc)
    desc.flags = VRING_DESC_F_INDIRECT
    desc.next = 0
    d.free_head = d.next[d.free_head]


cdef void add_direct(driver_t *d, const sg_t *sg, uint32_t n_readable, uint32_t total) noexcept nogil:
    cdef uint32_t i
    for i in range(total):
        desc_set(&d.desc[d.free_head], &sg[i], i >= n_readable, i + 1 == total, d.next[d.free_head])
        d.free_head = d.next[d.free_head]


cdef int driver_add(driver_t *d, const sg_t *sg, uint32_t n_readable, uint32_t n_writable,
                    uint64_t token) noexcept nogil:
    cdef uint64_t total = <uint64_t>n_readable + n_writable
    cdef bint indirect = d.indirect != NULL and 1 < total <= d.indirect_max
    cdef uint16_t head = d.free_head
    if total == 0:
        return -EINVAL
    if total > d.num:
        return -E2BIG
    if (1 if indirect else total) > d.num_free:
        return -ENOSPC
    if indirect:
        add_indirect(d, sg, n_readable, <uint32_t>total)
        total = 1
    else:
        add_direct(d, sg, n_readable, <uint32_t>total)
    d.chain_len[head] = <uint16_t>total
    d.token[head] = token
    d.num_free -= <uint16_t>total
    store_relaxed_u16(&d.avail[2 + (d.avail_idx & (d.num - 1))], head)
    d.avail_idx += 1
    return head


cdef void driver_publish(driver_t *d) noexcept nogil:
    d.published_idx = d.avail_idx
    store_release_u16(&d.avail[1], d.avail_idx)


cdef bint driver_wants_kick(driver_t *d) noexcept nogil:
    cdef uint16_t old = d.kicked_idx
    if old == d.published_idx:
        return False
    d.kicked_idx = d.published_idx
    full_fence()
    if d.event_idx:
        return need_event(load_relaxed_u16(avail_event(d.used, d.num)), d.published_idx, old)
    return not load_relaxed_u16(&d.used[0]) & VRING_USED_F_NO_NOTIFY


cdef void driver_free(driver_t *d, uint16_t head) noexcept nogil:
    cdef uint16_t tail = head, n = d.chain_len[head]
    while n > 1:
        tail = d.next[tail]
        n -= 1
    d.next[tail] = d.free_head
    d.free_head = head
    d.num_free += d.chain_len[head]
    d.chain_len[head] = 0


cdef int driver_pop_used(driver_t *d, uint64_t *token, uint32_t *written) noexcept nogil:
    cdef vring_used_elem elem
    cdef uint16_t idx = load_acquire_u16(&d.used[1])
    if idx == d.last_used:
        return 0
    if <uint16_t>(idx - d.last_used) > <uint16_t>(d.published_idx - d.last_used):
        return -EIO
    read_once(&elem, &used_ring(d.used)[d.last_used & (d.num - 1)], sizeof(elem))
    if elem.id >= d.num or d.chain_len[elem.id] == 0:
        return -EIO
    token[0] = d.token[elem.id]
    written[0] = elem.len
    driver_free(d, <uint16_t>elem.id)
    d.last_used += 1
    return 1


cdef void driver_disable_call(driver_t *d) noexcept nogil:
    if d.event_idx:
        store_relaxed_u16(used_event(d.avail, d.num), <uint16_t>(d.last_used + FAR))
    else:
        store_relaxed_u16(&d.avail[0], VRING_AVAIL_F_NO_INTERRUPT)


cdef bint driver_enable_call(driver_t *d) noexcept nogil:
    if d.event_idx:
        store_relaxed_u16(used_event(d.avail, d.num), d.last_used)
    else:
        store_relaxed_u16(&d.avail[0], 0)
    full_fence()
    return load_acquire_u16(&d.used[1]) != d.last_used


@cython.final
cdef class DriverRing:
    """Driver side of a split virtqueue, starting on an empty ring.

    desc, avail and used are user addresses as for DeviceRing. indirect is the guest physical
    address, a multiple of 16, of num tables of min(num, 1024) descriptors, None for none.
    """

    def __cinit__(self, GuestMemory memory not None, uint32_t num, uint64_t desc, uint64_t avail,
                  uint64_t used, bint event_idx=False, indirect=None):
        cdef uint32_t n = min(num, <uint32_t>RING_NUM_MAX) + 1
        cdef driver_t *d = &self.driver
        self.memory = memory
        d.next = <uint16_t *>calloc(n, sizeof(uint16_t))
        d.chain_len = <uint16_t *>calloc(n, sizeof(uint16_t))
        d.token = <uint64_t *>calloc(n, sizeof(uint64_t))
        self.sg = <sg_t *>calloc(n, sizeof(sg_t))
        if d.next == NULL or d.chain_len == NULL or d.token == NULL or self.sg == NULL:
            raise MemoryError
        check_init(driver_init(d, memory.table, num, desc, avail, used, event_idx))
        if indirect is not None:
            d.indirect_gpa = indirect
            d.indirect_max = min(num, <uint32_t>INDIRECT_MAX)
            d.indirect = <vring_desc *>memory_from_gpa(
                memory.table, d.indirect_gpa, <uint64_t>num * d.indirect_max * sizeof(vring_desc), 16)
            if d.indirect == NULL:
                raise ValueError("the indirect tables are outside memory or not aligned")

    def __dealloc__(self):
        free(self.driver.next)
        free(self.driver.chain_len)
        free(self.driver.token)
        free(self.sg)

    def add(self, readable, writable, uint64_t token):
        """Put one chain of (gpa, length) elements in the ring, not yet visible to the device.

        OSError: ENOSPC while the ring is full, E2BIG if it never fits, EINVAL without elements.
        """
        cdef list elements = list(readable)
        cdef uint32_t n = 0, n_readable = <uint32_t>len(elements)
        cdef int rc = -E2BIG
        elements.extend(writable)
        if len(elements) <= <Py_ssize_t>self.driver.num:
            for gpa, length in elements:
                self.sg[n].gpa = gpa
                self.sg[n].len = length
                n += 1
            rc = driver_add(&self.driver, self.sg, n_readable, n - n_readable, token)
        if rc < 0:
            raise OSError(-rc, os.strerror(-rc))

    def publish(self):
        """Make visible all that was added."""
        driver_publish(&self.driver)

    def wants_kick(self):
        """Whether the device asked for a kick for what was published since this was last asked."""
        return driver_wants_kick(&self.driver)

    def pop_used(self):
        """(token, written) of a chain the device gave back, None if there is none.

        written is the device's word. OSError EIO when the used ring cannot be true.
        """
        cdef uint64_t token = 0
        cdef uint32_t written = 0
        cdef int rc = driver_pop_used(&self.driver, &token, &written)
        if rc < 0:
            raise OSError(-rc, "used ring names a chain that is not in flight")
        return (token, written) if rc else None

    def disable_call(self):
        """Tell the device not to call."""
        driver_disable_call(&self.driver)

    def enable_call(self):
        """Ask for a call; True when used elements are waiting already."""
        return driver_enable_call(&self.driver)
