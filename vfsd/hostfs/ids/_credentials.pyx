"""Who makes a file, and what the thread that works is."""

from libc.errno cimport EACCES, EAGAIN, EINTR, EINVAL, ENOMEM, EOVERFLOW, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport abort
from libc.string cimport memchr, memcpy

from vfsd.fuse cimport _wire as w
from vfsd.fuse.dispatch cimport span_read
from vfsd.sys cimport _syscalls as h
from vfsd.hostfs.ops._caller cimport check_end
from vfsd.hostfs.ids._idmap cimport translate
from vfsd.hostfs.table._slots cimport caps_t
from vfsd.hostfs.ids._xattrmap cimport may_store, name_to_host

__all__ = ("supplementary_groups_work",)

cdef enum:
    RESTORE_TRIES = 1000       # a millisecond each
    RESTORE_PAUSE_NS = 1000000

cdef extern from *:
    """
    /* What this thread has become; as it begins it is what the process is. */
    static __thread struct vfsd_thread {
        int own_fs;         /* umask and directory are this thread's alone */
        int in_proc;        /* the directory is /proc/self/fd */
        unsigned int umask; /* if own_fs */
        int no_setid;       /* it has no CAP_FSETID */
    } vfsd_me;
    """
    struct thread_t "vfsd_thread":
        bint own_fs
        bint in_proc
        unsigned int umask
        bint no_setid
    thread_t me "vfsd_me"


# --- the request ---

cdef int read_groups(tables_t *t, const char *at, uint32_t n, creator_t *c) noexcept nogil:
    """fuse_supp_groups: Linux sends one, the directory's."""
    cdef uint32_t groups[2]  # nr_groups, groups[0]
    if n < sizeof(groups):
        return -EINVAL
    memcpy(groups, at, sizeof(groups))
    if groups[0] != 1 or groups[1] == NO_ID or not t.supp_group:
        return -EINVAL
    c.has_group = True
    return translate(&t.gid_to_host, groups[1], &c.group)


cdef int read_contexts(tables_t *t, const char *at, uint32_t n, uint32_t count, creator_t *c) noexcept nogil:
    """fuse_secctx: none, or one."""
    cdef w.fuse_secctx head
    cdef size_t name_bytes
    cdef const char *end
    cdef int rc
    if count == 0:
        return 0
    if count > 1 or not t.security_ctx or n < sizeof(head):
        return -EINVAL
    memcpy(&head, at, sizeof(head))
    at += sizeof(head)
    n -= sizeof(head)
    end = <const char *>memchr(at, 0, n)
    if end == NULL:
        return -EINVAL
    name_bytes = end + 1 - at
    if name_bytes == 1 or name_bytes > NAME_BYTES or head.size > n - name_bytes:
        return -EINVAL
    memcpy(c.context_name, at, name_bytes)
    c.context = end + 1
    c.context_bytes = head.size
    rc = name_to_host(t, c.context_name)
    return may_store(t, c.context_name) if rc == 0 else rc


cdef int read_extensions(tables_t *t, request_t *r, creator_t *c) noexcept nogil:
    cdef w.fuse_ext_header head
    cdef uint32_t n = 8 * <uint32_t>r.header.total_extlen, at = 0
    cdef int rc = 0
    if n > EXTENSIONS_MAX or span_read(&r.body, c.extensions, n) < 0:
        return -EINVAL
    while rc == 0 and at < n:
        memcpy(&head, c.extensions + at, sizeof(head))  # n and at are multiples of 8
        if head.size < sizeof(head) or head.size > n - at:
            return -EINVAL
        if head.type <= w.FUSE_MAX_NR_SECCTX:
            rc = read_contexts(t, c.extensions + at + sizeof(head), head.size - sizeof(head), head.type, c)
        elif head.type == w.FUSE_EXT_GROUPS:
            rc = read_groups(t, c.extensions + at + sizeof(head), head.size - sizeof(head), c)
        else:
            return -EINVAL
        at += (head.size + 7) & ~<uint32_t>7
    return rc


cdef int caller_read(tables_t *t, request_t *r, creator_t *c) noexcept nogil:
    cdef int rc
    c.has_group = False
    c.context_bytes = 0
    c.umask = 0
    rc = translate(&t.uid_to_host, r.header.uid, &c.uid)
    if rc == 0:
        rc = translate(&t.gid_to_host, r.header.gid, &c.gid)
    # Only root can be somebody else; another user's daemon makes everything its own.
    c.other_uid = t.uid == 0 and c.uid != t.uid and c.uid != NO_ID
    c.other_gid = t.uid == 0 and c.gid != t.gid and c.gid != NO_ID
    return rc


cdef int creator_read(tables_t *t, request_t *r, uint32_t umask, creator_t *c) noexcept nogil:
    cdef int rc = check_end(r)
    if rc == 0:
        rc = caller_read(t, r, c)
    if rc == 0 and (c.uid == NO_ID or c.gid == NO_ID):
        rc = -EOVERFLOW  # may_create() of Linux
    if t.posix_acl:
        c.umask = umask & 0o777
    if rc == 0 and r.header.total_extlen:
        rc = read_extensions(t, r, c)
    return rc


