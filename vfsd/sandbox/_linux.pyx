"""System calls of namespaces(7), mounts, capabilities(7) and landlock(7) that Python 3.11 has not."""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from vfsd.sys cimport _syscalls as h

import os

__all__ = (
    "CLONE_FS", "CLONE_NEWIPC", "CLONE_NEWNET", "CLONE_NEWNS", "CLONE_NEWPID", "CLONE_NEWUSER",
    "adopt_orphans", "capabilities", "clear_ambient", "clone_tree", "detach_here", "drop_bounding",
    "forbid_new_privileges", "landlock_abi", "landlock_allow", "landlock_enter", "landlock_ruleset",
    "make_undumpable", "move_mount", "new_mount", "open_ahead", "pivot_here", "receive_mounts_only",
    "restrict_mounts", "set_capabilities", "setns", "unshare",
)  # fmt: skip

cdef extern from "<sched.h>" nogil:
    int c_setns "setns"(int fd, int kind)
    int C_FS "CLONE_FS"
    int C_NEWIPC "CLONE_NEWIPC"
    int C_NEWNET "CLONE_NEWNET"
    int C_NEWNS "CLONE_NEWNS"
    int C_NEWPID "CLONE_NEWPID"
    int C_NEWUSER "CLONE_NEWUSER"

cdef extern from "<sys/mount.h>" nogil:
    int mount(const char *source, const char *target, const char *kind, unsigned long flags, const void *data)
    int umount2(const char *target, int flags)
    unsigned long MS_REC
    unsigned long MS_SLAVE
    int MNT_DETACH

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    int PR_CAPBSET_READ
    int PR_CAPBSET_DROP
    int PR_CAP_AMBIENT
    int PR_CAP_AMBIENT_CLEAR_ALL
    int PR_SET_CHILD_SUBREAPER
    int PR_SET_DUMPABLE
    int PR_SET_NO_NEW_PRIVS

cdef extern from "<dlfcn.h>" nogil:
    void *dlopen(const char *name, int flags)
    int RTLD_NOW

cdef extern from * nogil:
    """
    #include <fcntl.h>
    #include <linux/landlock.h>
    #include <linux/mount.h>
    #include <malloc.h>
    #include <sys/syscall.h>
    #ifndef SYS_mount_setattr
    #define SYS_mount_setattr 442
    #endif
    #ifndef SYS_landlock_create_ruleset
    #define SYS_landlock_create_ruleset 444
    #define SYS_landlock_add_rule 445
    #define SYS_landlock_restrict_self 446
    #endif
    #ifdef M_ARENA_MAX
    #define limit_arenas(n) mallopt(M_ARENA_MAX, n)
    #else
    #define limit_arenas(n) ((void)(n))
    #endif
    /* Of linux/landlock.h from Linux 6.10 on; an older kernel takes the part that it knows. */
    struct vfsd_landlock_ruleset {
        __u64 handled_access_fs, handled_access_net, scoped;
    };
    """
    void limit_arenas(int n)
    long SYS_fsconfig
    long SYS_fsmount
    long SYS_fsopen
    long SYS_landlock_add_rule
    long SYS_landlock_create_ruleset
    long SYS_landlock_restrict_self
    long SYS_mount_setattr
    long SYS_move_mount
    long SYS_open_tree
    long SYS_pivot_root
    int AT_RECURSIVE
    int FSCONFIG_SET_STRING
    int FSCONFIG_CMD_CREATE
    unsigned int FSMOUNT_CLOEXEC
    unsigned int FSOPEN_CLOEXEC
    unsigned int LANDLOCK_CREATE_RULESET_VERSION
    int LANDLOCK_RULE_PATH_BENEATH
    unsigned int MOVE_MOUNT_F_EMPTY_PATH
    unsigned int OPEN_TREE_CLOEXEC
    unsigned int OPEN_TREE_CLONE
    struct mount_attr:
        uint64_t attr_set
    struct landlock_path_beneath_attr:
        uint64_t allowed_access
        int parent_fd
    struct vfsd_landlock_ruleset:
        uint64_t handled_access_fs
        uint64_t handled_access_net
        uint64_t scoped

CLONE_FS = C_FS
CLONE_NEWIPC = C_NEWIPC
CLONE_NEWNET = C_NEWNET
CLONE_NEWNS = C_NEWNS
CLONE_NEWPID = C_NEWPID
CLONE_NEWUSER = C_NEWUSER

cdef struct caps_t:
    uint32_t effective
    uint32_t permitted
    uint32_t inheritable


cdef long checked(str call, long result) except -1:
    if result < 0:
        raise OSError(errno, f"{call}(2): {os.strerror(errno)}")
    return result


# --- namespaces ---

def unshare(int kinds):
    checked("unshare", h.unshare(kinds))


def setns(int fd, int kind):
    checked("setns", c_setns(fd, kind))


