"""A fork that shares the table of descriptors (clone(2), CLONE_FILES)."""

from libc.errno cimport errno

from vfsd.sys cimport _syscalls as h

import os

__all__ = ("fork_sharing_descriptors",)

cdef extern from "Python.h":
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Parent()
    void PyOS_AfterFork_Child()

cdef extern from "<sched.h>" nogil:
    unsigned long CLONE_FILES

cdef extern from "<signal.h>" nogil:
    int SIGCHLD

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_clone


def fork_sharing_descriptors():
    cdef long pid
    cdef int problem
    PyOS_BeforeFork()
    # All else is copied, as by fork(2); glibc's own fork() has no flags.
    pid = h.syscall(SYS_clone, CLONE_FILES | <unsigned long>SIGCHLD, 0ul, 0ul, 0ul, 0ul)
    problem = errno
    if pid == 0:
        PyOS_AfterFork_Child()
        return 0
    PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(problem, os.strerror(problem))
    return pid
