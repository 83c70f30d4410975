"""More cases for localcases.py's table: extended attributes, privileges that a change takes away, locks."""

import fcntl
import itertools
import os
import struct

from localcases import (
    CASES,
    PUNCH_HOLE,
    RW,
    ZERO_RANGE,
    R,
    W,
    acting_as,
    attempt,
    case,
    copy,
    fallocate,
    make,
    onto,
    opened,
    touch,
)

OWNER, OTHER = 1000, 1001


@case
def attribute_names():
    make("dir", "empty")
    make("link", "link")
    touch("file")
    os.mkfifo("fifo")
    names = (
        "user.a", "trusted.a", "security.a", "system.a", "odd.a", "a", "user.", "", "user." + "n" * 250,
        "user." + "n" * 251,
    )  # fmt: skip
    found = []
    for path, name in itertools.product(("file", "dir", "link", "fifo", "missing"), names):
        calls = (
            lambda path=path, name=name: os.setxattr(path, name, b"value", follow_symlinks=False),
            lambda path=path, name=name: os.getxattr(path, name, follow_symlinks=False).decode(),
            lambda path=path, name=name: os.removexattr(path, name, follow_symlinks=False),
            lambda path=path, name=name: os.removexattr(path, name, follow_symlinks=False),
        )
        found.append([path, name, *[attempt(call) for call in calls]])
    return found


@case
def attribute_flags():
    touch("file")
    found = []
    for value, flags in itertools.product(
        (b"1", b"", b"v" * 3000), (0, os.XATTR_CREATE, os.XATTR_REPLACE, 3, 4)
    ):
        found.append([attempt(os.setxattr, "file", "user.a", value, flags), len(os.listxattr("file"))])
    found.append(attempt(os.setxattr, "file", "user.large", b"v" * 65537))
    return found


CAPABILITY = struct.pack("<IIIII", 0x02000001, 0x400, 0, 0, 0)
UNPRIVILEGED = {
    "write": lambda: onto("file", W, lambda fd: os.write(fd, b"x")),
    "write nothing": lambda: onto("file", W, lambda fd: os.write(fd, b"")),
    "append": lambda: onto("file", W | os.O_APPEND, lambda fd: os.write(fd, b"x")),
    "truncate": lambda: os.truncate("file", 1),
    "open truncate": lambda: onto("file", W | os.O_TRUNC, int),
    "punch": lambda: onto("file", W, lambda fd: fallocate(fd, PUNCH_HOLE, 0, 2)),
    "zero range": lambda: onto("file", W, lambda fd: fallocate(fd, ZERO_RANGE, 0, 2)),
    "fallocate": lambda: onto("file", W, lambda fd: fallocate(fd, 0, 0, 9000)),
    "copy": lambda: copy(5, "source"),
    "chown nobody": lambda: os.chown("file", -1, -1),
    "setxattr": lambda: os.setxattr("file", "user.a", b"1"),
}


def privileges(call):
    found = {}
    touch("source", mode=0o644)
    for mode, uid in itertools.product((0o6777, 0o4777, 0o2777, 0o4666, None), (0, OWNER, OTHER)):
        touch("file")
        os.chown("file", OWNER, OWNER)
        os.chmod("file", mode or 0o777)
        if mode is None:
            os.setxattr("file", "security.capability", CAPABILITY)
        with acting_as(uid):
            said = attempt(call)
        key = f"{oct(mode) if mode else 'capability'} by {uid}"
        found[key] = [
            said if isinstance(said, str) else "ok", oct(os.stat("file").st_mode),
            "security.capability" in os.listxattr("file"),
        ]  # fmt: skip
        os.unlink("file")
    return found


for name, call in UNPRIVILEGED.items():
    CASES[f"privileges {name}"] = lambda call=call: privileges(call)


@case
def times_far_away():
    touch("file")
    found = []
    for second in (0, -1, -(2**31), 2**31 - 1, 2**31, 2**32, 2**33):
        os.utime("file", ns=(second * 10**9 + 1, second * 10**9 + 999_999_999))
        found.append((os.stat("file").st_atime_ns, os.stat("file").st_mtime_ns))
    return found


# --- locks ---

OFD_TEST, OFD, PROCESS = 36, 37, fcntl.F_SETLK  # OFD: F_OFD_SETLK and its like
READ, WRITE = fcntl.F_RDLCK, fcntl.F_WRLCK


def lock(fd, command, kind, start, n, whence=0):
    said = attempt(fcntl.fcntl, fd, command, struct.pack("hhqqi4x", kind, whence, start, n, 0))
    return said if isinstance(said, str) else struct.unpack("hhqqi4x", said)[:4]


@case
def record_locks():
    touch("file", b"x" * 100)
    sequences = (
        [(OFD, WRITE, 10, 10)], [(OFD, WRITE, 0, 0), (OFD, fcntl.F_UNLCK, 20, 10)],
        [(OFD, READ, 10, 10), (OFD, READ, 20, 10), (OFD, WRITE, 15, 10)],
        [(OFD, WRITE, 50, -10)], [(OFD, WRITE, -10, 5, 2)], [(PROCESS, WRITE, -1, 1)],
        [(PROCESS, WRITE, 10, -20)], [(PROCESS, 5, 0, 1)], [(PROCESS, WRITE, 0, 1, 7)],
        [(PROCESS, WRITE, 2**63 - 1, 2)], [(PROCESS, READ, 5, 5)],
    )  # fmt: skip
    found = []
    for sequence in sequences:
        with opened("file", RW) as fd, opened("file", RW) as other:
            steps = [lock(fd, *step) for step in sequence]
            asked = [lock(other, OFD_TEST, WRITE, at, 5) for at in range(0, 110, 5)]
            taken = [lock(other, OFD, READ, at, 1) for at in range(0, 110, 7)]
            found.append([steps, asked, taken])
    for flags, kind in ((R, WRITE), (W, READ)):
        found.append(onto("file", flags, lambda fd, kind=kind: lock(fd, PROCESS, kind, 0, 1)))
    return found


@case
def whole_file_locks():
    touch("file")
    with opened("file", R) as a, opened("file", RW) as b:
        again = os.dup(a)
        exclusive, shared, none = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN
        steps = (
            (a, exclusive), (b, exclusive), (b, shared), (again, shared), (b, shared), (b, exclusive),
            (a, none), (b, exclusive), (a, shared), (b, shared), (a, shared), (a, exclusive), (b, none),
            (a, exclusive), (b, 0),
        )  # fmt: skip
        found = [attempt(fcntl.flock, fd, how | fcntl.LOCK_NB) for fd, how in steps]
        os.close(again)
        return [*found, attempt(fcntl.flock, b, shared | fcntl.LOCK_NB)]
