"""What the servers of one share tell each other of their guests' locks.

The locks themselves are the host's, between processes as within one. Two things are not: that somebody has
given a lock up, and who waits for whom. For these there is a segment of memory, made before the first
server is forked:

- one word that changes when a lock is given up while another server waits; who waits sleeps on it;
- a page of the supervisor's: which partitions have a server;
- a partition for each server: whether it waits, and a row for each lock that one of its owners waits for
  and each lock such an owner holds (only these can be part of a deadlock).

Each server can write to the word and to its own partition. A server that a guest has taken over can
therefore wake others for nothing, and hide or make up deadlocks of its own guest; rows are numbers that
are compared, never followed. What does not fit is not published, and not found.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "_shared.h" nogil:
    uint32_t word_load(const uint32_t *word)
    void word_change(uint32_t *word)
    void word_wait(uint32_t *word, uint32_t seen, uint64_t ns)

cdef enum:
    PARTITIONS = 256
    ROWS_MAX = 1023         # of a partition, numbered from 1
    OWNER_ROWS_MAX = 128    # of one owner's locks
    SEEN_MAX = 2048         # rows of others that are looked at

cdef enum:
    ROW_FREE = 0
    ROW_HOLD = 1
    ROW_WAIT = 2


cdef struct row_t:
    uint64_t seq
    uint32_t kind
    int type            # F_RDLCK, F_WRLCK
    uint32_t owner      # one of the partition's
    uint32_t partition  # filled in by who reads it
    uint64_t dev
    uint64_t ino
    uint64_t start
    uint64_t end
    uint64_t stamp      # ROW_WAIT: when it began, by CLOCK_MONOTONIC


cdef struct partition_t:
    uint32_t waits      # somebody whom only the host refuses: tell it of what is given up
    uint32_t top        # rows ever used
    uint32_t unused[14]
    row_t rows[ROWS_MAX]


cdef struct published_t:
    uint32_t *changes           # NULL: alone
    const uint32_t *taken       # by partition
    const partition_t *all
    partition_t *own
    uint32_t index
    uint16_t next[ROWS_MAX + 1]  # of the free rows, which next[0] begins, or of one owner's
    row_t *seen                 # of others, as look_at_others() found them
    uint32_t n_seen
    uint64_t unpublished        # rows for which there was no place


cdef class Segment:
    cdef char *writable
    cdef const char *readable
    cdef size_t page
    cdef size_t size
    cdef bint joined

    cdef uint32_t *taken(self, char *base) noexcept
    cdef partition_t *partition(self, char *base, uint32_t index) noexcept
    # In the server: what is another's becomes readable only. OSError.
    cdef int join(self, published_t *p, uint32_t index) except -1


# A lock has been given up, which a waiter of another server's may want.
cdef void tell_weaker(const published_t *p) noexcept nogil
# Whether this server wants to be told.
cdef void set_waits(published_t *p, bint waits) noexcept nogil
# Publish a row (kind, type, owner, dev, ino, start, end, stamp): its number, 0 without a place.
cdef uint16_t publish(published_t *p, row_t *row) noexcept nogil
cdef void withdraw(published_t *p, uint16_t number) noexcept nogil
# All rows of our own.
cdef void forget_published(published_t *p) noexcept nogil
# Copy what others publish to p.seen: n_seen.
cdef uint32_t look_at_others(published_t *p) noexcept nogil
