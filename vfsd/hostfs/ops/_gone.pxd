"""Files and directories that the host has removed and the guest still has a name for.

Linux looks a path up again, every part of it, when an operation on it ends in ESTALE; once, so the second
answer is final. Who asks again for the same has no name for it, only a descriptor (/proc/self/fd, the
working directory), or has just looked it up. A guest that removes a name itself has none left.
"""

from libc.errno cimport EACCES, ENOENT, ESTALE, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp

from vfsd.fuse.dispatch cimport request_t
from vfsd.sys cimport _syscalls as h
from vfsd.sys._syscalls cimport FD_BYTES, PATH_BYTES, fd_name
from vfsd.hostfs.ops._caller cimport ticks_ms
from vfsd.hostfs.table._anchors cimport place_of
from vfsd.hostfs.table._slots cimport (
    ALIVE_MAX, ORIGIN_TMPFILE, TOLD_MAX, load_acquire_u64, load_relaxed_u8, store_release_u64, tables_t,
)

cdef enum:
    ASKS_AGAIN_MS = 10000  # who was told has asked again by then, or has got no further
    USES_WITHIN_MS = 250   # what has been looked up

cdef extern from *:
    """
    #define VFSD_DELETED " (deleted)"  /* d_path() of what has no name any more */
    """
    const char *DELETED "VFSD_DELETED"
    size_t DELETED_BYTES "(sizeof VFSD_DELETED - 1)"


cdef inline uint64_t told_word(const request_t *r, uint32_t index) noexcept nogil:
    return (<uint64_t>r.header.pid << 32) | index


cdef inline void remember(tables_t *t, const request_t *r, uint32_t index, uint64_t for_ms) noexcept nogil:
    store_release_u64(&t.told_until[r.header.pid % TOLD_MAX], ticks_ms() + for_ms)
    store_release_u64(&t.told[r.header.pid % TOLD_MAX], told_word(r, index))


cdef inline int tell_once(tables_t *t, const request_t *r, uint32_t index, int final) noexcept nogil:
    """-ESTALE for the caller's first request of an inode that was removed, then `final`."""
    cdef uint32_t at = r.header.pid % TOLD_MAX
    if load_acquire_u64(&t.told[at]) == told_word(r, index) and ticks_ms() < load_acquire_u64(&t.told_until[at]):
        store_release_u64(&t.told[at], 0)
        return final
    remember(t, r, index, ASKS_AGAIN_MS)
    return -ESTALE


cdef inline bint is_told(const tables_t *t, const request_t *r) noexcept nogil:
    cdef uint64_t seen = load_acquire_u64(&t.told[r.header.pid % TOLD_MAX])
    return seen != 0 and seen >> 32 == r.header.pid


cdef inline void note_found(tables_t *t, const request_t *r, uint32_t index) noexcept nogil:
    """Who looks up again after an -ESTALE has found this: should it be removed at once, it is not told again."""
    if is_told(t, r):
        remember(t, r, index, USES_WITHIN_MS)


cdef inline int count_links(int fd) noexcept nogil:
    """Of what a descriptor stands for, at most 1, or -errno."""
    cdef h.statx_t st
    if h.statx(fd, b"", h.AT_EMPTY_PATH, h.STATX_NLINK, &st) < 0:
        return -errno
    return st.stx_nlink > 0


cdef inline bint keeps_names(const tables_t *t) noexcept nogil:
    """Else the guest has looked up every name that it uses just now."""
    return t.entry_valid > 0 or t.entry_valid_nsec > 0


cdef inline int check_linked(tables_t *t, const request_t *r, uint32_t index, int fd) noexcept nogil:
    """Before a file is written to by its name: 0, or -ESTALE if it has none on the host.

    But one that the guest made without a name: overlayfs truncates it so while it copies up.
    """
    cdef int links = count_links(fd) if keeps_names(t) else 1
    if links < 0:
        return links
    if links == 0 and load_relaxed_u8(&t.inodes[index].origin) != ORIGIN_TMPFILE:
        return tell_once(t, r, index, 0)
    if is_told(t, r):
        store_release_u64(&t.told[r.header.pid % TOLD_MAX], 0)
    return 0


cdef inline bint is_gone(tables_t *t, uint32_t index, int fd) noexcept nogil:
    """Whether a directory that the guest may still have a name for has been removed.

    One that was there in this tick of the clock is not looked at again: programs ask for many names that
    are not there.
    """
    cdef uint64_t *slot = &t.alive[index % ALIVE_MAX]
    cdef uint64_t now = (<uint64_t>index << 32) | <uint32_t>ticks_ms()
    cdef int links
    if not keeps_names(t) or load_acquire_u64(slot) == now:
        return False
    links = count_links(fd)
    if links > 0:
        store_release_u64(slot, now)
    return links == 0


cdef inline int check_directory(tables_t *t, const request_t *r, uint32_t index, int fd, int rc) noexcept nogil:
    """What to answer a request in a directory that came to rc, where a removed one would make it fail or empty."""
    return tell_once(t, r, index, rc) if is_gone(t, index, fd) else rc


cdef inline bint is_in_successor(tables_t *t, int fd, const char *name) noexcept nogil:
    """Whether a name is in the directory that has taken the place of a removed one, below the same path."""
    cdef char path[PATH_BYTES]
    cdef char number[FD_BYTES]
    cdef h.statx_t st
    cdef size_t end
    cdef int directory
    cdef bint found
    cdef ssize_t n = h.readlinkat(t.proc_fd, fd_name(fd, number), path, PATH_BYTES - 1)
    if n <= <ssize_t>DELETED_BYTES or path[0] != c'/':
        return False
    end = <size_t>n - DELETED_BYTES
    if memcmp(path + end, DELETED, DELETED_BYTES) != 0:
        return False
    path[end] = 0
    directory = h.open_resolved(h.AT_FDCWD, path, h.O_PATH | h.O_DIRECTORY | h.O_CLOEXEC, h.RESOLVE_NO_SYMLINKS)
    if directory < 0:
        return False
    found = h.statx(directory, name, h.AT_SYMLINK_NOFOLLOW | h.AT_NO_AUTOMOUNT, h.STATX_NLINK, &st) == 0
    h.close(directory)
    return found


cdef inline int explain_lookup(tables_t *t, const request_t *r, uint32_t index, int fd, const char *name,
                               int rc) noexcept nogil:
    """What to answer a LOOKUP that came to rc. Before it makes a name Linux looks it up and does not try again
    then, but after it could not be made: so -ESTALE only for what would be found.
    """
    if rc != -ENOENT or not is_gone(t, index, fd) or not is_in_successor(t, fd, name):
        return rc
    return tell_once(t, r, index, rc)


cdef inline int explain_denied(tables_t *t, const request_t *r, uint32_t index, int fd, int rc) noexcept nogil:
    """What to answer a request of an inode that came to rc, where it may have been Landlock that refused it.

    What lies below a mount that the host has taken away is not beneath the share any more: by the path that the
    guest has there may be something else.
    """
    cdef char path[PATH_BYTES]
    if rc != -EACCES or not keeps_names(t) or count_links(fd) == 0 or place_of(t, &t.inodes[index], fd, path):
        return rc
    return tell_once(t, r, index, rc)


cdef inline int explain(tables_t *t, const request_t *r, uint32_t index, int fd, int rc) noexcept nogil:
    """What to answer a request in a directory that has failed with rc."""
    return check_directory(t, r, index, fd, rc) if rc == -ENOENT else explain_denied(t, r, index, fd, rc)
