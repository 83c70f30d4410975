"""Who owns what, and which rights go with a change: DIRECTORY (empty, root's). To be run as root.

The answer is the errors of each step and what everything has become: the same on every file system of
Linux that has ACLs, so a share's is compared with the host's own.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

USER, GROUP, TEAM, OTHER_TEAM = 1234, 2345, 3456, 4567
NO_ID = 0xFFFFFFFF
LABEL = "security.selinux"  # of kernels that have one for every file
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # linux/capability.h: v2, effective
# What a writer without CAP_FSETID does to a set-group-id file that its group can't execute differs by
# the kernel (Linux 6.2): none is here.


def acl(*entries: tuple[int, int, int]) -> bytes:
    """linux/posix_acl_xattr.h: (tag, permissions, id) each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


DEFAULT = acl((1, 7, NO_ID), (2, 6, 777), (4, 5, NO_ID), (16, 7, NO_ID), (32, 5, NO_ID))
TEAM_MAY = acl((1, 7, NO_ID), (4, 0, NO_ID), (8, 7, OTHER_TEAM), (16, 7, NO_ID), (32, 0, NO_ID))


def step(call: Callable[[], object]) -> str:
    """The error's name, or an empty string."""
    try:
        call()
    except OSError as problem:
        return errno.errorcode[problem.errno or 0]
    return ""


def as_user(calls: Mapping[str, Callable[[], object]], umask: int, groups: list[int]) -> dict[str, str]:
    """Each step's error, in a process of USER's."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups(groups)
        os.setresgid(GROUP, GROUP, GROUP)
        os.setresuid(USER, USER, USER)
        os.umask(umask)
        with os.fdopen(writable, "w") as stream:
            json.dump({name: step(call) for name, call in calls.items()}, stream)
            stream.flush()
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as stream:
        answer: dict[str, str] = json.load(stream)
    os.waitpid(child, 0)
    return answer


def makers(at: Path, name: str) -> dict[str, Callable[[], object]]:
    return {
        f"{at.name} mkdir": lambda: os.mkdir(at / f"{name}d", 0o777),
        f"{at.name} create": lambda: os.close(os.open(at / f"{name}f", os.O_CREAT | os.O_WRONLY, 0o666)),
        f"{at.name} program": lambda: os.close(os.open(at / f"{name}p", os.O_CREAT | os.O_RDWR, 0o2775)),
        f"{at.name} mknod": lambda: os.mknod(at / f"{name}n", stat.S_IFREG | 0o666),
        f"{at.name} fifo": lambda: os.mkfifo(at / f"{name}q", 0o666),
        f"{at.name} symlink": lambda: os.symlink("target", at / f"{name}l"),
    }


def write(path: Path, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(fd, b"x")
    finally:
        os.close(fd)


def fallocate(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, 8192)
    finally:
        os.close(fd)


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": write,
    "append": lambda path: write(path, os.O_APPEND),
    "sync": lambda path: write(path, os.O_DSYNC),
    "open": lambda path: write(path, os.O_TRUNC),
    "truncate": lambda path: os.truncate(path, 3),
    "fallocate": fallocate,
    "chown": lambda path: os.chown(path, -1, GROUP),
    "team": lambda path: os.chown(path, -1, TEAM),
    "chmod": lambda path: os.chmod(path, 0o6777),
    "read": lambda path: path.read_bytes(),
}


def programs(at: Path, owner: int) -> None:
    """Set-id programs with capabilities, that anybody may write, one for each change."""
    for name in CHANGES:
        path = at / f"{owner}{name}"
        path.write_bytes(b"program")
        os.chown(path, owner, GROUP)
        os.chmod(path, 0o6777)
        os.setxattr(path, "security.capability", NET_RAW)


def prepare(top: Path) -> None:
    for name, mode in (("open", 0o777), ("team", 0o2770), ("acl", 0o777), ("by-acl", 0o700), ("mine", 0o777)):
        (top / name).mkdir()
        os.chmod(top / name, mode)
    os.chown(top / "team", 0, TEAM)
    os.chmod(top / "team", 0o2770)
    os.setxattr(top / "acl", "system.posix_acl_default", DEFAULT)
    os.setxattr(top / "by-acl", "system.posix_acl_access", TEAM_MAY)
    for owner in (0, USER):
        programs(top / "mine", owner)


def seen(top: Path) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for path in sorted(top.rglob("*")):
        st = os.lstat(path)
        xattrs = {}
        if not stat.S_ISLNK(st.st_mode):
            names = sorted(set(os.listxattr(path)) - {LABEL})
            xattrs = {name: os.getxattr(path, name).hex() for name in names}
        found[str(path.relative_to(top))] = [oct(st.st_mode), st.st_uid, st.st_gid, xattrs]
    return found


def acls_of(path: Path) -> dict[str, Callable[[], object]]:
    """By the owner, of another group; and by who is no owner."""
    access = acl((1, 6, NO_ID), (2, 4, 99), (4, 4, NO_ID), (16, 5, NO_ID), (32, 0, NO_ID))
    return {
        "setfacl": lambda: os.setxattr(path / "openf", "system.posix_acl_access", access),
        "setfacl default": lambda: os.setxattr(path / "opend", "system.posix_acl_default", DEFAULT),
        "setfacl bad": lambda: os.setxattr(path / "openf", "system.posix_acl_access", b"nonsense"),
        "default of a file": lambda: os.setxattr(path / "openf", "system.posix_acl_default", DEFAULT),
        "setfacl of root's": lambda: os.setxattr(path, "system.posix_acl_access", access),
        "drop": lambda: os.removexattr(path / "openf", "system.posix_acl_access"),
        "sgid, not in its group": lambda: os.setxattr(path / "sgid", "system.posix_acl_access", access),
    }


def main() -> None:
    os.chdir(sys.argv[1])  # what lies above may be closed to users
    top = Path()
    os.umask(0)
    prepare(top)
    errors = {}
    for umask, name in ((0o022, "open"), (0o077, "tight")):
        for at in ("open", "team", "acl", "by-acl"):
            errors[f"{name} {at}"] = as_user(makers(top / at, name), umask, [TEAM, OTHER_TEAM])
        errors[f"{name} stranger"] = as_user(makers(top / "team", f"{name}s"), umask, [])
    (top / "open" / "sgid").touch()
    os.chown(top / "open" / "sgid", USER, 99)
    os.chmod(top / "open" / "sgid", 0o2775)
    errors["acls"] = as_user(acls_of(top / "open"), 0, [])
    for owner in (0, USER):
        changes = {
            name: lambda call=call, name=name, owner=owner: call(top / "mine" / f"{owner}{name}")
            for name, call in CHANGES.items()
        }
        errors[f"changes of {owner}'s"] = as_user(changes, 0, [TEAM])
    print(json.dumps({"errors": errors, "seen": seen(top)}))


if __name__ == "__main__":
    main()
