"""Copies scattered pages of a file: `mapped.py read|map FILE SECONDS SEED`; by O_DIRECT, or out of a mapping.

Beside it lies vfsd_bench's extension _copies. Prints, as JSON, nanoseconds, how many pages were not what the
file has, and a histogram, whose counts are in hexadecimal.
"""

import json
import mmap
import os
import sys

import _copies  # type: ignore[import-not-found]

BLOCK = 4096


def main(how: str, path: str, seconds: float, seed: int) -> None:
    if how == "read":
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        took, wrong, raw = _copies.measure_reads(fd, BLOCK, True, seconds, seed)
    else:
        fd = os.open(path, os.O_RDONLY)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
            for at in range(0, len(view), BLOCK):
                view[at]  # the page tables of this process are not what is measured
            took, wrong, raw = _copies.measure(view, BLOCK, True, seconds, seed)
    os.close(fd)
    print(json.dumps([took, wrong, *raw[:4], raw[4].hex()]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
