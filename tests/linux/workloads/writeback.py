"""What has to hold where the guest keeps what is written (FUSE_WRITEBACK_CACHE): DIRECTORY.

`old`, 10000 bytes of "o", is the host's. Prints a yes or no for each question, and the times of `timed`
and `dated` as the guest has them.
"""

from __future__ import annotations

import json
import os
import sys
import time

LINES = 300
DATE = 1_000_000_000_123_456_789


def appends(path: str) -> bool:
    """Two files open for appending take turns, one of them only for writing."""
    flags = os.O_CREAT | os.O_APPEND
    first, second = os.open(path, os.O_WRONLY | flags), os.open(path, os.O_RDWR | flags)
    for number in range(LINES):
        os.write((first, second)[number % 2], b"%04d\n" % number)
    size = os.stat(path).st_size
    os.close(first)
    content = os.pread(second, 5 * LINES + 1, 0)
    os.close(second)
    return size == 5 * LINES and content == b"".join(b"%04d\n" % n for n in range(LINES))


def part_of_a_page(path: str) -> bool:
    """Written by who may not read: the rest of the page is what it was."""
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, b"new", 5000)
    os.close(descriptor)
    with open(path, "rb") as file:
        return file.read() == b"o" * 5000 + b"new" + b"o" * 4997


def resized(path: str) -> bool:
    """Sizes are the guest's own, also before anything is written back."""
    with open(path, "wb", buffering=0) as file:
        file.write(b"x" * 9000)
        os.ftruncate(file.fileno(), 100)
        file.seek(8000)
        file.write(b"end")
        size = os.fstat(file.fileno()).st_size
    with open(path, "rb") as file:
        return size == 8003 and file.read() == b"x" * 100 + bytes(7900) + b"end"


def written(path: str) -> int:
    """The time of a write, which is not that of its writing back."""
    with open(path, "wb", buffering=0) as file:
        # In the tick of its making a file has its times already: Linux notes no change then.
        time.sleep(0.05)
        file.write(b"1")
        file.write(b"2")
        before = os.fstat(file.fileno()).st_mtime_ns
    assert os.stat(path).st_mtime_ns == before
    return before


def dated(path: str) -> int:
    """A time that was set while data was dirty stays."""
    with open(path, "wb", buffering=0) as file:
        file.write(b"1")
        os.utime(path, ns=(DATE, DATE))
    return os.stat(path).st_mtime_ns


def main() -> None:
    """All of it."""
    place = sys.argv[1]
    print(json.dumps({
        "appends": appends(f"{place}/log"),
        "part of a page": part_of_a_page(f"{place}/old"),
        "resized": resized(f"{place}/resized"),
        "timed": written(f"{place}/timed"),
        "dated": dated(f"{place}/dated"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
