"""Device side of a split virtqueue (virtio 1.3, section 2.7)."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport EINVAL
from libc.stdint cimport UINT32_MAX, UINT64_MAX
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vfsd.memory._regions cimport (
    GuestMemory, iovec, memory_drop, memory_find, memory_from_gpa, memory_keep, memory_t,
)
from vfsd.virtqueue._layout cimport (
    FAR, RING_NUM_MAX, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY, avail_event, check_init, full_fence, load_acquire_u16,
    load_relaxed_u16, need_event, read_once, store_relaxed_u16, store_release_u16, used_event, used_ring,
    vring_desc, vring_map, vring_used_elem,
)

import errno


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
    CHAIN_TORN: "guest memory is gone",
}

globals().update(
    RING_NUM_MAX=RING_NUM_MAX,
    CHAIN_LOOP=CHAIN_LOOP, CHAIN_INDEX=CHAIN_INDEX, CHAIN_ADDRESS=CHAIN_ADDRESS,
    CHAIN_OVERFLOW=CHAIN_OVERFLOW, CHAIN_ORDER=CHAIN_ORDER, CHAIN_NESTED=CHAIN_NESTED,
    CHAIN_INDIRECT_LENGTH=CHAIN_INDIRECT_LENGTH, CHAIN_TOO_LONG=CHAIN_TOO_LONG,
    CHAIN_INDIRECT_NEXT=CHAIN_INDIRECT_NEXT, CHAIN_TOTAL=CHAIN_TOTAL,
    CHAIN_FRAGMENTS=CHAIN_FRAGMENTS, RING_AVAIL=RING_AVAIL, CHAIN_TORN=CHAIN_TORN,
)


class RingError(OSError):
    """The other side broke the ring; code is one of the CHAIN_ERRORS keys."""

    def __init__(self, code):
        super().__init__(errno.EPROTO, CHAIN_ERRORS[code])
        self.code = code


cdef extern from "_atomics.h" nogil:
    void prefetch(const void *p)
    void prefetch_to_write(const void *p)

cdef enum:
    LINE = 64         # bytes of a CPU's cache line
    AHEAD_BYTES = 192  # of a buffer, which is an out header and fuse_entry_out
    AHEAD_BUFFERS = 2  # header and arguments


cdef struct walk_t:
    iovec *base  # first iovec of this direction: elements join behind it
    iovec *next
    iovec *end
    uint32_t elements
    bint unmapped  # the rest of this direction is left out
    bint may_shrink


cdef int ring_init(ring_t *r, memory_t *m, uint32_t num, uint64_t desc_uva, uint64_t avail_uva,
                   uint64_t used_uva, uint16_t base, bint event_idx, iovec *iov,
                   uint32_t iov_max) noexcept nogil:
    cdef int rc
    memset(r, 0, sizeof(ring_t))
    rc = vring_map(m, num, desc_uva, avail_uva, used_uva, event_idx, &r.desc, &r.avail, &r.used)
    if rc < 0:
        return rc
    if iov_max < num:
        return -EINVAL
    r.memory = m
    r.desc_uva = desc_uva
    r.avail_uva = avail_uva
    r.used_uva = used_uva
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


cdef int ring_lies_in(const ring_t *r, const memory_t *m) noexcept nogil:
    cdef vring_desc *desc = NULL
    cdef uint16_t *avail = NULL
    cdef uint16_t *used = NULL
    return vring_map(m, r.num, r.desc_uva, r.avail_uva, r.used_uva, r.event_idx, &desc, &avail, &used)


cdef void ring_use_memory(ring_t *r, memory_t *m) noexcept nogil:
    vring_map(m, r.num, r.desc_uva, r.avail_uva, r.used_uva, r.event_idx, &r.desc, &r.avail, &r.used)
    r.memory = m


cdef int walk_bytes(ring_t *r, walk_t *w, uint64_t gpa, uint64_t size) noexcept nogil:
    cdef uint64_t offset, n
    cdef iovec *last
    cdef char *host
    cdef int i
    while size and not w.unmapped:
        i = memory_find(r.memory, gpa, r.last_region)
        if i < 0 and r.memory.incomplete:
            w.unmapped = True
            break
        if i < 0:
            return CHAIN_ADDRESS
        r.last_region = <uint32_t>i
        w.may_shrink |= r.memory.regions[i].may_shrink
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
    cdef uint32_t left = r.num
    cdef vring_desc d = c.first
    cdef int rc
    if c.head >= r.num:
        return CHAIN_INDEX
    while True:
        left -= 1
        if d.flags & VRING_DESC_F_INDIRECT:
            return walk_indirect(r, w, c, &d)
        rc = walk_element(r, w, c, &d)
        if rc < 0 or not d.flags & VRING_DESC_F_NEXT:
            return rc
        if d.next >= r.num:
            return CHAIN_INDEX
        if left == 0:
            return CHAIN_LOOP
        read_once(&d, &r.desc[d.next], sizeof(d))


cdef int ring_walk(ring_t *r, chain_t *c, iovec *iov) noexcept nogil:
    """The elements of a chain whose head has been read."""
    cdef walk_t w
    cdef int rc
    w.base = w.next = iov
    w.end = r.iov + r.iov_max
    w.elements = 0
    w.unmapped = c.unmapped = w.may_shrink = False
    c.readable = iov
    c.writable = NULL
    c.readable_bytes = c.writable_bytes = 0
    rc = walk_direct(r, &w, c)
    if c.writable == NULL:
        c.writable = w.next
    c.n_readable = <uint32_t>(c.writable - c.readable)
    c.n_writable = <uint32_t>(w.next - c.writable)
    c.may_shrink = w.may_shrink
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


# What the driver has written lies in the caches of its CPU: each line costs as much as a short system
# call to get. Of all chains of a batch they are asked for at once, before the first is looked at.

cdef void read_heads(ring_t *r, chain_t *chains, int n) noexcept nogil:
    """The heads of the next n chains and their descriptors, each in the chain's own copy."""
    cdef const vring_desc *table
    cdef chain_t *c
    cdef int i
    for i in range(n):
        c = &chains[i]
        c.head = load_relaxed_u16(&r.avail[2 + (<uint16_t>(r.last_avail + i) & (r.num - 1))])
        if c.head < r.num:
            prefetch(&r.desc[c.head])
    for i in range(n):
        c = &chains[i]
        if c.head >= r.num:
            continue
        read_once(&c.first, &r.desc[c.head], sizeof(c.first))
        if c.first.flags & VRING_DESC_F_INDIRECT:
            table = <const vring_desc *>memory_from_gpa(r.memory, c.first.addr, c.first.len, 1)
            if table != NULL:
                prefetch(table)