def adopt_orphans():
    checked("prctl", prctl(PR_SET_CHILD_SUBREAPER, 1ul, 0ul, 0ul, 0ul))


# --- mounts ---

def receive_mounts_only():
    checked("mount", mount(NULL, b"/", NULL, MS_REC | MS_SLAVE, NULL))


def new_mount(bytes kind not None, dict options not None):
    cdef long context, fd
    context = checked("fsopen", h.syscall(SYS_fsopen, <const char *>kind, FSOPEN_CLOEXEC))
    try:
        for key, value in options.items():
            checked("fsconfig", h.syscall(SYS_fsconfig, context, FSCONFIG_SET_STRING, <const char *>key,
                              <const char *>value, 0))
        checked("fsconfig", h.syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
        fd = checked("fsmount", h.syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, 0))
    finally:
        os.close(context)
    return fd


def clone_tree(int directory, bytes path not None, bint recursive):
    cdef unsigned int flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | <unsigned int>h.AT_EMPTY_PATH
    if recursive:
        flags |= <unsigned int>AT_RECURSIVE
    return checked("open_tree", h.syscall(SYS_open_tree, directory, <const char *>path, flags))


def restrict_mounts(int tree, uint64_t flags):
    cdef mount_attr attr
    memset(&attr, 0, sizeof(attr))
    attr.attr_set = flags
    checked("mount_setattr", h.syscall(SYS_mount_setattr, tree, b"", h.AT_EMPTY_PATH | AT_RECURSIVE,
                                       &attr, sizeof(attr)))


def move_mount(int tree, bytes path not None):
    checked("move_mount", h.syscall(SYS_move_mount, tree, b"", h.AT_FDCWD, <const char *>path,
                                    MOVE_MOUNT_F_EMPTY_PATH))


def pivot_here():
    checked("pivot_root", h.syscall(SYS_pivot_root, b".", b"."))


def detach_here():
    checked("umount2", umount2(b".", MNT_DETACH))


# --- capabilities ---

def capabilities():
    cdef h.__user_cap_header_struct header
    cdef caps_t caps[2]
    header.version = h.LINUX_CAPABILITY_VERSION_3
    header.pid = 0
    checked("capget", h.syscall(h.SYS_capget, &header, caps))
    return <uint64_t>caps[1].permitted << 32 | caps[0].permitted


def set_capabilities(uint64_t permitted):
    cdef h.__user_cap_header_struct header
    cdef caps_t caps[2]
    header.version = h.LINUX_CAPABILITY_VERSION_3
    header.pid = 0
    memset(caps, 0, sizeof(caps))
    caps[0].permitted = caps[0].effective = <uint32_t>permitted
    caps[1].permitted = caps[1].effective = <uint32_t>(permitted >> 32)
    checked("capset", h.syscall(h.SYS_capset, &header, caps))


def drop_bounding(uint64_t keep):
    cdef unsigned long number = 0
    while prctl(PR_CAPBSET_READ, number, 0ul, 0ul, 0ul) >= 0:
        if not keep >> number & 1:
            checked("prctl", prctl(PR_CAPBSET_DROP, number, 0ul, 0ul, 0ul))
        number += 1


def clear_ambient():
    checked("prctl", prctl(PR_CAP_AMBIENT, <unsigned long>PR_CAP_AMBIENT_CLEAR_ALL, 0ul, 0ul, 0ul))


# --- the process ---

def forbid_new_privileges():
    checked("prctl", prctl(PR_SET_NO_NEW_PRIVS, 1ul, 0ul, 0ul, 0ul))


def make_undumpable():
    checked("prctl", prctl(PR_SET_DUMPABLE, 0ul, 0ul, 0ul, 0ul))


def open_ahead(int cpus):
    dlopen(b"libgcc_s.so.1", RTLD_NOW)
    limit_arenas(8 * cpus)  # as malloc(3) finds out when there are nine


# --- landlock ---

def landlock_abi():
    return h.syscall(SYS_landlock_create_ruleset, NULL, <size_t>0, LANDLOCK_CREATE_RULESET_VERSION)


def landlock_ruleset(uint64_t files, uint64_t net, uint64_t scoped):
    cdef vfsd_landlock_ruleset rules
    cdef size_t size = sizeof(rules)
    rules.handled_access_fs = files
    rules.handled_access_net = net
    rules.scoped = scoped
    if not scoped:
        size = 8 if not net else 16
    return checked("landlock_create_ruleset", h.syscall(SYS_landlock_create_ruleset, &rules, size, 0))


def landlock_allow(int ruleset, int beneath, uint64_t files):
    cdef landlock_path_beneath_attr rule
    rule.allowed_access = files
    rule.parent_fd = beneath
    checked("landlock_add_rule", h.syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH,
                                           &rule, 0))


def landlock_enter(int ruleset):
    checked("landlock_restrict_self", h.syscall(SYS_landlock_restrict_self, ruleset, 0))
