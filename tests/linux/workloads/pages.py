"""A large file whose every page holds its own number: FILE MEBIBYTES [change].

Checks it in order by read and at random by mmap, and with `change` adds one to pages at random.
Prints what was wrong, and the checksum as it was read first.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import random
import struct
import sys
import zlib

PAGE = 4096
PIECE = 1 << 20
PROBES = 4000


def piece(number: int) -> bytes:
    """That mebibyte of the file."""
    first = number * (PIECE // PAGE)
    return b"".join(struct.pack("<Q", page) * (PAGE // 8) for page in range(first, first + PIECE // PAGE))


def write(file: io.BufferedWriter, mebibytes: int) -> int:
    """The whole file; the value is its checksum."""
    checksum = 0
    for number in range(mebibytes):
        data = piece(number)
        checksum = zlib.crc32(data, checksum)
        file.write(data)
    return checksum


def probes(mebibytes: int) -> list[int]:
    """Pages, no two the same, in the order they are to be touched."""
    pages = mebibytes * (PIECE // PAGE)
    return random.Random(mebibytes).sample(range(pages), min(PROBES, pages))


def main() -> None:
    """See above."""
    path, mebibytes, change = sys.argv[1], int(sys.argv[2]), "change" in sys.argv[3:]
    checksum = 0
    descriptor = os.open(path, os.O_RDWR if change else os.O_RDONLY)
    while data := os.read(descriptor, PIECE):
        checksum = zlib.crc32(data, checksum)
    wrong = []
    access = mmap.ACCESS_WRITE if change else mmap.ACCESS_READ
    with mmap.mmap(descriptor, mebibytes * PIECE, access=access) as memory:
        for page in probes(mebibytes):
            if memory[page * PAGE : page * PAGE + PAGE] != struct.pack("<Q", page) * (PAGE // 8):
                wrong.append(page)
            if change:
                memory[page * PAGE : page * PAGE + 8] = struct.pack("<Q", page + 1)
    os.close(descriptor)
    print(json.dumps({"checksum": checksum, "wrong": wrong}))


if __name__ == "__main__":
    main()