cdef inline void ask_ahead(const iovec *iov, uint32_t n, bint write) noexcept nogil:
    """Where the request begins, or its reply will."""
    cdef uint32_t i, at
    for i in range(n if n < AHEAD_BUFFERS else AHEAD_BUFFERS):
        at = 0
        while at < AHEAD_BYTES and at < iov[i].iov_len:
            if write:
                prefetch_to_write(<char *>iov[i].iov_base + at)
            else:
                prefetch(<char *>iov[i].iov_base + at)
            at += LINE


cdef int ring_pop_batch(ring_t *r, chain_t *chains, int max) noexcept nogil:
    cdef iovec *iov = r.iov
    cdef uint16_t idx
    cdef int n = 0, ready, rc
    if r.last_avail == r.avail_idx:
        idx = load_acquire_u16(&r.avail[1])
        if <uint16_t>(idx - r.last_avail) > r.num:
            return RING_AVAIL
        r.avail_idx = idx
    ready = min(max, <int><uint16_t>(r.avail_idx - r.last_avail))
    if ready:
        prefetch_to_write(&used_ring(r.used)[r.used_idx & (r.num - 1)])
    read_heads(r, chains, ready)
    while n < ready:
        rc = ring_walk(r, &chains[n], iov)
        if rc < 0:
            # Also the chain that finds no room behind others: next time it has the whole array.
            return n if n else rc
        ask_ahead(chains[n].readable, chains[n].n_readable, False)
        ask_ahead(chains[n].writable, chains[n].n_writable, True)
        iov += chains[n].n_readable + chains[n].n_writable
        r.last_avail += 1
        n += 1
    return n


