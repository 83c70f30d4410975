"""The host: kernel, sandbox, limits, ids, security modules."""

import os
import pwd
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from vfsd.doctor.confinement import LOOK, confinements, enforces
from vfsd.doctor.finding import Finding, ok, warning, wrong
from vfsd.errors import ConfigError
from vfsd.sandbox import landlock, seccomp
from vfsd.sandbox._linux import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, unshare

KERNEL_MIN = (5, 8)
NAMESPACE_MIN = (5, 12)  # mount_setattr(2)
NAMESPACES = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
DESCRIPTORS_WANTED = 1 << 16
ID_PROGRAMS = {"/etc/subuid": "newuidmap", "/etc/subgid": "newgidmap"}


def kernel() -> Finding:
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    if version < KERNEL_MIN:
        return wrong("kernel", f"Linux {release}", "vfsd serve needs Linux 5.8 or newer")
    if version < NAMESPACE_MIN:
        return warning(
            "kernel", f"Linux {release}", "serve with --sandbox chroot or none; namespace needs Linux 5.12"
        )
    return ok("kernel", f"Linux {release}")


def namespaces() -> Finding:
    """Tried in a child, as the sandbox would make them."""
    kinds = NAMESPACES if os.geteuid() == 0 else NAMESPACES | CLONE_NEWUSER
    child = os.fork()
    if child == 0:
        try:
            unshare(kinds)
        except OSError as problem:
            os._exit(problem.errno or 255)
        except BaseException:
            os._exit(255)
        os._exit(0)
    error = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if error == 0:
        return ok("namespaces", "can be made")
    return wrong(
        "namespaces", f"can't be made: {os.strerror(error) if error > 0 else f'signal {-error}'}",
        "allow them (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns, the"
        " container's seccomp profile), or serve with --sandbox none",
    )  # fmt: skip


def system_call_filter() -> Finding:
    try:
        seccomp.check_available("kill")
    except ConfigError as problem:
        return wrong("seccomp", str(problem), "serve with --seccomp none, without that wall")
    return ok("seccomp", "the daemon's system calls can be filtered")


def landlock_wall() -> Finding:
    if landlock.available():
        return ok("landlock", "there is a second wall around the share")
    return warning(
        "landlock", "this kernel has none, or it is off",
        "nothing must be done; for a second wall around the share boot with lsm=landlock,...",
    )  # fmt: skip


def descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = Path("/proc/sys/fs/nr_open").read_text().strip() if os.geteuid() == 0 else str(hard)
    text = f"{soft}, which the daemon raises to {hard}"
    if hard < DESCRIPTORS_WANTED:
        return warning(
            "open files", text,
            f"raise the hard limit (LimitNOFILE= of the unit, ulimit -Hn; at most {most}): files that a guest"
            " knows beyond it are opened again each time",
        )  # fmt: skip
    return ok("open files", text)


def ids() -> Finding:
    if os.geteuid() == 0:
        return ok("ids", "root makes files for any user")
    user = pwd.getpwuid(os.geteuid()).pw_name
    for file, program in ID_PROGRAMS.items():
        if shutil.which(program) is None:
            return warning(
                "ids", f"there is no {program}: all files of a guest belong to {user}",
                "install it (uidmap, shadow-utils) for guests with several users",
            )  # fmt: skip
        if not has_range(file, user):
            return warning(
                "ids", f"{file} has no ids for {user}: all files of a guest belong to this user",
                f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
            )  # fmt: skip
    return ok("ids", f"{user} has ids in /etc/subuid and /etc/subgid for --uid-map and --gid-map")


def has_range(file: str, user: str) -> bool:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return False
    return any(line.split(":")[0] in (user, str(os.geteuid())) for line in lines)


def security_modules() -> Finding:
    """Of this shell; a daemon that is started otherwise may have another profile or domain."""
    confined = confinements(Path("/proc/self"))
    if confined:
        return warning(
            "security modules", ", ".join(map(str, confined)),
            "see to it that the profile or policy lets the daemon use the directory, its socket and user"
            f" namespaces; {LOOK}",
        )  # fmt: skip
    if enforces():
        return warning(
            "security modules", "SELinux enforces",
            "see to it that the policy lets the daemon use the directory and the front end use the socket;"
            f" {LOOK}",
        )  # fmt: skip
    return ok("security modules", "nothing that confines this shell")


CHECKS: tuple[Callable[[], Finding], ...] = (
    kernel, namespaces, system_call_filter, landlock_wall, descriptors, ids, security_modules,
)  # fmt: skip
