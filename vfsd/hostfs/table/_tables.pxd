"""The tables of one guest as a Python object."""

from vfsd.hostfs.table._slots cimport id_map_t, tables_t

cdef class Tables:
    cdef tables_t *t  # outlives a server
    cdef list kept  # bytes that t points into
    cdef object locks

    cdef int set_root(self, int root_fd) except -1
    cdef int set_map(self, id_map_t *m, bytes ranges) except -1
