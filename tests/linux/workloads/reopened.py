"""A file that stays mapped while it is opened, asked about and made longer: FILE ROUNDS.

Prints the rounds whose stores were lost.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time


def main() -> None:
    """See above."""
    path, rounds = sys.argv[1], int(sys.argv[2])
    lost = []
    descriptor = os.open(path, os.O_RDWR)
    with mmap.mmap(descriptor, 5000) as memory:
        for number in range(rounds):
            memory[5] = memory[4500] = number
            time.sleep(0.02)  # the time of modification is another one each time
            os.stat(path)
            os.close(os.open(path, os.O_RDONLY))
            os.pwrite(descriptor, b"longer", os.fstat(descriptor).st_size)
            os.fsync(descriptor)
            if (memory[5], memory[4500]) != (number, number):
                lost.append(number)
    os.close(descriptor)
    print(json.dumps(lost))


if __name__ == "__main__":
    main()
