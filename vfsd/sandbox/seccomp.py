"""Which system calls a server may make, and the filter that holds it to them.

Three kinds: those that it needs, some with certain arguments only; those that nobody makes by accident, which
end the process; all others, which a newer library may try, are answered ENOSYS, as by an older kernel.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from errno import EACCES, EINVAL, ENOSYS, ENOTTY, EPERM
from signal import SIGCHLD, SIGSYS
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsd.errors import HostError
from vfsd.sandbox._linux import CLONE_FS
from vfsd.sandbox._seccomp import action_available, install, report_to
from vfsd.sandbox.calls import ARCHITECTURES, numbers

if TYPE_CHECKING:
    from vfsd.sandbox.choices import Action

# linux/seccomp.h
RET_KILL_PROCESS: Final = 0x80000000
RET_TRAP: Final = 0x00030000
RET_ERRNO: Final = 0x00050000
RET_LOG: Final = 0x7FFC0000
RET_ALLOW: Final = 0x7FFF0000
# linux/audit.h: what tells the calls of an architecture from those of its 32-bit relative
AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT: Final = 0x40000000

# Files, all beneath the share: the namespace and Landlock say where, capabilities and ids what may be done.
FILES: Final = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek splice
    open openat openat2 close close_range dup dup2 dup3 pipe2 getdents64 fchdir umask
    stat lstat fstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
    mkdirat mknodat linkat symlinkat unlinkat renameat renameat2
    truncate ftruncate fallocate fsync fdatasync syncfs copy_file_range fadvise64 flock
    fchmod fchmodat fchmodat2 fchown fchownat utimensat
    getxattr setxattr listxattr removexattr fgetxattr fsetxattr flistxattr fremovexattr
"""
# The front end's socket and the supervisor's, which are connected; what wakes the queues.
MESSAGES: Final = """
    sendmsg recvmsg sendto recvfrom shutdown getsockname getpeername getsockopt setsockopt
    poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
"""
# Guest memory, malloc(3), threads, signals, time: glibc's and CPython's.
PROCESS: Final = """
    brk munmap mremap madvise mincore msync membarrier memfd_create
    futex set_robust_list get_robust_list rseq exit exit_group sched_yield sched_getaffinity getcpu gettid
    rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigpending sigaltstack restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrusage times sysinfo uname
    getrandom getpid getppid
"""
# A thread makes files as the guest's caller.
IDENTITY: Final = """
    getuid geteuid getgid getegid getgroups getresuid getresgid getrlimit
    capget capset setresuid setresgid setgroups
"""
ALLOWED: Final = frozenset(f"{FILES} {MESSAGES} {PROCESS} {IDENTITY}".split())
HANDLES: Final = frozenset({"name_to_handle_at", "open_by_handle_at"})

# No library makes these on its own: whoever does has taken the process over. connect(2) is not among them, as
# a syslog socket may be connected anew.
FATAL_NAMES: Final = """
    execve execveat fork vfork ptrace process_vm_readv process_vm_writev process_madvise kcmp
    kill tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal pidfd_getfd
    mount umount2 pivot_root chroot setns open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr
    socket socketpair bind listen accept accept4
    bpf perf_event_open userfaultfd keyctl add_key request_key open_by_handle_at
    init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct
    quotactl quotactl_fd settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname
    syslog vhangup iopl ioperm modify_ldt personality io_uring_setup io_uring_enter io_uring_register
"""
FATAL: Final = frozenset(FATAL_NAMES.split())

# pthread_create(3) of glibc, and of musl, which adds CLONE_DETACHED.
THREAD_FLAGS: Final = (0x3D0F00, 0x7D0F00)
IOCTLS: Final = (
    0x80086601, 0x40086602, 0x801C581F, 0x401C5820,  # FS_IOC_GETFLAGS SETFLAGS FSGETXATTR FSSETXATTR
    0x5450, 0x5451, 0x5421, 0x541B, 0x5401,  # FIONCLEX FIOCLEX FIONBIO FIONREAD, TCGETS of isatty(3)
)  # fmt: skip
FCNTLS: Final = (
    0, 1, 2, 3, 4, 5, 6, 7,  # F_DUPFD to F_SETLKW, without F_SETOWN and F_SETSIG, which send signals
    36, 37, 38, 1030, 1032, 1033, 1034,  # F_OFD_*, F_DUPFD_CLOEXEC, F_GETPIPE_SZ, F_ADD_SEALS, F_GET_SEALS
)  # fmt: skip
PRCTLS: Final = (15, 16)  # PR_SET_NAME PR_GET_NAME
KEEPER_PRCTLS: Final = (1, 22)  # PR_SET_PDEATHSIG PR_SET_SECCOMP: of the server that it has just forked
SERVER_FLAGS: Final = 0x400 | SIGCHLD  # CLONE_FILES
# What a keeper does besides: fork a server, which enters filters of its own, wait for it and end it.
KEEPER_NAMES: Final = """
    socketpair wait4 kill tgkill seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""
KEEPER: Final = frozenset(KEEPER_NAMES.split())
PROT_EXEC: Final = 4


class Rule(NamedTuple):
    """What a call's argument may be: one of `values`, or with `without` any that has none of those bits.

    otherwise: RET_* for what is not allowed, None for what ends the process.
    """

    argument: int
    values: Sequence[int] = ()
    without: int = 0
    otherwise: int | None = None


def rules_of(pid: int, keeper: bool = False) -> dict[str, Rule]:
    """Calls that depend on an argument. Only its lower half is compared: Linux takes no more of these."""
    rules = {
        "clone": Rule(0, (*THREAD_FLAGS, SERVER_FLAGS) if keeper else THREAD_FLAGS),
        "unshare": Rule(0, (CLONE_FS,)),
        "tgkill": Rule(0, (pid,)),
        "ioctl": Rule(1, IOCTLS, otherwise=RET_ERRNO | ENOTTY),
        "fcntl": Rule(1, FCNTLS, otherwise=RET_ERRNO | EINVAL),
        "prctl": Rule(0, PRCTLS + KEEPER_PRCTLS if keeper else PRCTLS, otherwise=RET_ERRNO | EPERM),
        # All code is there already.
        "mmap": Rule(2, without=PROT_EXEC, otherwise=RET_ERRNO | EACCES),
        "mprotect": Rule(2, without=PROT_EXEC, otherwise=RET_ERRNO | EACCES),
        "prlimit64": Rule(2, (0,), otherwise=RET_ERRNO | EPERM),
    }
    if keeper:  # its filter is its servers' too, and they have process ids of their own
        del rules["tgkill"]
    return rules


# --- the program ---

# linux/filter.h: BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_{JEQ,JGE,JSET} | BPF_K, BPF_RET | BPF_K
LOAD: Final = 0x20
JUMP_EQUAL: Final = 0x15
JUMP_AT_LEAST: Final = 0x35
JUMP_ANY_BIT: Final = 0x45
RETURN: Final = 0x06
# struct seccomp_data
NUMBER_AT: Final = 0
ARCH_AT: Final = 4
ARGUMENTS_AT: Final = 16


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def answer(value: int) -> bytes:
    return instruction(RETURN, value)


def when_equal(value: int, then: bytes) -> bytes:
    """then: ends with an answer."""
    return instruction(JUMP_EQUAL, value, 0, len(then) // 8) + then


def check(rule: Rule, refused: int) -> bytes:
    """The answer to a call that is known to be the rule's."""
    load = instruction(LOAD, ARGUMENTS_AT + 8 * rule.argument)
    otherwise = answer(refused if rule.otherwise is None else rule.otherwise)
    if rule.without:
        return load + instruction(JUMP_ANY_BIT, rule.without, 1, 0) + answer(RET_ALLOW) + otherwise
    return load + b"".join(when_equal(value, answer(RET_ALLOW)) for value in rule.values) + otherwise


