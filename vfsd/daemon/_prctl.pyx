"""System calls of a forked server that Python 3.11 has not."""

from libc.errno cimport errno

import os

__all__ = ("die_with_parent", "set_name")

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    int PR_SET_NAME
    int PR_SET_PDEATHSIG

cdef extern from "<signal.h>":
    int SIGKILL

def die_with_parent(int parent):
    if prctl(PR_SET_PDEATHSIG, <unsigned long>SIGKILL, 0ul, 0ul, 0ul) < 0:
        raise OSError(errno, os.strerror(errno))
    return os.getppid() in (parent, 0)  # 0: it is outside of this process namespace


def set_name(bytes name not None):
    cdef const char *text = name
    prctl(PR_SET_NAME, <unsigned long>text, 0ul, 0ul, 0ul)
