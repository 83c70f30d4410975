"""The mappings of a DAX window by what they hold: an interval tree over (inode, foffset).

A treap, each node with the end of its subtree. No GIL, no allocation; logarithmic time.
"""

from libc.stdint cimport uint32_t, uint64_t


# A node is its index in the table's array; node 0 is none.
cdef struct mapping_t:     # 48 bytes
    uint64_t inode
    uint64_t foffset       # in ranges
    uint32_t length        # in ranges; 0: no mapping begins here
    uint32_t references    # busy while > 0: not to be unmapped
    uint32_t left          # of the tree by (inode, foffset, node)
    uint32_t right
    uint32_t last          # the node of this subtree that ends last
    uint32_t priority
    uint32_t older         # all mappings, by when they were made or touched
    uint32_t newer


# Put a node with inode, foffset and length into the tree, or take it out: the new root. seed: of the
# priorities, not 0.
cdef uint32_t interval_insert(mapping_t *m, uint32_t root, uint64_t *seed, uint32_t node) noexcept nogil
cdef uint32_t interval_erase(mapping_t *m, uint32_t root, uint32_t node) noexcept nogil
# A node that holds foffset of the inode, or 0.
cdef uint32_t interval_find(const mapping_t *m, uint32_t root, uint64_t inode,
                            uint64_t foffset) noexcept nogil
# The first node of the inode at or behind (foffset, node), or 0.
cdef uint32_t interval_next(const mapping_t *m, uint32_t root, uint64_t inode, uint64_t foffset,
                            uint32_t node) noexcept nogil
