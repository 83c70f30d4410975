"""Files that lose their name while they are open: DIRECTORY."""

from __future__ import annotations

import json
import mmap
import os
import sys

OLD = b"old content " * 5000
NEW = b"new content, longer " * 5000


def write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def drop_pages(descriptor: int) -> None:
    """Make the next read ask the daemon."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def rename_over_open(directory: str) -> dict[str, bool]:
    target, source = f"{directory}/target", f"{directory}/source"
    write(target, OLD)
    write(source, NEW)
    with open(target, "rb") as replaced, open(source, "rb") as moved:
        first = replaced.read(10)
        os.rename(source, target)
        drop_pages(replaced.fileno())
        rest = replaced.read()
        return {
            "the replaced file can be read on": first + rest == OLD,
            "the replaced file has no link": os.fstat(replaced.fileno()).st_nlink == 0,
            "the moved file can be read": moved.read() == NEW,
            "the name shows the new file": read(target) == NEW,
            "the source is gone": not os.path.exists(source),
        }


def unlink_open(directory: str) -> dict[str, bool]:
    path = f"{directory}/unlinked"
    write(path, OLD)
    descriptor = os.open(path, os.O_RDWR)
    os.unlink(path)
    drop_pages(descriptor)
    before = os.pread(descriptor, len(OLD) + 1, 0)
    os.pwrite(descriptor, b"still writable", len(OLD))
    drop_pages(descriptor)
    after = os.pread(descriptor, 100, len(OLD))
    size = os.fstat(descriptor).st_size
    os.ftruncate(descriptor, 5)
    truncated = os.fstat(descriptor)
    os.fchmod(descriptor, 0o640)
    changed = os.fstat(descriptor)
    write(path, b"another file of that name")
    same = os.pread(descriptor, 100, 0)
    os.close(descriptor)
    return {
        "an unlinked file can be read": before == OLD,
        "an unlinked file can be written": after == b"still writable",
        "its size is known": size == len(OLD) + len(b"still writable"),
        "it can be truncated": truncated.st_size == 5 and truncated.st_nlink == 0,
        "its mode can be changed": changed.st_mode & 0o777 == 0o640,
        "a new file of that name is another": same == OLD[:5],
    }


def remove_open_directory(directory: str) -> dict[str, bool]:
    path = f"{directory}/removed"
    os.mkdir(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir(path)
    empty = os.listdir(descriptor) == []
    links = os.fstat(descriptor).st_nlink
    os.close(descriptor)
    return {"an open directory can be removed": empty and links == 0}


def mapped(directory: str) -> dict[str, bool]:
    path = f"{directory}/mapped"
    write(path, bytes(1 << 16))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[5000:5004] = b"here"
        memory.flush()
        os.unlink(path)
        memory[9000:9005] = b"there"
        memory.flush()
        drop_pages(file.fileno())
        return {
            "a mapping of an unlinked file works": os.pread(file.fileno(), 4, 5000) == b"here"
            and os.pread(file.fileno(), 5, 9000) == b"there"
        }


def exchange(directory: str) -> dict[str, bool]:
    """Names are found anew after renames across directories, with the files open."""
    os.makedirs(f"{directory}/a/b")
    os.mkdir(f"{directory}/c")
    write(f"{directory}/a/b/file", OLD)
    with open(f"{directory}/a/b/file", "r+b") as file:
        os.rename(f"{directory}/a", f"{directory}/c/a")
        file.write(b"N")
        file.flush()
        return {
            "an open file in a moved directory": read(f"{directory}/c/a/b/file") == b"N" + OLD[1:]
        }


def main() -> None:
    """Every question with its answer."""
    directory = sys.argv[1]
    steps = (rename_over_open, unlink_open, remove_open_directory, mapped, exchange)
    print(json.dumps({name: value for step in steps for name, value in step(directory).items()}))


if __name__ == "__main__":
    main()
