"""System calls of namespaces(7) that Python 3.11 has not."""

from libc.errno cimport errno

import os

__all__ = ("unshare_user",)

cdef extern from "<sched.h>" nogil:
    int unshare(int flags)
    int CLONE_NEWUSER


def unshare_user():
    """A user namespace of its own for this process, which must have one thread. OSError."""
    if unshare(CLONE_NEWUSER) < 0:
        raise OSError(errno, os.strerror(errno))
