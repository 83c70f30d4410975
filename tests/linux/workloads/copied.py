"""Where the data are of files that another program has open and has changed: DIRECTORY [mapped] [programs].

mapped: where shared mappings are allowed. programs: also by GNU cp and tar, which leave holes out; `kept`,
64 KiB of data behind 1 MiB of hole, is the host's then, and nobody writes to it. Prints a yes or no for each
question.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
DATA = b"x" * 200_000


def new(path: str) -> None:
    os.pwrite(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), DATA, 0)


def grown(path: str) -> None:
    Path(path).write_bytes(b"a" * 4096)
    os.pwrite(os.open(path, os.O_RDWR), DATA, 4096)


def sparse(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, MIB)
    os.pwrite(fd, DATA, 500_000)


def mapped(path: str) -> mmap.mmap:
    """A hole that is stored to; the mapping alone keeps the file open."""
    Path(path).write_bytes(b"")
    os.truncate(path, MIB)
    os.stat(path)
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, MIB)
    os.close(fd)
    memory[4096 : 4096 + len(DATA)] = DATA
    return memory


def beside(change: Callable[[str], object], path: str, look: Callable[[str], bytes]) -> bytes:
    """What `look` finds while a process has made that change, and neither closed nor synced anything."""
    done, told = os.pipe()
    child = os.fork()
    if child == 0:
        held = change(path)
        os.write(told, b"!")
        signal.pause()
        del held
    os.close(told)
    try:
        assert os.read(done, 1) == b"!", "the program that writes has failed"
        return look(path)
    finally:
        os.close(done)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def copied(path: str) -> bytes:
    import subprocess  # which small guests lack

    subprocess.run(["cp", path, f"{path}.copy"], check=True)
    return read(f"{path}.copy")


def archived(path: str) -> bytes:
    import subprocess

    archive = f"{path}.tar"
    subprocess.run(["tar", "-cSf", archive, path], check=True, stderr=subprocess.DEVNULL)
    return subprocess.run(["tar", "-xOf", archive], check=True, capture_output=True, input=b"").stdout


def sought(change: Callable[[str], object], path: str) -> bool:
    """Whether its data are found by who has it open already: opening may have them written back."""
    Path(path).touch()
    fd = os.open(path, os.O_RDONLY)

    def data(_: str) -> bytes:
        size = os.fstat(fd).st_size
        content = bytearray(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(fd, at, os.SEEK_HOLE)
            content[at:end] = os.pread(fd, end - at, at)
            at = end
        return bytes(content)

    found = beside(change, path, data)
    os.close(fd)
    return found.count(b"x") == len(DATA)


def main() -> None:
    """All of it."""
    os.chdir(sys.argv[1])
    changes = [new, grown, sparse, *([mapped] if "mapped" in sys.argv[2:] else [])]
    answers = {}
    looks = (copied, archived) if "programs" in sys.argv[2:] else ()
    if looks:
        copy = copied("kept")
        answers["holes of others stay"] = copy == read("kept") and os.stat("kept.copy").st_blocks * 512 < MIB
    for change in changes:
        for look in looks:
            name = f"{change.__name__}-{look.__name__}"
            answers[name] = beside(change, name, look).count(b"x") == len(DATA)
        answers[f"{change.__name__}-sought"] = sought(change, f"{change.__name__}-sought")
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
