"""Two guests with one mapped file, by turns: FILE ME ROUNDS. ME is 0 or 1.

A word of the file says whose turn it is; each adds to a counter. Neither sends a request meanwhile.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import time

PAGE = mmap.PAGESIZE
PATIENCE_S = 100.0


def main() -> None:
    """See above; prints the counter as seen last."""
    path, me, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    descriptor = os.open(path, os.O_RDWR)
    until = time.monotonic() + PATIENCE_S
    with mmap.mmap(descriptor, 2 * PAGE) as memory:
        for _ in range(rounds):
            while memory[0] != me and time.monotonic() < until:
                time.sleep(0)
            (count,) = struct.unpack_from("<Q", memory, PAGE)
            struct.pack_into("<Q", memory, PAGE, count + 1)
            memory[0] = 1 - me
        print(json.dumps(struct.unpack_from("<Q", memory, PAGE)[0]))


if __name__ == "__main__":
    main()
