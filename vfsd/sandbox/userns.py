"""A user namespace for a daemon that is not root, so that it can make files for several users.

The ids of user_namespaces(7) are written by newuidmap(1) and newgidmap(1), which know what /etc/subuid
and /etc/subgid allow; the daemon's own id needs neither.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from vfsd.errors import ConfigError, HostError
from vfsd.sandbox._linux import CLONE_NEWUSER, unshare

ID_MAX = 0xFFFFFFFE
EXIT_FAILED = 1


class IdRange(NamedTuple):
    """`length` ids from `inside` on are those from `outside` on to the host."""

    inside: int
    outside: int
    length: int


def parse_ranges(option: str, texts: Sequence[str]) -> tuple[IdRange, ...]:
    """`:INSIDE:OUTSIDE:COUNT:` each, the first character separates. ConfigError names rule and character."""
    return tuple(parse_range(option, number, text) for number, text in enumerate(texts, 1))


def parse_range(option: str, number: int, text: str) -> IdRange:
    form = ":INSIDE:OUTSIDE:COUNT:"
    values: list[int] = []
    at = 2
    if not text or text[0].isalnum():
        raise mistake(option, number, 1, f"{text!r} does not begin with a separator; write {form}")
    *parts, end = text[1:].split(text[0])
    for part in parts:
        if len(values) == 3:
            raise mistake(option, number, at, f"{part!r} is too much; write {form}")
        if not part.isascii() or not part.isdigit() or int(part) > ID_MAX:
            raise mistake(option, number, at, f"{part!r} is no number up to {ID_MAX}; write {form}")
        values.append(int(part))
        at += len(part) + 1
    if len(values) < 3 or end:
        at = len(text) + 1
        raise mistake(option, number, at, f"it ends too early or not with {text[0]!r}; write {form}")
    inside, outside, count = values
    if count == 0 or max(inside, outside) + count - 1 > ID_MAX:
        raise mistake(option, number, 2, f"{count} ids from there on is none or too many; write {form}")
    return IdRange(inside, outside, count)


def mistake(option: str, number: int, at: int, text: str) -> ConfigError:
    return ConfigError(option, f"rule {number}, character {at}: {text}")


def check_allowed(uids: Sequence[IdRange], gids: Sequence[IdRange]) -> None:
    """ConfigError when there can be no such namespace."""
    if os.geteuid() == 0:
        option = "--uid-map" if uids else "--gid-map"
        raise ConfigError(option, "is for a daemon that is not root; use --translate-uid and --translate-gid")


def make(uids: Sequence[IdRange], gids: Sequence[IdRange]) -> int:
    """A descriptor of a user namespace with these ids, in which no process is. ConfigError.

    Without a map of one kind it has the daemon's own id only, under the same number.
    """
    made, tell = os.pipe()
    wait, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            os.close(made)
            os.close(end)
            unshare(CLONE_NEWUSER)
        except OSError as problem:
            status = problem.errno or EXIT_FAILED
        os.close(tell)
        os.read(wait, 1)
        os._exit(status)
    os.close(tell)
    os.close(wait)
    status = 0
    try:
        os.read(made, 1)
        namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(namespace).st_ino != os.stat("/proc/self/ns/user").st_ino:
            write_maps(pid, or_own(uids, os.geteuid()), or_own(gids, os.getegid()))
            return namespace
        os.close(namespace)
    finally:
        os.close(made)
        os.close(end)
        _, status = os.waitpid(pid, 0)
    raise HostError(
        "--sandbox", f"the host allows no user namespace ({os.strerror(os.waitstatus_to_exitcode(status))});"
        " allow them (user.max_user_namespaces), or use none",
    )  # fmt: skip


def or_own(ranges: Sequence[IdRange], own: int) -> Sequence[IdRange]:
    return ranges or (IdRange(own, own, 1),)


def write_maps(pid: int, uids: Sequence[IdRange], gids: Sequence[IdRange]) -> None:
    """Of the user namespace of that process. ConfigError."""
    try:
        if is_own(gids, os.getegid()):
            write(f"/proc/{pid}/setgroups", "deny")
            write(f"/proc/{pid}/gid_map", f"{gids[0].inside} {gids[0].outside} 1")
        else:
            run("--gid-map", "newgidmap", pid, gids)
        if is_own(uids, os.geteuid()):
            write(f"/proc/{pid}/uid_map", f"{uids[0].inside} {uids[0].outside} 1")
        else:
            run("--uid-map", "newuidmap", pid, uids)
    except OSError as problem:
        raise HostError(
            "--sandbox", f"a user namespace has no ids ({problem.strerror}); allow it to unprivileged users"
            " (AppArmor, SELinux), or use none",
        ) from problem  # fmt: skip


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def is_own(ranges: Sequence[IdRange], own: int) -> bool:
    return len(ranges) == 1 and ranges[0].outside == own and ranges[0].length == 1


def run(option: str, program: str, pid: int, ranges: Sequence[IdRange]) -> None:
    """newuidmap(1) or newgidmap(1), which says what it does not like. ConfigError."""
    arguments = [program, str(pid), *(str(number) for ids in ranges for number in ids)]
    try:
        child = os.posix_spawnp(program, arguments, os.environ)
    except FileNotFoundError as problem:
        raise HostError(
            option, f"there is no {program}; install it (uidmap, shadow-utils), or map your own id alone"
        ) from problem
    _, status = os.waitpid(child, 0)
    if status != 0:
        file = "/etc/subuid" if program == "newuidmap" else "/etc/subgid"
        raise HostError(option, f"{program} refused (see above); ask for what {file} allows this user")


def become_root(uids: Sequence[IdRange], gids: Sequence[IdRange]) -> None:
    """Of the user namespace that this process has entered, if it has one."""
    if any(ids.inside == 0 for ids in gids):
        os.setresgid(0, 0, 0)
    if any(ids.inside == 0 for ids in uids):
        os.setresuid(0, 0, 0)
