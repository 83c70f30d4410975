"""Split virtqueue: device side and driver side (virtio 1.3, section 2.7)."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport E2BIG, EFAULT, EINVAL, EIO, ENOSPC
from libc.stdint cimport UINT32_MAX, UINT64_MAX
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vfsd._memory cimport GuestMemory, iovec, memory_find, memory_from_gpa, memory_from_uva, memory_t

import errno
import os


cdef extern from "_atomics.h" nogil:
    uint16_t load_acquire_u16(const uint16_t *p)
    uint16_t load_relaxed_u16(const uint16_t *p)
    void store_release_u16(uint16_t *p, uint16_t v)
    void store_relaxed_u16(uint16_t *p, uint16_t v)
    void full_fence()


cdef extern from * nogil:
    """
    /* The barrier keeps the compiler from reading guest memory again after a check. */
    static inline void read_once(void *to, const void *from, size_t n)
    {
        __builtin_memcpy(to, from, n);
        __asm__ volatile("" ::: "memory");
    }
    """
    void read_once(void *to, const void *src, size_t n)


cdef enum:
    VRING_DESC_F_NEXT = 1
    VRING_DESC_F_WRITE = 2
    VRING_DESC_F_INDIRECT = 4
    VRING_USED_F_NO_NOTIFY = 1
    VRING_AVAIL_F_NO_INTERRUPT = 1
    INDIRECT_MAX = 1024  # driver: entries of one table, so that a large queue's tables stay small
    FAR = 0x8000         # an event index this far off is not reached before it is set again


assert sizeof(vring_desc) == 16 and sizeof(vring_used_elem) == 8

# One line for each way a ring is refused: logs, counters and RingError take it from here.
CHAIN_ERRORS = {
    CHAIN_LOOP: "descriptor chain loops",
    CHAIN_INDEX: "descriptor index outside the table",
    CHAIN_ADDRESS: "descriptor address outside guest memory",
    CHAIN_OVERFLOW: "descriptor address + length passes 2^64",
    CHAIN_ORDER: "device-readable descriptor after a device-writable one",
    CHAIN_NESTED: "indirect descriptor inside an indirect table",
    CHAIN_INDIRECT_LENGTH: "indirect table length is 0 or not a multiple of 16",
    CHAIN_TOO_LONG: "descriptor chain longer than the queue size",
    CHAIN_INDIRECT_NEXT: "descriptor with both INDIRECT and NEXT",
    CHAIN_TOTAL: "descriptor chain of more than 2^32 - 1 bytes",
    CHAIN_FRAGMENTS: "descriptor chain crosses too many memory regions",
    RING_AVAIL: "avail.idx ahead by more than the queue size",
}

globals().update(
    RING_NUM_MAX=RING_NUM_MAX,
    CHAIN_LOOP=CHAIN_LOOP, CHAIN_INDEX=CHAIN_INDEX, CHAIN_ADDRESS=CHAIN_ADDRESS,
    CHAIN_OVERFLOW=CHAIN_OVERFLOW, CHAIN_ORDER=CHAIN_ORDER, CHAIN_NESTED=CHAIN_NESTED,
    CHAIN_INDIRECT_LENGTH=CHAIN_INDIRECT_LENGTH, CHAIN_TOO_LONG=CHAIN_TOO_LONG,
    CHAIN_INDIRECT_NEXT=CHAIN_INDIRECT_NEXT, CHAIN_TOTAL=CHAIN_TOTAL,
    CHAIN_FRAGMENTS=CHAIN_FRAGMENTS, RING_AVAIL=RING_AVAIL,
)


class RingError(OSError):
    """The other side broke the ring; code is one of the CHAIN_ERRORS keys."""

    def __init__(self, code):
        super().__init__(errno.EPROTO, CHAIN_ERRORS[code])
        self.code = code


# Both sides

cdef inline bint need_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    """vring_need_event, virtio 1.3, 2.7.7.1."""
    return <uint16_t>(new - event - 1) < <uint16_t>(new - old)


cdef int vring_map(const memory_t *m, uint32_t num, uint64_t desc_uva, uint64_t avail_uva, uint64_t used_uva,
                   bint event_idx, vring_desc **desc, uint16_t **avail, uint16_t **used) noexcept nogil:
    cdef uint64_t event = 2 if event_idx else 0
    if num == 0 or num > RING_NUM_MAX or num & (num - 1):
        return -EINVAL
    desc[0] = <vring_desc *>memory_from_uva(m, desc_uva, 16 * <uint64_t>num, 16)
    avail[0] = <uint16_t *>memory_from_uva(m, avail_uva, 4 + 2 * <uint64_t>num + event, 2)
    used[0] = <uint16_t *>memory_from_uva(m, used_uva, 4 + 8 * <uint64_t>num + event, 4)
    return 0 if desc[0] != NULL and avail[0] != NULL and used[0] != NULL else -EFAULT


cdef inline uint16_t *used_event(uint16_t *avail, uint32_t num) noexcept nogil:
    return &avail[2 + num]


cdef inline uint16_t *avail_event(uint16_t *used, uint32_t num) noexcept nogil:
    return &used[2 + 4 * num]


cdef inline vring_used_elem *used_ring(uint16_t *used) noexcept nogil:
    return <vring_used_elem *>(used + 2)


# Device side

cdef struct walk_t:
    iovec *base  # first iovec of this direction: elements join behind it
    iovec *next
    iovec *end
    uint32_t elements
    bint unmapped  # the rest of this direction is left out
    bint fragile


cdef int ring_init(ring_t *r, const memory_t *m, uint32_t num, uint64_t desc_uva, uint64_t avail_uva,
                   uint64_t used_uva, uint16_t base, bint event_idx, iovec *iov, uint32_t iov_max) noexcept nogil:
    cdef int rc
    memset(r, 0, sizeof(ring_t))
    rc = vring_map(m, num, desc_uva, avail_uva, used_uva, event_idx, &r.desc, &r.avail, &r.used)
    if rc < 0:
        return rc
    if iov_max < num:
        return -EINVAL
    r.memory = m
    r.num = num
    r.last_avail = base
    r.avail_idx = base
    # As vhost_vq_init_access: chains in flight at a restart make it differ from base.
    r.used_idx = load_relaxed_u16(&r.used[1])
    r.called_idx = r.used_idx
    r.event_idx = event_idx
    r.iov = iov
    r.iov_max = iov_max
    return 0


cdef int walk_bytes(ring_t *r, walk_t *w, uint64_t gpa, uint64_t size) noexcept nogil:
    cdef uint64_t offset, n
    cdef iovec *last
    cdef char *host
    cdef int i
    while size and not w.unmapped:
        i = memory_find(r.memory, gpa, r.last_region)
        if i < 0 and r.memory.partial:
            w.unmapped = True
            break
        if i < 0:
            return CHAIN_ADDRESS
        r.last_region = <uint32_t>i
        w.fragile |= r.memory.regions[i].fragile
        offset = gpa - r.memory.regions[i].gpa
        n = min(size, r.memory.regions[i].size - offset)
        host = r.memory.regions[i].host + offset
        last = w.next - 1
        if w.next != w.base and <char *>last.iov_base + last.iov_len == host:
            last.iov_len += n
        elif w.next == w.end:
            return CHAIN_FRAGMENTS
        else:
            w.next.iov_base = host
            w.next.iov_len = n
            w.next += 1
        gpa += n
        size -= n
    return 0


cdef inline int walk_element(ring_t *r, walk_t *w, chain_t *c, const vring_desc *d) noexcept nogil:
    w.elements += 1
    if w.elements > r.num:
        return CHAIN_TOO_LONG
    if d.flags & VRING_DESC_F_WRITE:
        if c.writable == NULL:
            c.writable = w.next
            w.base = w.next
            c.unmapped = w.unmapped
            w.unmapped = False
        c.writable_bytes += d.len
    elif c.writable != NULL:
        return CHAIN_ORDER
    else:
        c.readable_bytes += d.len
    if c.readable_bytes > UINT32_MAX or c.writable_bytes > UINT32_MAX:
        return CHAIN_TOTAL
    if d.len and d.addr > UINT64_MAX - (d.len - 1):
        return CHAIN_OVERFLOW
    return walk_bytes(r, w, d.addr, d.len)


cdef int walk_indirect(ring_t *r, walk_t *w, chain_t *c, const vring_desc *indirect) noexcept nogil:
    cdef uint32_t n = indirect.len // sizeof(vring_desc), i = 0, left = n
    cdef vring_desc d
    cdef vring_desc *table
    cdef int rc
    # The descriptor's own WRITE flag is ignored: virtio 1.3, 2.7.5.3.2.
    if indirect.flags & VRING_DESC_F_NEXT:
        return CHAIN_INDIRECT_NEXT
    if n == 0 or indirect.len % sizeof(vring_desc):
        return CHAIN_INDIRECT_LENGTH
    if n > r.num:
        return CHAIN_TOO_LONG
    if indirect.addr > UINT64_MAX - (indirect.len - 1):
        return CHAIN_OVERFLOW
    # A table over the border of two regions is refused: drivers allocate it in one piece.
    table = <vring_desc *>memory_from_gpa(r.memory, indirect.addr, indirect.len, 1)
    if table == NULL:
        return CHAIN_ADDRESS
    while left:
        left -= 1
        read_once(&d, &table[i], sizeof(d))
        if d.flags & VRING_DESC_F_INDIRECT:
            return CHAIN_NESTED
        rc = walk_element(r, w, c, &d)
        if rc < 0 or not d.flags & VRING_DESC_F_NEXT:
            return rc
        i = d.next
        if i >= n:
            return CHAIN_INDEX
    return CHAIN_LOOP


cdef int walk_direct(ring_t *r, walk_t *w, chain_t *c) noexcept nogil:
    cdef uint32_t i = c.head, left = r.num
    cdef vring_desc d
    cdef int rc
    while left:
        left -= 1
        if i >= r.num:
            return CHAIN_INDEX
        read_once(&d, &r.desc[i], sizeof(d))
        if d.flags & VRING_DESC_F_INDIRECT:
            return walk_indirect(r, w, c, &d)
        rc = walk_element(r, w, c, &d)
        if rc < 0 or not d.flags & VRING_DESC_F_NEXT:
            return rc
        i = d.next
    return CHAIN_LOOP if i < r.num else CHAIN_INDEX


cdef int ring_walk(ring_t *r, chain_t *c, iovec *iov) noexcept nogil:
    cdef walk_t w
    cdef int rc
    w.base = w.next = iov
    w.end = r.iov + r.iov_max
    w.elements = 0
    w.unmapped = c.unmapped = w.fragile = False
    c.head = load_relaxed_u16(&r.avail[2 + (r.last_avail & (r.num - 1))])
    c.readable = iov
    c.writable = NULL
    c.readable_bytes = c.writable_bytes = 0
    rc = walk_direct(r, &w, c)
    if c.writable == NULL:
        c.writable = w.next
    c.n_readable = <uint32_t>(c.writable - c.readable)
    c.n_writable = <uint32_t>(w.next - c.writable)
    c.fragile = w.fragile
    if w.unmapped or c.unmapped:
        c.unmapped = True
        c.readable_bytes = iov_bytes(c.readable, c.n_readable)
        c.writable_bytes = iov_bytes(c.writable, c.n_writable)
    return rc


cdef uint64_t iov_bytes(const iovec *iov, uint32_t n) noexcept nogil:
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(n):
        total += iov[i].iov_len
    return total


cdef bint ring_has_chains(ring_t *r) noexcept nogil:
    return load_acquire_u16(&r.avail[1]) != r.last_avail


cdef int ring_pop_batch(ring_t *r, chain_t *chains, int max) noexcept nogil:
    cdef iovec *iov = r.iov
    cdef uint16_t idx
    cdef int n = 0, rc
    if r.last_avail == r.avail_idx:
        idx = load_acquire_u16(&r.avail[1])
        if <uint16_t>(idx - r.last_avail) > r.num:
            return RING_AVAIL
        r.avail_idx = idx
    while n < max and r.last_avail != r.avail_idx:
        rc = ring_walk(r, &chains[n], iov)
        if rc < 0:
            # Also the chain that finds no room behind others: next time it has the whole array.
            return n if n else rc
        iov += chains[n].n_readable + chains[n].n_writable
        r.last_avail += 1
        n += 1
    return n


cdef void ring_push(ring_t *r, uint16_t head, uint32_t written) noexcept nogil:
    cdef vring_used_elem elem
    elem.id = head
    elem.len = written
    ring_push_batch(r, &elem, 1)


cdef void ring_push_batch(ring_t *r, const vring_used_elem *elems, int n) noexcept nogil:
    cdef int i
    for i in range(n):
        used_ring(r.used)[r.used_idx & (r.num - 1)] = elems[i]
        r.used_idx += 1
    store_release_u16(&r.used[1], r.used_idx)


cdef bint ring_wants_call(ring_t *r) noexcept nogil:
    cdef uint16_t old = r.called_idx
    if old == r.used_idx:
        return False
    r.called_idx = r.used_idx
    full_fence()
    if r.event_idx:
        return need_event(load_relaxed_u16(used_event(r.avail, r.num)), r.used_idx, old)
    return not load_relaxed_u16(&r.avail[0]) & VRING_AVAIL_F_NO_INTERRUPT


cdef void ring_disable_kick(ring_t *r) noexcept nogil:
    if r.event_idx:
        store_relaxed_u16(avail_event(r.used, r.num), <uint16_t>(r.last_avail + FAR))
    else:
        store_relaxed_u16(&r.used[0], VRING_USED_F_NO_NOTIFY)


cdef bint ring_enable_kick(ring_t *r) noexcept nogil:
    if r.event_idx:
        store_relaxed_u16(avail_event(r.used, r.num), r.last_avail)
    else:
        store_relaxed_u16(&r.used[0], 0)
    full_fence()
    return load_acquire_u16(&r.avail[1]) != r.last_avail


# Driver side

cdef int driver_init(driver_t *d, memory_t *m, uint32_t num, uint64_t desc_uva, uint64_t avail_uva,
                     uint64_t used_uva, bint event_idx) noexcept nogil:
    cdef uint32_t i
    cdef int rc = vring_map(m, num, desc_uva, avail_uva, used_uva, event_idx, &d.desc, &d.avail, &d.used)
    if rc < 0:
        return rc
    d.memory = m
    d.num = num
    d.event_idx = event_idx
    d.num_free = <uint16_t>num
    for i in range(num):
        d.next[i] = <uint16_t>((i + 1) & (num - 1))
    memset(d.avail, 0, 4 + 2 * num + (2 if event_idx else 0))
    memset(d.used, 0, 4 + 8 * num + (2 if event_idx else 0))
    return 0


cdef inline void desc_set(vring_desc *desc, const sg_t *sg, bint writable, bint last, uint16_t next) noexcept nogil:
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


cdef int driver_add(driver_t *d, const sg_t *sg, uint32_t n_readable, uint32_t n_writable, uint64_t token) noexcept nogil:
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


# Python classes

@cython.final
cdef class _View:
    """Owner of one memoryview: holds the memory mapped."""

    cdef GuestMemory memory
    cdef iovec iov
    cdef bint writable

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.iov.iov_base, <Py_ssize_t>self.iov.iov_len, not self.writable, flags)
        self.memory.views += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.memory.views -= 1


cdef list views(GuestMemory memory, const iovec *iov, uint32_t n, bint writable):
    cdef list result = []
    cdef _View view
    cdef uint32_t i
    for i in range(n):
        view = _View()
        view.memory = memory
        view.iov = iov[i]
        view.writable = writable
        result.append(memoryview(view))
    return result


cdef int check_init(int rc) except -1:
    if rc == -EINVAL:
        raise ValueError(f"queue size is no power of two in 1..{RING_NUM_MAX}")
    if rc == -EFAULT:
        raise ValueError("a part of the ring is outside memory or not aligned")
    return rc


@cython.final
cdef class DeviceRing:
    """Device side of a split virtqueue. desc, avail and used are user addresses."""

    def __cinit__(self, GuestMemory memory not None, uint32_t num, uint64_t desc, uint64_t avail, uint64_t used,
                  uint16_t base=0, bint event_idx=False):
        cdef uint32_t iov_max = 2 * min(num, <uint32_t>RING_NUM_MAX) + 64
        self.memory = memory
        self.iov = <iovec *>calloc(iov_max, sizeof(iovec))
        self.chains = <chain_t *>calloc(iov_max, sizeof(chain_t))
        self.elems = <vring_used_elem *>calloc(iov_max, sizeof(vring_used_elem))
        if self.iov == NULL or self.chains == NULL or self.elems == NULL:
            raise MemoryError
        check_init(ring_init(&self.ring, &memory.table, num, desc, avail, used, base, event_idx, self.iov, iov_max))

    def __dealloc__(self):
        free(self.iov)
        free(self.chains)
        free(self.elems)

    def pop(self):
        """(head, readable parts, writable parts) of the next chain, None when the ring is empty."""
        cdef list chains = self.pop_batch(1)
        return chains[0] if chains else None

    def pop_batch(self, int max):
        """Up to max chains, at most the queue size; those before a malformed one come first."""
        cdef int n = ring_pop_batch(&self.ring, self.chains, min(max, <int>self.ring.num)), i
        cdef list result = []
        if n < 0:
            raise RingError(n)
        for i in range(n):
            result.append((
                self.chains[i].head,
                views(self.memory, self.chains[i].readable, self.chains[i].n_readable, False),
                views(self.memory, self.chains[i].writable, self.chains[i].n_writable, True),
            ))
        return result

    def push(self, uint16_t head, uint32_t written):
        """Give one chain back, visible at once."""
        ring_push(&self.ring, head, written)

    def push_batch(self, elems):
        """Give chains (head, written) back, visible together."""
        cdef uint32_t n = 0
        elems = list(elems)
        if len(elems) > self.ring.num:
            raise ValueError("more chains than the queue size")
        for head, written in elems:
            self.elems[n].id = head
            self.elems[n].len = written
            n += 1
        ring_push_batch(&self.ring, self.elems, <int>n)

    def wants_call(self):
        """Whether the driver asked for a call for what was pushed since this was last asked."""
        return ring_wants_call(&self.ring)

    def disable_kick(self):
        """Tell the driver not to kick."""
        ring_disable_kick(&self.ring)

    def enable_kick(self):
        """Ask for a kick; True when chains are waiting already, then do not sleep."""
        return ring_enable_kick(&self.ring)


@cython.final
cdef class DriverRing:
    """Driver side of a split virtqueue, starting on an empty ring.

    desc, avail and used are user addresses as for DeviceRing. indirect is the guest physical
    address, a multiple of 16, of num tables of min(num, 1024) descriptors, None for none.
    """

    def __cinit__(self, GuestMemory memory not None, uint32_t num, uint64_t desc, uint64_t avail, uint64_t used,
                  bint event_idx=False, indirect=None):
        cdef uint32_t n = min(num, <uint32_t>RING_NUM_MAX) + 1
        cdef driver_t *d = &self.driver
        self.memory = memory
        d.next = <uint16_t *>calloc(n, sizeof(uint16_t))
        d.chain_len = <uint16_t *>calloc(n, sizeof(uint16_t))
        d.token = <uint64_t *>calloc(n, sizeof(uint64_t))
        self.sg = <sg_t *>calloc(n, sizeof(sg_t))
        if d.next == NULL or d.chain_len == NULL or d.token == NULL or self.sg == NULL:
            raise MemoryError
        check_init(driver_init(d, &memory.table, num, desc, avail, used, event_idx))
        if indirect is not None:
            d.indirect_gpa = indirect
            d.indirect_max = min(num, <uint32_t>INDIRECT_MAX)
            d.indirect = <vring_desc *>memory_from_gpa(
                &memory.table, d.indirect_gpa, <uint64_t>num * d.indirect_max * sizeof(vring_desc), 16)
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
