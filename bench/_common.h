/* What every load generator measures and checks with: a clock, a histogram, and what files hold.
 *
 * The histogram is log-linear: values below 64 ns have a bucket each, above it every power of two
 * is cut into 64, so that a bucket is at most 1.6 % wide. It has one writer.
 *
 * A file's page p holds in its first word a tag made of a seed and p, in its last word the tag's
 * complement, and between them the word's number: a page at the wrong place, a short copy and a
 * page of an older run all show.
 */
#ifndef VFSD_BENCH_COMMON_H
#define VFSD_BENCH_COMMON_H

#include <stdint.h>
#include <string.h>
#include <time.h>

enum {
	HIST_SUB_BITS = 6,
	HIST_SUB = 1 << HIST_SUB_BITS,
	HIST_BUCKETS = (64 - HIST_SUB_BITS + 1) * HIST_SUB,
	PAGE_BYTES = 4096,
	PAGE_WORDS = PAGE_BYTES / 8,
};

typedef struct {
	uint64_t n, sum, min, max; /* ns */
	uint64_t counts[HIST_BUCKETS];
} hist_t;

static inline uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline unsigned hist_index(uint64_t ns)
{
	unsigned shift;
	if (ns < HIST_SUB)
		return (unsigned)ns;
	shift = 63u - (unsigned)__builtin_clzll(ns) - HIST_SUB_BITS;
	return (shift + 1) * HIST_SUB + (unsigned)((ns >> shift) & (HIST_SUB - 1));
}

static inline void hist_add(hist_t *h, uint64_t ns)
{
	if (h->n == 0 || ns < h->min)
		h->min = ns;
	if (ns > h->max)
		h->max = ns;
	h->n += 1;
	h->sum += ns;
	h->counts[hist_index(ns)] += 1;
}

/* Eight hex digits of a file's name. */
static inline void put_hex8(char *at, uint64_t number)
{
	for (int i = 7; i >= 0; i--, number >>= 4)
		at[i] = "0123456789abcdef"[number & 15];
}

/* A bijection of 64 bits (splitmix64's end). */
static inline uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

/* Number i of an order in which each of 2^bits blocks comes once, and near ones far apart. */
static inline uint64_t scattered(uint64_t i, unsigned bits)
{
	uint64_t mask = ((uint64_t)1 << bits) - 1;
	unsigned half = (bits + 1) / 2;
	if (bits == 0)
		return 0;
	i = ((i & mask) * 0x9e3779b97f4a7c15u) & mask;
	i ^= i >> half;
	i = (i * 0xd1342543de82ef95u) & mask;
	return i ^ (i >> half);
}

static inline uint64_t page_tag(uint64_t seed, uint64_t page) { return mix(seed + page * 0x9e3779b97f4a7c15u); }

static inline void page_tags(char *data, uint64_t seed, uint64_t page)
{
	uint64_t tag = page_tag(seed, page), end = ~tag;
	memcpy(data, &tag, 8);
	memcpy(data + PAGE_BYTES - 8, &end, 8);
}

static inline void page_fill(char *data, uint64_t seed, uint64_t page)
{
	for (uint64_t i = 0; i < PAGE_WORDS; i++)
		memcpy(data + 8 * i, &i, 8);
	page_tags(data, seed, page);
}

static inline int page_tags_right(const char *data, uint64_t seed, uint64_t page)
{
	uint64_t tag = page_tag(seed, page), end = ~tag;
	return memcmp(data, &tag, 8) == 0 && memcmp(data + PAGE_BYTES - 8, &end, 8) == 0;
}

static inline int page_right(const char *data, uint64_t seed, uint64_t page)
{
	if (!page_tags_right(data, seed, page))
		return 0;
	for (uint64_t i = 1; i < PAGE_WORDS - 1; i++)
		if (memcmp(data + 8 * i, &i, 8) != 0)
			return 0;
	return 1;
}

#endif
