"""How long until the guest sees a change of the host: FILE HOW WANTED LIMIT.

HOW is `content` (opens the file anew each time), `size` (asks for attributes only) or `open` (opens
it once, makes FILE.opened, and reads from the descriptor). Prints seconds, or null after LIMIT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable


def changed(path: str, what: str, wanted: str) -> bool:
    """Whether the file looks as wanted now. `size` alone reads nothing.

    A read would make the guest's kernel forget the time of access, and ask for all attributes anew.
    """
    try:
        size = os.stat(path).st_size
        if what == "size":
            return size == int(wanted)
        with open(path, "rb") as file:
            return file.read() == wanted.encode() and size == len(wanted)
    except FileNotFoundError:
        return False


def held(path: str) -> Callable[[str], bool]:
    """Opens and reads the file; the value reads it again."""
    descriptor = os.open(path, os.O_RDONLY)
    os.pread(descriptor, 4096, 0)
    os.close(os.open(f"{path}.opened", os.O_CREAT))
    return lambda wanted: os.pread(descriptor, 4096, 0) == wanted.encode()


def main() -> None:
    """Ask until the answer is right or it is too late."""
    path, what, wanted, limit = *sys.argv[1:4], float(sys.argv[4])
    right = held(path) if what == "open" else lambda wanted: changed(path, what, wanted)
    started = time.monotonic()
    while not (seen := right(wanted)) and time.monotonic() - started < limit:
        continue
    print(json.dumps(time.monotonic() - started if seen else None))


if __name__ == "__main__":
    main()