def program(machine: str, action: Action, pid: int, file_handles: bool, keeper: bool = False) -> bytes:
    """The filter of a server with that process id.

    One comparison after the other: for a call that is allowed whatever its arguments are, Linux (5.11) knows
    the answer without running it.
    """
    number_of = numbers(machine)
    refused = {"kill": RET_TRAP, "trap": RET_TRAP, "log": RET_LOG}[action]
    # While one learns what is missing, all is allowed.
    unknown = RET_LOG if action == "log" else RET_ERRNO | ENOSYS
    allowed = ALLOWED | HANDLES if file_handles else ALLOWED
    if keeper:
        allowed |= KEEPER
    parts = [
        instruction(LOAD, ARCH_AT),
        instruction(JUMP_EQUAL, AUDIT_ARCH[machine], 1, 0),
        answer(RET_KILL_PROCESS),
        instruction(LOAD, NUMBER_AT),
    ]
    if machine == "x86_64":
        parts += [instruction(JUMP_AT_LEAST, X32_BIT, 0, 1), answer(RET_KILL_PROCESS)]
    parts += same_answer((number_of[name] for name in allowed & number_of.keys()), RET_ALLOW)
    for name, rule in rules_of(pid, keeper).items():
        parts.append(when_equal(number_of[name], check(rule, refused)))
    if action == "kill":
        # report_to() ends by this one; and nobody takes its handler's place.
        parts.append(when_equal(number_of["kexec_load"], answer(RET_KILL_PROCESS)))
        signals = instruction(LOAD, ARGUMENTS_AT) + when_equal(SIGSYS, answer(RET_KILL_PROCESS))
        parts.append(when_equal(number_of["rt_sigaction"], signals + answer(RET_ALLOW)))
    else:
        parts += same_answer([number_of["rt_sigaction"]], RET_ALLOW)
    parts += same_answer((number_of[name] for name in (FATAL - allowed) & number_of.keys()), refused)
    parts.append(answer(unknown))
    return b"".join(parts)


def same_answer(calls: Iterable[int], value: int) -> list[bytes]:
    return [when_equal(number, answer(value)) for number in sorted(calls)]


# --- its life ---


def check_available(action: Action) -> None:
    """ConfigError when this machine can't have such a filter."""
    if action == "none":
        return
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise HostError("--seccomp", f"there is no list of system calls for {machine}; use --seccomp none")
    needed = {"kill": (RET_KILL_PROCESS, RET_TRAP), "trap": (RET_TRAP,), "log": (RET_LOG,)}[action]
    if not all(action_available(value) for value in needed):
        raise HostError("--seccomp", f"this kernel can't {action}; use --seccomp none")


def tell_by(action: Action, report: tuple[int, bytes] | None) -> None:
    """Before enter(), of this process and those it forks: what is to become of the number of a refused call.

    report: of `kill`, a descriptor to write it to, and what to write before it; None: stderr. OSError.
    """
    if action == "kill":
        fd, prefix = report or (2, b"\nvfsd: seccomp refused system call ")
        report_to(fd, prefix)


def enter(action: Action, file_handles: bool, keeper: bool = False) -> None:
    """For this process, which must have one thread and no new privileges. OSError.

    keeper: for a process that forks a server, which enters one of its own.
    """
    if action != "none":
        install(program(os.uname().machine, action, os.getpid(), file_handles, keeper))


def name_of(number: int) -> str:
    """Of a system call of this machine."""
    names = {n: name for name, n in numbers(os.uname().machine).items()}
    return f"{names[number]}(2)" if number in names else f"system call {number}"
