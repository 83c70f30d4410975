"""The device's queues as a Python object."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vfsd.guest.driver._vqs cimport slot_t, transport_t

cdef class Transport:
    cdef transport_t t
    cdef object memory
    cdef list rings        # DriverRing objects: own what vq_t.driver points to
    cdef list threads
    cdef object places     # threads' queue numbers
    cdef object lifecycle
    cdef public object on_broken  # called with the reason in the thread of a queue that is given up

    cdef int add_queue(self, uint32_t i, place, bint event_idx, bint poll) except -1
    cdef int add_forgets(self, uint64_t gpa, uint32_t n) except -1
    cdef slot_t *fill(self, uint32_t opcode, uint64_t nodeid, bytes args, uint32_t out, data, uint64_t into,
                      uint32_t uid, uint32_t gid, uint32_t pid, uint16_t extlen) except NULL
    cdef uint32_t place(self, queue) except 0
    cdef object result(self, slot_t *s)
