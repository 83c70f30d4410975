"""An interval tree over (inode, foffset): a treap in the table's array of mappings."""


cdef inline bint before(const mapping_t *m, uint32_t a, uint64_t inode, uint64_t foffset,
                        uint32_t node) noexcept nogil:
    if m[a].inode != inode:
        return m[a].inode < inode
    return m[a].foffset < foffset if m[a].foffset != foffset else a < node


cdef inline bint ends_behind(const mapping_t *m, uint32_t a, uint64_t inode, uint64_t foffset) noexcept nogil:
    if m[a].inode != inode:
        return m[a].inode > inode
    return m[a].foffset + m[a].length > foffset


cdef inline uint32_t later(const mapping_t *m, uint32_t a, uint32_t b) noexcept nogil:
    """Which of the two nodes ends last."""
    if a == 0 or b == 0:
        return a + b
    return a if ends_behind(m, a, m[b].inode, m[b].foffset + m[b].length) else b


cdef inline void update(mapping_t *m, uint32_t t) noexcept nogil:
    m[t].last = later(m, t, later(m, m[m[t].left].last, m[m[t].right].last))


cdef void divide(mapping_t *m, uint32_t t, uint32_t key, uint32_t *low, uint32_t *high) noexcept nogil:
    """A subtree in two: what comes before the node `key`, which is not in it, and the rest."""
    if t == 0:
        low[0] = high[0] = 0
        return
    if before(m, t, m[key].inode, m[key].foffset, key):
        divide(m, m[t].right, key, &m[t].right, high)
        low[0] = t
    else:
        divide(m, m[t].left, key, low, &m[t].left)
        high[0] = t
    update(m, t)


cdef uint32_t join(mapping_t *m, uint32_t low, uint32_t high) noexcept nogil:
    if low == 0 or high == 0:
        return low + high
    if m[low].priority > m[high].priority:
        m[low].right = join(m, m[low].right, high)
        update(m, low)
        return low
    m[high].left = join(m, low, m[high].left)
    update(m, high)
    return high


cdef uint32_t plant(mapping_t *m, uint32_t t, uint32_t node) noexcept nogil:
    if t == 0 or m[node].priority > m[t].priority:
        divide(m, t, node, &m[node].left, &m[node].right)
        update(m, node)
        return node
    if before(m, t, m[node].inode, m[node].foffset, node):
        m[t].right = plant(m, m[t].right, node)
    else:
        m[t].left = plant(m, m[t].left, node)
    update(m, t)
    return t


cdef uint32_t interval_insert(mapping_t *m, uint32_t root, uint64_t *seed, uint32_t node) noexcept nogil:
    # xorshift64: that the tree stays flat whatever the guest asks for.
    seed[0] ^= seed[0] << 13
    seed[0] ^= seed[0] >> 7
    seed[0] ^= seed[0] << 17
    m[node].priority = <uint32_t>(seed[0] >> 32)
    return plant(m, root, node)


cdef uint32_t interval_erase(mapping_t *m, uint32_t root, uint32_t node) noexcept nogil:
    if root == node:
        return join(m, m[root].left, m[root].right)
    if before(m, root, m[node].inode, m[node].foffset, node):
        m[root].right = interval_erase(m, m[root].right, node)
    else:
        m[root].left = interval_erase(m, m[root].left, node)
    update(m, root)
    return root


cdef uint32_t interval_find(const mapping_t *m, uint32_t root, uint64_t inode,
                            uint64_t foffset) noexcept nogil:
    cdef uint32_t t = root, left
    while t:
        left = m[t].left
        if left and ends_behind(m, m[left].last, inode, foffset):
            t = left  # if any mapping holds it, one on this side does
        elif m[t].inode == inode and foffset - m[t].foffset < m[t].length:
            return t
        elif before(m, t, inode, foffset, 0):
            t = m[t].right
        else:
            return 0
    return 0


cdef uint32_t interval_next(const mapping_t *m, uint32_t root, uint64_t inode, uint64_t foffset,
                            uint32_t node) noexcept nogil:
    cdef uint32_t t = root, best = 0
    while t:
        if before(m, t, inode, foffset, node):
            t = m[t].right
        else:
            best = t
            t = m[t].left
    return best if m[best].inode == inode else 0
