"""Flags that fcntl(2) changes on an open file: DIRECTORY [atime]. Prints what came of each case.

Nothing that is refused where a file system has O_DIRECT without alignment, as one without --allow-direct-io.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

RWF_DSYNC, RWF_SYNC, RWF_APPEND = 2, 4, 16
BLOCK = 4096



def setfl(fd: int, on: int = 0, off: int = 0) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, (fcntl.fcntl(fd, fcntl.F_GETFL) | on) & ~off)


def aligned(letter: bytes, blocks: int = 1) -> mmap.mmap:
    memory = mmap.mmap(-1, blocks * BLOCK)
    memory[:] = letter * blocks * BLOCK
    return memory


def append_off() -> int:
    fd = os.open("f", os.O_WRONLY | os.O_APPEND)
    setfl(fd, off=os.O_APPEND)
    return os.pwrite(fd, b"AB", 2)


def append_on() -> int:
    fd = os.open("f", os.O_WRONLY)
    setfl(fd, on=os.O_APPEND)
    return os.pwrite(fd, b"AB", 2)


def append_and_cut() -> list[int]:
    fd = os.open("f", os.O_WRONLY | os.O_APPEND)
    first = os.write(fd, b"X")
    os.ftruncate(fd, 5)
    return [first, os.write(fd, b"Y")]


def direct_off() -> list[object]:
    """As dd does for the last, partial block."""
    fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    written = os.pwritev(fd, [aligned(b"a", 4)], 0)
    setfl(fd, off=os.O_DIRECT)
    tail = os.pwrite(fd, b"tail", 4 * BLOCK)
    return [written, tail, os.pread(fd, 10, 4 * BLOCK - 6).decode(), os.pwrite(fd, b"odd", 7)]


def direct_on() -> list[object]:
    fd = os.open("f", os.O_RDWR)
    written = [os.pwrite(fd, b"b" * 10000, 0)]
    setfl(fd, on=os.O_DIRECT)
    written.append(os.pwritev(fd, [aligned(b"d")], BLOCK))
    block = aligned(b".")
    written.append(os.preadv(fd, [block], BLOCK))
    setfl(fd, off=os.O_DIRECT)
    return [*written, block[:2].decode(), os.pread(fd, 3, BLOCK - 1).decode(), os.pwrite(fd, b"e", 9999)]


def direct_to_and_fro() -> list[object]:
    fd = os.open("f", os.O_RDWR | os.O_DIRECT)
    found: list[object] = []
    for number in range(5):
        setfl(fd, on=os.O_DIRECT)
        found.append(os.pwritev(fd, [aligned(b"%d" % number)], 0))
        setfl(fd, off=os.O_DIRECT)
        found.append(os.pread(fd, 1, 17).decode())
        found.append(os.pwrite(fd, b"-", number))
    return found


def no_access_time() -> list[bool]:
    """Read with and without O_NOATIME, which each file system may take for a request only."""
    fd = os.open("f", os.O_RDONLY)
    found = []
    for flag in (os.O_NOATIME, 0, os.O_NOATIME):
        setfl(fd, on=flag, off=os.O_NOATIME & ~flag)
        os.utime("f", ns=(1, 2))
        os.pread(fd, 10, 0)
        found.append(os.stat("f").st_atime_ns == 1)
    return found


def no_blocking() -> list[object]:
    fd = os.open("f", os.O_RDWR)
    setfl(fd, on=os.O_NONBLOCK)
    return [os.pwrite(fd, b"now", 0), os.pread(fd, 5, 0).decode()]


def for_one_write() -> list[object]:
    fd = os.open("f", os.O_RDWR)
    return [os.pwritev(fd, [b"R"], 1, flags) for flags in (RWF_APPEND, RWF_DSYNC, RWF_SYNC)]


CASES: tuple[Callable[[], object], ...] = (
    append_off, append_on, append_and_cut, direct_off, direct_on, direct_to_and_fro, no_blocking,
    for_one_write,
)  # fmt: skip


def outcome(case: Callable[[], object]) -> list[object]:
    Path("f").unlink(missing_ok=True)
    Path("f").write_bytes(b"0123456789")
    try:
        found = case()
    except OSError as error:
        found = error.strerror
    content = Path("f").read_bytes()
    return [found, len(content), content[:32].decode(), content[-8:].decode()]


def main() -> None:
    """All of it; access times only if asked for: with a cache no READ comes."""
    os.chdir(sys.argv[1])
    cases = CASES + ((no_access_time,) if "atime" in sys.argv[2:] else ())
    print(json.dumps({case.__name__: outcome(case) for case in cases}))


if __name__ == "__main__":
    main()
