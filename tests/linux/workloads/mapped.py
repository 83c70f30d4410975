"""Mapping files of the share: DIR. The answers are by what should be so."""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys

PAGE = mmap.PAGESIZE


def make(path: str, size: int) -> int:
    """An open file with a letter for each page."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for number in range(size // PAGE):
        os.write(descriptor, bytes([ord("a") + number % 26]) * PAGE)
    return descriptor


def signal_of(memory: mmap.mmap, at: int) -> int:
    """The signal that ends who touches that byte, 0 for none."""
    child = os.fork()
    if child == 0:
        os._exit(memory[at] & 0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def shared(top: str) -> dict[str, bool]:
    descriptor = make(f"{top}/shared", 600 * PAGE)  # more than one range
    answers = {}
    with mmap.mmap(descriptor, 600 * PAGE) as memory:
        answers["a mapping has the file's bytes"] = memory[599 * PAGE] == ord("a") + 599 % 26
        memory[5 * PAGE : 5 * PAGE + 6] = b"mapped"
        memory[599 * PAGE : 599 * PAGE + 4] = b"last"
        answers["read sees what was stored"] = os.pread(descriptor, 6, 5 * PAGE) == b"mapped"
        os.pwrite(descriptor, b"written", 6 * PAGE)
        answers["loads see what was written"] = memory[6 * PAGE : 6 * PAGE + 7] == b"written"
        memory.flush()
    os.close(descriptor)
    return answers


def private(top: str) -> dict[str, bool]:
    descriptor = make(f"{top}/private", 4 * PAGE)
    answers = {}
    with mmap.mmap(descriptor, 4 * PAGE, flags=mmap.MAP_PRIVATE) as memory:
        memory[PAGE : PAGE + 4] = b"mine"
        answers["a private store is kept"] = memory[PAGE : PAGE + 4] == b"mine"
        answers["and not in the file"] = os.pread(descriptor, 4, PAGE) == b"bbbb"
        os.pwrite(descriptor, b"theirs", 2 * PAGE)
        answers["other pages are still the file's"] = memory[2 * PAGE : 2 * PAGE + 6] == b"theirs"
    os.close(descriptor)
    return answers


def truncated(top: str) -> dict[str, bool]:
    descriptor = make(f"{top}/truncated", 8 * PAGE)
    answers = {}
    with mmap.mmap(descriptor, 8 * PAGE) as memory:
        answers["before, all pages are there"] = signal_of(memory, 7 * PAGE) == 0
        os.ftruncate(descriptor, 2 * PAGE + 100)
        answers["what is left is there"] = memory[2 * PAGE + 99] == ord("c")
        answers["the rest of the last page is zero"] = memory[2 * PAGE + 100] == 0
        answers["behind it is SIGBUS"] = signal_of(memory, 3 * PAGE) == signal.SIGBUS
        os.ftruncate(descriptor, 8 * PAGE)
        answers["longer again, it is zero"] = memory[7 * PAGE] == 0 and memory[2 * PAGE + 100] == 0
        memory[7 * PAGE] = 1
        answers["and can be stored to"] = os.pread(descriptor, 1, 7 * PAGE) == b"\1"
    os.close(descriptor)
    return answers


def main() -> None:
    """Everything, one after the other."""
    top = sys.argv[1]
    print(json.dumps(shared(top) | private(top) | truncated(top)))


if __name__ == "__main__":
    main()
