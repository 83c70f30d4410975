"""The tables of one guest as a Python object."""

from vfsd.hostfs._slots cimport tables_t

cdef class Tables:
    cdef tables_t t

    cdef int set_root(self, int root_fd) except -1