# --- the thread ---

cdef int own_fs() noexcept nogil:
    """A thread shares umask and directory with the one that started it, until now."""
    if h.unshare(h.CLONE_FS) < 0:
        return -errno
    h.umask(0)
    me.umask = 0
    me.own_fs = True
    return 0


cdef int enter_proc(tables_t *t) noexcept nogil:
    cdef int rc = 0
    if me.in_proc:
        return 0
    if not me.own_fs:
        rc = own_fs()
    if rc == 0:
        rc = -errno if h.fchdir(t.proc_fd) < 0 else 0
        me.in_proc = rc == 0
    return rc


cdef int set_caps(const caps_t *caps) noexcept nogil:
    cdef h.__user_cap_header_struct header
    header.version = h.LINUX_CAPABILITY_VERSION_3
    header.pid = 0  # this thread
    return -errno if h.syscall(h.SYS_capset, &header, caps) < 0 else 0


cdef int keep_setid(tables_t *t, bint keep) noexcept nogil:
    cdef caps_t caps[2]
    cdef uint32_t bit = <uint32_t>1 << h.CAP_FSETID
    cdef int rc
    if me.no_setid != keep or not t.caps[0].effective & bit:
        return 0
    memcpy(caps, t.caps, sizeof(caps))
    if not keep:
        caps[0].effective &= ~bit
    rc = set_caps(caps)
    if rc == 0:
        me.no_setid = not keep
    return rc


cdef int refused_id(int error) noexcept nogil:
    return -EOVERFLOW if error == EINVAL else -error  # the daemon's user namespace does not have it


cdef int become(tables_t *t, const creator_t *c) noexcept nogil:
    cdef int rc = 0
    if not me.own_fs:
        rc = own_fs()
    if rc < 0:
        return rc
    if me.umask != c.umask:
        h.umask(c.umask)
        me.umask = c.umask
    if not c.other_uid:
        rc = keep_setid(t, True)
        if rc < 0:
            return rc
    # The groups first: without uid 0 they could not be changed any more.
    if c.other_uid and c.has_group and h.syscall(h.SYS_setgroups, <long>1, &c.group) < 0:
        return refused_id(errno)
    if c.other_gid and h.syscall(h.SYS_setresgid, <long>-1, <long>c.gid, <long>-1) < 0:
        rc = refused_id(errno)
        if c.other_uid and c.has_group:
            restore_groups()
        return rc
    if c.other_uid and h.syscall(h.SYS_setresuid, <long>-1, <long>c.uid, <long>-1) < 0:
        rc = refused_id(errno)
        if c.other_gid:
            restore_gid(t)
        if c.has_group:
            restore_groups()
        return rc
    return 0


cdef void must_restore(int *tries) noexcept nogil:
    cdef h.timespec pause
    pause.tv_sec = 0
    pause.tv_nsec = RESTORE_PAUSE_NS
    # What the daemon had it may have again: only memory can be missing, or a signal come.
    if (errno != ENOMEM and errno != EAGAIN and errno != EINTR) or tries[0] == RESTORE_TRIES:
        abort()
    tries[0] += 1
    h.nanosleep(&pause, NULL)


cdef void restore_groups() noexcept nogil:
    cdef int tries = 0
    while h.syscall(h.SYS_setgroups, <long>0, NULL) < 0:
        must_restore(&tries)


cdef void restore_gid(const tables_t *t) noexcept nogil:
    cdef int tries = 0
    while h.syscall(h.SYS_setresgid, <long>-1, <long>t.gid, <long>-1) < 0:
        must_restore(&tries)


cdef void restore_uid(const tables_t *t) noexcept nogil:
    cdef int tries = 0
    while h.syscall(h.SYS_setresuid, <long>-1, <long>t.uid, <long>-1) < 0:
        must_restore(&tries)
    me.no_setid = False  # with uid 0 all capabilities come back


cdef void unbecome(tables_t *t, const creator_t *c) noexcept nogil:
    if c.other_uid:
        restore_uid(t)
    if c.other_gid:
        restore_gid(t)
    if c.other_uid and c.has_group:
        restore_groups()


def supplementary_groups_work():
    """Whether a thread of this process can be given a supplementary group, and give it back."""
    # Where a user namespace denies it the process may have kept groups, which unbecome() would lose.
    return (h.syscall(h.SYS_getgroups, <long>0, NULL) == 0
            and h.syscall(h.SYS_setgroups, <long>0, NULL) == 0)


cdef bint override(tables_t *t, const creator_t *c, int rc) noexcept nogil:
    cdef caps_t caps[2]
    # Of ACLs' groups, too, the guest names one at most.
    if rc != -EACCES or not c.other_uid or (t.supp_group and not t.posix_acl):
        return False
    memcpy(caps, t.caps, sizeof(caps))
    caps[0].effective = caps[0].permitted & (<uint32_t>1 << h.CAP_DAC_OVERRIDE)
    caps[1].effective = 0
    return set_caps(caps) == 0
