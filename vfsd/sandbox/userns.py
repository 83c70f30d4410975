"""A user namespace for a daemon that is not root, so that it can make files for several users.

The ids of user_namespaces(7) are written by newuidmap(1) and newgidmap(1), which know what /etc/subuid
and /etc/subgid allow; the daemon's own id needs neither.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from vfsd.errors import ConfigError
from vfsd.sandbox._namespaces import unshare_user

ID_MAX = 0xFFFFFFFE
EXIT_FAILED = 1


@dataclass(frozen=True)
class IdRange:
    """`count` ids from `inside` on are those from `outside` on to the host."""

    inside: int
    outside: int
    count: int


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


def enter(uids: Sequence[IdRange], gids: Sequence[IdRange]) -> None:
    """Into a user namespace with these ids, as its root if it has one. ConfigError.

    Without a map of one kind it has the daemon's own id only, under the same number.
    """
    uids = uids or [IdRange(os.geteuid(), os.geteuid(), 1)]
    gids = gids or [IdRange(os.getegid(), os.getegid(), 1)]
    own_uid, own_gid, pid = os.geteuid(), os.getegid(), os.getpid()
    unshared, tell = os.pipe()
    # Who writes the maps must be outside.
    child = os.fork()
    if child == 0:
        os.close(tell)
        if os.read(unshared, 1):
            write_maps(pid, uids, gids, own_uid, own_gid)
        os._exit(0)
    os.close(unshared)
    try:
        unshare_user()
        os.write(tell, b"1")
    except OSError as problem:
        raise ConfigError(
            "--uid-map", f"the host allows no user namespace ({problem.strerror}); leave it out"
        ) from problem
    finally:
        os.close(tell)
        _, status = os.waitpid(child, 0)
    if status != 0:
        raise ConfigError(
            "--uid-map", "the ids could not be mapped (see above); ask for what /etc/subuid and"
            " /etc/subgid allow, and install newuidmap and newgidmap"
        )  # fmt: skip
    become_root(uids, gids)


def write_maps(
    pid: int, uids: Sequence[IdRange], gids: Sequence[IdRange], own_uid: int, own_gid: int
) -> None:
    """In a process of its own, which ends here if that fails."""
    try:
        if is_own(uids, own_uid):
            Path(f"/proc/{pid}/uid_map").write_text(f"{uids[0].inside} {own_uid} 1")
        else:
            run("newuidmap", pid, uids)
        if is_own(gids, own_gid):
            Path(f"/proc/{pid}/setgroups").write_text("deny")
            Path(f"/proc/{pid}/gid_map").write_text(f"{gids[0].inside} {own_gid} 1")
        else:
            run("newgidmap", pid, gids)
    except (OSError, subprocess.CalledProcessError) as problem:
        os.write(2, f"vfsd: {problem}\n".encode())
        os._exit(EXIT_FAILED)


def is_own(ranges: Sequence[IdRange], own: int) -> bool:
    return len(ranges) == 1 and ranges[0].outside == own and ranges[0].count == 1


def run(program: str, pid: int, ranges: Sequence[IdRange]) -> None:
    numbers = [str(number) for ids in ranges for number in astuple(ids)]
    subprocess.run([program, str(pid), *numbers], check=True, stdin=subprocess.DEVNULL)


def become_root(uids: Sequence[IdRange], gids: Sequence[IdRange]) -> None:
    """Of the namespace."""
    if any(ids.inside == 0 for ids in gids):
        os.setresgid(0, 0, 0)
    if any(ids.inside == 0 for ids in uids):
        os.setresuid(0, 0, 0)