cdef int ring_chain_of(ring_t *r, chain_t *chain, uint16_t head) noexcept nogil:
    chain.head = head
    if head >= r.num:
        return CHAIN_INDEX
    read_once(&chain.first, &r.desc[head], sizeof(chain.first))
    return ring_walk(r, chain, r.iov)


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
    cdef uint16_t old = r.called_idx, event
    if old == r.used_idx:
        return False
    r.called_idx = r.used_idx
    full_fence()
    if r.event_idx:
        event = load_relaxed_u16(used_event(r.avail, r.num))
        if not need_event(event, r.used_idx, old):
            return False
        r.called = True
        r.called_event = event
        return True
    return not load_relaxed_u16(&r.avail[0]) & VRING_AVAIL_F_NO_INTERRUPT


cdef bint ring_call_due(ring_t *r) noexcept nogil:
    return r.event_idx and need_event(
        load_relaxed_u16(used_event(r.avail, r.num)), r.used_idx, r.called_idx)


cdef bint ring_call_unheard(ring_t *r) noexcept nogil:
    """A driver that looks sets its event index anew, if only to 0 (virtqueue_disable_cb)."""
    return r.called and load_relaxed_u16(used_event(r.avail, r.num)) == r.called_event


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


# Python classes

@cython.final
cdef class _View:
    """Owner of one memoryview: holds the memory mapped."""

    cdef memory_t *memory
    cdef iovec iov
    cdef bint writable

    def __dealloc__(self):
        memory_drop(self.memory)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(
            buffer, self, self.iov.iov_base, <Py_ssize_t>self.iov.iov_len, not self.writable, flags)


cdef list views(memory_t *memory, const iovec *iov, uint32_t n, bint writable):
    cdef list result = []
    cdef _View view
    cdef uint32_t i
    for i in range(n):
        view = _View()
        view.memory = memory_keep(memory)
        view.iov = iov[i]
        view.writable = writable
        result.append(memoryview(view))
    return result


@cython.final
cdef class DeviceRing:
    """Device side of a split virtqueue. desc, avail and used are user addresses."""

    def __cinit__(self, GuestMemory memory not None, uint32_t num, uint64_t desc, uint64_t avail,
                  uint64_t used, uint16_t base=0, bint event_idx=False):
        cdef uint32_t iov_max = 2 * min(num, <uint32_t>RING_NUM_MAX) + 64
        self.memory = memory
        self.iov = <iovec *>calloc(iov_max, sizeof(iovec))
        self.chains = <chain_t *>calloc(iov_max, sizeof(chain_t))
        self.elems = <vring_used_elem *>calloc(iov_max, sizeof(vring_used_elem))
        if self.iov == NULL or self.chains == NULL or self.elems == NULL:
            raise MemoryError
        check_init(ring_init(
            &self.ring, memory.table, num, desc, avail, used, base, event_idx, self.iov, iov_max))
        memory_keep(memory.table)

    def __dealloc__(self):
        memory_drop(self.ring.memory)
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
                views(self.ring.memory, self.chains[i].readable, self.chains[i].n_readable, False),
                views(self.ring.memory, self.chains[i].writable, self.chains[i].n_writable, True),
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

    def call_unheard(self):
        """Whether the driver was called and its event index has not moved since."""
        return ring_call_unheard(&self.ring)

    def disable_kick(self):
        """Tell the driver not to kick."""
        ring_disable_kick(&self.ring)

    def enable_kick(self):
        """Ask for a kick; True when chains are waiting already, then do not sleep."""
        return ring_enable_kick(&self.ring)
