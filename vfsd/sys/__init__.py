"""Atomics, POSIX threads and system calls."""
