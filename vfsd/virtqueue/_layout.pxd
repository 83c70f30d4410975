"""The split virtqueue in memory, and the steps that both of its sides take (virtio 1.3, section 2.7)."""

from libc.errno cimport EFAULT, EINVAL
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd.memory._regions cimport memory_from_uva, memory_t


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
    RING_NUM_MAX = 32768  # virtio 1.3, 2.7: Queue Size
    VRING_DESC_F_NEXT = 1
    VRING_DESC_F_WRITE = 2
    VRING_DESC_F_INDIRECT = 4
    VRING_USED_F_NO_NOTIFY = 1
    VRING_AVAIL_F_NO_INTERRUPT = 1
    FAR = 0x8000  # an event index this far off is not reached before it is set again


cdef packed struct vring_desc:
    uint64_t addr
    uint32_t len
    uint16_t flags
    uint16_t next


cdef packed struct vring_used_elem:
    uint32_t id
    uint32_t len


cdef inline bint need_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    """vring_need_event, virtio 1.3, 2.7.7.1."""
    return <uint16_t>(new - event - 1) < <uint16_t>(new - old)


cdef inline int vring_map(const memory_t *m, uint32_t num, uint64_t desc_uva, uint64_t avail_uva,
                          uint64_t used_uva, bint event_idx, vring_desc **desc, uint16_t **avail,
                          uint16_t **used) noexcept nogil:
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


cdef inline int check_init(int rc) except -1:
    if rc == -EINVAL:
        raise ValueError(f"queue size is no power of two in 1..{RING_NUM_MAX}")
    if rc == -EFAULT:
        raise ValueError("a part of the ring is outside memory or not aligned")
    return rc
