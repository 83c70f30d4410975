/* Memory that several processes share: rows that one process writes and others read while it does (a
 * sequence lock each, by which a reader sees a row as a whole or not at all), and waiting for a word to
 * change (futex(2)). Nothing here waits for another process without a bound. */
#ifndef VFSD_SHARED_H
#define VFSD_SHARED_H

#include <limits.h>
#include <linux/futex.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The first word of a row is its sequence number: odd while the rest of it is being written. */
static inline void row_write(uint64_t *row, const uint64_t *from, unsigned words)
{
	uint64_t seq = __atomic_load_n(row, __ATOMIC_RELAXED) | 1;
	unsigned i;
	__atomic_store_n(row, seq, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	for (i = 1; i < words; i++)
		__atomic_store_n(row + i, from[i], __ATOMIC_RELAXED);
	__atomic_store_n(row, seq + 1, __ATOMIC_RELEASE);
}

/* Whether a whole row was read: not from one whose writer died, or keeps writing. */
static inline int row_read(const uint64_t *row, uint64_t *to, unsigned words)
{
	int tries;
	unsigned i;
	for (tries = 0; tries < 64; tries++) {
		uint64_t seq = __atomic_load_n(row, __ATOMIC_ACQUIRE);
		if (seq & 1)
			continue;
		for (i = 1; i < words; i++)
			to[i] = __atomic_load_n(row + i, __ATOMIC_RELAXED);
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (__atomic_load_n(row, __ATOMIC_RELAXED) == seq)
			return 1;
	}
	return 0;
}

static inline uint32_t word_load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline void word_store(uint32_t *word, uint32_t v) { __atomic_store_n(word, v, __ATOMIC_SEQ_CST); }

/* Change a word and wake everybody who sleeps until it does. */
static inline void word_change(uint32_t *word)
{
	__atomic_add_fetch(word, 1, __ATOMIC_SEQ_CST);
	syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Sleep while the word is `seen`, for at most ns nanoseconds. */
static inline void word_wait(uint32_t *word, uint32_t seen, uint64_t ns)
{
	struct timespec most = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };
	syscall(SYS_futex, word, FUTEX_WAIT, seen, &most, NULL, 0);
}

static inline uint64_t monotonic_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
