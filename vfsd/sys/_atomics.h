/* Memory ordering of the split virtqueue (virtio 1.3, sections 2.7.13 and 2.7.14) and the
 * counters read by other threads.
 *
 * The driver writes the ring, then avail.idx (release); the device loads avail.idx (acquire)
 * before it reads the ring. The device writes the used element, then used.idx (release).
 * Before either side reads the other's event index or flags it needs a full fence, or a
 * notification can be lost: the store of one's own index must be visible first.
 */
#ifndef VFSD_ATOMICS_H
#define VFSD_ATOMICS_H

#include <stdint.h>

static inline uint8_t load_relaxed_u8(const uint8_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void store_relaxed_u8(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline uint16_t load_acquire_u16(const uint16_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint16_t load_relaxed_u16(const uint16_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void store_release_u16(uint16_t *p, uint16_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void store_relaxed_u16(uint16_t *p, uint16_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
/* A full fence of which all the cost is on the other side: heavy_fence() has every CPU that runs a thread of this
 * process pass one. Two sides each store a word and then look at the other's, one for each request, one hardly
 * ever; at least one of them sees what the other has stored. */
static inline void light_fence(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
static inline void full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline int load_relaxed_int(const int *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void store_relaxed_int(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline uint32_t load_relaxed_u32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void store_relaxed_u32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline int load_acquire_int(const int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store_release_int(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void store_release_u32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint64_t load_acquire_u64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint64_t load_relaxed_u64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void store_release_u64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline int cas_u64(uint64_t *p, uint64_t expected, uint64_t desired)
{
	return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline int cas_int(int *p, int expected, int desired)
{
	return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline void set_bits_u64(uint64_t *p, uint64_t bits) { __atomic_or_fetch(p, bits, __ATOMIC_ACQ_REL); }
static inline void clear_bits_u64(uint64_t *p, uint64_t bits) { __atomic_and_fetch(p, ~bits, __ATOMIC_ACQ_REL); }
static inline int add_int(int *p, int v) { return __atomic_add_fetch(p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t add_u64(uint64_t *p, uint64_t v) { return __atomic_add_fetch(p, v, __ATOMIC_ACQ_REL); }

/* Have a line of memory that another CPU wrote on its way to this one; it need not be mapped. */
static inline void prefetch(const void *p) { __builtin_prefetch(p, 0); }

/* The same for a line that will be written, of which the other CPU then has no copy any more. */
static inline void prefetch_to_write(const void *p)
{
#if defined(__x86_64__)
	__asm__ volatile("prefetchw %0" : : "m"(*(const char *)p)); /* the compiler knows it for newer CPUs only */
#else
	__builtin_prefetch(p, 1);
#endif
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* A counter with one writer: readers see a whole value, the writer pays no locked instruction. */
static inline void count_u64(uint64_t *p, uint64_t v)
{
	__atomic_store_n(p, __atomic_load_n(p, __ATOMIC_RELAXED) + v, __ATOMIC_RELAXED);
}

#endif
