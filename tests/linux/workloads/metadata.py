"""Modes, owners and times set in the guest: DIRECTORY. Prints what the guest sees of them."""

from __future__ import annotations

import json
import os
import sys

TIMES = [
    (1, 2),
    (1_700_000_000_123_456_789, 1_600_000_000_987_654_321),
    (-1_000_000_001, -5),
    (4_294_967_296_000_000_001, 2_147_483_648_999_999_999),
]
MODES = [0o000, 0o644, 0o755, 0o4755, 0o2755, 0o7777]
OWNERS = [(1000, 1000), (65534, 65533), (123456, 4000000000)]


def seen(path: str) -> list[int]:
    """What both sides compare: mode, owner, group, modification time, size."""
    status = os.lstat(path)
    return [status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_size]


def main() -> None:
    """Make one file for each value; the answer is by file name."""
    directory = sys.argv[1]
    os.chdir(directory)
    asked = {}
    for number, times in enumerate(TIMES):
        name = f"times{number}"
        open(name, "w").close()
        os.utime(name, ns=times)
        status = os.stat(name)
        asked[name] = [status.st_atime_ns == times[0], status.st_mtime_ns == times[1]]
    for mode in MODES:
        name = f"mode{mode:o}"
        open(name, "w").close()
        os.chmod(name, mode)
        asked[name] = [os.stat(name).st_mode & 0o7777 == mode]
        os.mkdir(name + "d")
        os.chmod(name + "d", mode)
        asked[name + "d"] = [os.stat(name + "d").st_mode & 0o7777 == mode]
    for uid, gid in OWNERS:
        name = f"owner{uid}"
        open(name, "w").close()
        os.chown(name, uid, gid)
        status = os.stat(name)
        asked[name] = [(status.st_uid, status.st_gid) == (uid, gid)]
        os.symlink("target", name + "l")
        os.lchown(name + "l", uid, gid)
        status = os.lstat(name + "l")
        asked[name + "l"] = [(status.st_uid, status.st_gid) == (uid, gid)]
    # A write by somebody who may not keep them takes the bits away; chown does as well.
    open("suid", "w").close()
    os.chmod("suid", 0o6755)
    os.chown("suid", 1000, 1000)
    asked["suid"] = [os.stat("suid").st_mode & 0o7777 == 0o755]
    os.symlink("target", "link")
    os.utime("link", ns=TIMES[1], follow_symlinks=False)
    asked["link"] = [os.lstat("link").st_mtime_ns == TIMES[1][1]]
    print(json.dumps({"asked": asked, "seen": {name: seen(name) for name in os.listdir(".")}}))


if __name__ == "__main__":
    main()
