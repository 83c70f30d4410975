"""Deadlocks of POSIX locks, searched for when somebody is to wait, and while he does."""

from libc.stdint cimport uint64_t

from vfsd.hostfs.lock._holds cimport file_t, locks_t, owner_t, want_t

# Whether somebody in its way waits, over however many others, for the owner itself: among the owners of
# this server. Under locks_t.lock, both.
cdef bint deadlock(locks_t *l, file_t *file, owner_t *origin, const want_t *w) noexcept nogil
# The same with what other servers publish, as look_at_others() has found it. Only by way of waits that
# began before `since`: so of a circle of waits, each of which sees all others, one alone finds it. What
# others publish changes meanwhile: a deadlock is one that is found twice.
cdef bint deadlock_among_servers(locks_t *l, owner_t *origin, const want_t *w, uint64_t since) noexcept nogil
