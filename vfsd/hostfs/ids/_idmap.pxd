"""Translation of ids between guest and host (vfsd.hostfs.ids.idmap has the rules)."""

from libc.errno cimport EPERM
from libc.stdint cimport uint32_t

from vfsd.hostfs.table._slots cimport ID_FORBID, ID_SHIFT, id_map_t, id_range_t


cdef inline int translate(const id_map_t *m, uint32_t id, uint32_t *to) noexcept nogil:
    """0, or -EPERM for an id whose use is forbidden."""
    cdef const id_range_t *it
    cdef uint32_t low = 0, high = m.n, middle
    to[0] = id
    while low < high:
        middle = (low + high) // 2
        it = &m.ranges[middle]
        if id < it.first:
            high = middle
        elif id > it.last:
            low = middle + 1
        elif it.how == ID_FORBID:
            return -EPERM
        else:
            to[0] = it.to + (id - it.first if it.how == ID_SHIFT else 0)
            return 0
    return 0


cdef inline uint32_t id_to_guest(const id_map_t *m, uint32_t id) noexcept nogil:
    cdef uint32_t to = id
    translate(m, id, &to)  # no rule forbids a host's id
    return to
