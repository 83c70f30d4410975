"""What a local file system can do beyond reading and writing: DIRECTORY."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16

LIBC = ctypes.CDLL(None, use_errno=True)


def kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split(".")[:2])


def write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def fails(call: Callable[[], object], *numbers: int) -> bool:
    try:
        call()
    except OSError as problem:
        return problem.errno in numbers
    return False


def rename(old: str, new: str, flags: int) -> None:
    if LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags) < 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def link_open(descriptor: int, new: str) -> None:
    old = f"/proc/self/fd/{descriptor}".encode()
    if LIBC.linkat(AT_FDCWD, old, AT_FDCWD, os.fsencode(new), AT_SYMLINK_FOLLOW) < 0:
        raise OSError(ctypes.get_errno(), "linkat")


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if LIBC.fallocate(descriptor, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)) < 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def copies(answers: dict[str, bool]) -> None:
    data = os.urandom(3 << 20)
    write("source", data)
    subprocess.run(["cp", "--reflink=auto", "source", "cp"], check=True)
    answers["cp"] = read("cp") == data
    source, target = os.open("source", os.O_RDONLY), os.open("copy", os.O_RDWR | os.O_CREAT, 0o644)
    done = 0
    while count := os.copy_file_range(source, target, 8 << 20, done, done):
        done += count
    answers["copy_file_range"] = done == len(data) and read("copy") == data
    # Over what the kernel has cached.
    os.pread(target, 100_000, 0)
    answers["a copy within"] = (
        os.copy_file_range(source, target, 5000, 1 << 20, 10) == 5000
        and os.pread(target, 5020, 0) == data[:10] + data[1 << 20 : (1 << 20) + 5000] + data[5010:5020]
    )
    answers["no copy to a reader"] = fails(lambda: os.copy_file_range(target, source, 1), errno.EBADF)
    os.close(source)
    os.close(target)


def nameless(answers: dict[str, bool]) -> None:
    descriptor = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
    names = os.listdir(".")
    os.write(descriptor, b"data")
    answers["O_TMPFILE"] = "named" not in names and os.fstat(descriptor).st_nlink == 0
    answers["it reads back"] = os.pread(descriptor, 10, 0) == b"data"
    link_open(descriptor, "named")
    answers["linkat"] = os.fstat(descriptor).st_nlink == 1 and read("named") == b"data"
    answers["its inode"] = os.stat("named").st_ino == os.fstat(descriptor).st_ino
    os.close(descriptor)
    answers["it stays"] = read("named") == b"data"
    descriptor = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL)
    answers["O_EXCL"] = fails(lambda: link_open(descriptor, "never"), errno.ENOENT)
    os.close(descriptor)


def flags(answers: dict[str, bool]) -> None:
    write("flags", b"")
    os.mkdir("dir")
    for name in ("flags", "dir"):
        subprocess.run(["chattr", "+d", name], check=True)
        shown = subprocess.run(["lsattr", "-d", name], check=True, capture_output=True, text=True).stdout
        answers[f"lsattr {name}"] = "d" in shown.split()[0]
    subprocess.run(["chattr", "+i", "flags"], check=True)
    answers["immutable"] = fails(lambda: os.unlink("flags"), errno.EPERM)
    subprocess.run(["chattr", "-i", "-d", "flags"], check=True)


def ranges(answers: dict[str, bool]) -> None:
    data = os.urandom(1 << 20)
    descriptor = os.open("ranges", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(descriptor, data)
    fallocate(descriptor, ZERO_RANGE, 4096, 8192)
    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 65536, 65536)
    expected = data[:4096] + bytes(8192) + data[12288:65536] + bytes(65536) + data[131072:]
    answers["ZERO_RANGE and PUNCH_HOLE"] = os.pread(descriptor, 2 << 20, 0) == expected
    fallocate(descriptor, KEEP_SIZE, 1 << 20, 1 << 20)
    answers["KEEP_SIZE"] = os.fstat(descriptor).st_size == 1 << 20
    answers["COLLAPSE_RANGE"] = fails(
        lambda: fallocate(descriptor, COLLAPSE_RANGE, 0, 4096), errno.EOPNOTSUPP
    )
    os.fsync(descriptor)
    # All may be taken for data where the guest may hold some that the host lacks.
    answers["SEEK_HOLE"] = os.lseek(descriptor, 65536, os.SEEK_HOLE) >= 65536
    answers["SEEK_DATA"] = os.lseek(descriptor, 65536, os.SEEK_DATA) in (65536, 131072)
    answers["nothing behind the end"] = fails(
        lambda: os.lseek(descriptor, 1 << 20, os.SEEK_DATA), errno.ENXIO
    )
    os.close(descriptor)


def renames(answers: dict[str, bool]) -> None:
    write("a", b"a")
    write("b", b"b")
    rename("a", "b", EXCHANGE)
    answers["EXCHANGE"] = (read("a"), read("b")) == (b"b", b"a")
    answers["NOREPLACE"] = fails(lambda: rename("a", "b", NOREPLACE), errno.EEXIST)
    rename("a", "c", WHITEOUT)
    left = os.lstat("a")
    answers["WHITEOUT"] = read("c") == b"b" and stat.S_ISCHR(left.st_mode) and left.st_rdev == 0
    answers["both at once"] = fails(lambda: rename("b", "c", NOREPLACE | EXCHANGE), errno.EINVAL)


def births(answers: dict[str, bool]) -> None:
    write("born", b"")
    os.utime("born", (1, 1))
    shown = subprocess.run(["stat", "-c", "%W", "born"], check=True, capture_output=True, text=True).stdout
    # Linux has asked for it since 6.6.
    answers["birth time"] = int(shown) > 10**9 if kernel() >= (6, 6) else shown.strip() in ("0", "-")


def main() -> None:
    """Each question with its answer."""
    os.chdir(sys.argv[1])
    answers: dict[str, bool] = {}
    for part in (copies, nameless, flags, ranges, renames, births):
        part(answers)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
