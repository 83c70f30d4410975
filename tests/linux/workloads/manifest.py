"""What a tree holds, as one checksum; runs on the host and, as a program, in the guest."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys

CHUNK = 1 << 20


def file_sum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def tree(top: str | os.PathLike[str], *, times: bool = True) -> dict[str, str]:
    """Each path below `top` with its kind, mode, owner, size, content and modification time.

    Directories have no size and no time here: file systems differ in the one, copying changes the
    other.
    """
    found: dict[str, str] = {}
    pending = [os.fspath(top)]
    while pending:
        directory = pending.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                fields = [stat.filemode(status.st_mode), f"{status.st_uid}:{status.st_gid}"]
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
                else:
                    fields.append(str(status.st_size))
                    if times:
                        fields.append(str(status.st_mtime_ns))
                if stat.S_ISREG(status.st_mode):
                    fields.append(file_sum(entry.path))
                elif stat.S_ISLNK(status.st_mode):
                    fields.append(os.readlink(entry.path))
                found[os.path.relpath(entry.path, top)] = " ".join(fields)
    return found


def tree_sum(top: str | os.PathLike[str], *, times: bool = True) -> dict[str, object]:
    """The number of entries below `top` and a checksum over `tree`."""
    lines = sorted(f"{path!r} {fields}" for path, fields in tree(top, times=times).items())
    text = "\n".join(lines).encode("utf-8", "surrogateescape")
    return {"entries": len(lines), "sha256": hashlib.sha256(text).hexdigest()}


def make_tree(top: str | os.PathLike[str], files: int) -> None:
    """Make a tree of `files` files of 0 to 20 kB, 50 a directory, with some links and modes."""
    for number in range(files):
        directory = os.path.join(top, f"d{number // 1000}", f"e{number // 50}")
        if number % 50 == 0:
            os.makedirs(directory)
        path = os.path.join(directory, f"file {number}.bin")
        seed = hashlib.sha256(str(number).encode()).digest()
        with open(path, "wb") as file:
            file.write(seed * (number * 7919 % 641))
        os.chmod(path, 0o600 + number % 64)
        os.utime(path, ns=(number, 1_600_000_000_000_000_000 + number * 1_000_003))
        if number % 50 == 49:
            link = os.path.join(directory, "link")
            os.symlink(f"file {number}.bin", link)
            # Long ago: rsync takes two times within one second for the same.
            os.utime(link, ns=(number, 1_500_000_000_123_456_789), follow_symlinks=False)


def main() -> None:
    """Print `tree_sum` of the first argument, with times if the second says so."""
    print(json.dumps(tree_sum(sys.argv[1], times="times" in sys.argv[2:])))


if __name__ == "__main__":
    main()
