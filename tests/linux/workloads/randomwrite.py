"""Write blocks at random places, then read all back and compare: FILE BLOCKS [direct]."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import sys

BLOCK = 4096


def block(number: int, version: int) -> bytes:
    """The content of a block: its number and how often it was written."""
    return hashlib.sha256(b"%d %d" % (number, version)).digest() * (BLOCK // 32)


def main() -> None:
    """Every block is written about twice; reads go to the daemon, not to the guest's cache."""
    path, blocks = sys.argv[1], int(sys.argv[2])
    flags = os.O_RDWR | os.O_CREAT
    if "direct" in sys.argv[3:]:
        flags |= os.O_DIRECT
    chance = random.Random(blocks)
    versions = [0] * blocks
    # Direct input and output needs memory that is aligned as pages are.
    with mmap.mmap(-1, BLOCK) as memory:
        descriptor = os.open(path, flags, 0o644)
        os.ftruncate(descriptor, blocks * BLOCK)
        for _ in range(2 * blocks):
            number = chance.randrange(blocks)
            versions[number] += 1
            memory[:] = block(number, versions[number])
            os.pwrite(descriptor, memory, number * BLOCK)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        wrong = []
        for number, version in enumerate(versions):
            os.preadv(descriptor, [memory], number * BLOCK)
            if memory[:] != (block(number, version) if version else bytes(BLOCK)):
                wrong.append(number)
        os.close(descriptor)
    whole = hashlib.sha256()
    for number, version in enumerate(versions):
        whole.update(block(number, version) if version else bytes(BLOCK))
    print(json.dumps({"wrong": wrong, "sha256": whole.hexdigest()}))


if __name__ == "__main__":
    main()
