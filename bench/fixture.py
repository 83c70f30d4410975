"""The directory that is served while measuring: one tree for all to read, and a place for each to write.

common/files/fXXXXXXXX     FILES files of 4 KiB
common/new                 the same, whose inodes are forgotten as soon as they have been looked up
common/small/dXXXXXXXX/    SMALL directories of 10 files, and small-new
common/thousand/d00000000/ a thousand files, empty, and thousand-new
common/large/d00000000/    many files, empty, and large-new
common/known/d00000000/    files whose inodes are only weighed
common/big                 the file to read
NAME/                      a daemon's own: big, and what it makes
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from . import _measure

FILES = 1024
FILE_SIZE = 4096
SMALL = 256  # more than the operations under way and the forgets on their way
SMALL_ENTRIES = 10
THOUSAND = 1000
SEED = 20261122
XATTR = "user.bench"
XATTR_VALUE = b"0123456789abcdef"
CHUNK = 1 << 20


def write_pages(path: Path, size: int, seed: int) -> None:
    """A file of `size` bytes with the contents that load generators know."""
    data = bytearray(CHUNK)
    with open(path, "wb") as stream:
        for at in range(0, size, CHUNK):
            _measure.fill(data, seed, at // _measure.PAGE)
            stream.write(memoryview(data)[: min(CHUNK, size - at)])


def make_files(directory: Path, count: int, content: bytes = b"") -> None:
    """Files of the names that load generators use."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with open(directory / f"f{number:08x}", "xb") as stream:
            stream.write(content)


class Tree:
    """A served directory, at `base`; its parts are made when they are first needed.

    big: bytes of the files to read and write; large and known: entries of those directories.
    source: another way to `base`, by which parts are made; where base itself is slow.
    """

    def __init__(self, base: Path, big: int, large: int, known: int = 0, source: Path | None = None) -> None:
        self.base = base
        self.source = source or base
        self.big = big
        self.large = large
        self.known = known
        self.common = base / "common"

    def part(self, name: str) -> Path:
        """A file or directory all read."""
        return self.made(name, lambda new: self._make(name.removesuffix("-new"), new))

    def _make(self, kind: str, new: Path) -> None:
        if kind == "big":
            write_pages(new, self.big, SEED)
        elif kind in ("files", "new"):
            make_files(new, FILES, bytes(FILE_SIZE))
            with contextlib.suppress(OSError):  # the workload finds out, and says so
                os.setxattr(new / f"f{0:08x}", XATTR, XATTR_VALUE)
        elif kind == "small":
            for number in range(SMALL):
                make_files(new / f"d{number:08x}", SMALL_ENTRIES)
        else:
            make_files(new / f"d{0:08x}", self.entries(kind))

    def entries(self, part: str) -> int:
        """How many files a directory of that part has."""
        counts = {"small": SMALL_ENTRIES, "thousand": THOUSAND, "large": self.large, "known": self.known}
        return counts[part.removesuffix("-new")]

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A part that `make` makes at the path it is given, when it is first needed."""
        common = self.source / "common"
        path = common / name
        if not path.exists():
            common.mkdir(parents=True, exist_ok=True)
            new = common / f"{name}.new"  # not taken for whole when this is interrupted
            make(new)
            new.rename(path)
        return self.common / name

    def own(self, name: str) -> Path:
        """A fresh directory for one contestant."""
        directory = self.source / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / "file").write_bytes(bytes(8192))
        (directory / f"a{0:08x}").touch()
        return self.base / name

    def own_big(self, name: str) -> Path:
        """Its file to write."""
        path = self.source / name / "big"
        if not path.exists():
            write_pages(path, self.big, 0)
        return self.base / name / "big"

    def remove(self) -> None:
        shutil.rmtree(self.source, ignore_errors=True)


def written_wrong(path: Path, seed: int, block: int, blocks: list[int]) -> int | None:
    """The first offset at which one of these blocks does not have what was written; None if none."""
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
        view = memoryview(data)
        try:
            for number in blocks:
                start = number * block
                wrong = _measure.first_wrong(view[start : start + block], seed, start // _measure.PAGE)
                if wrong >= 0:
                    return start + wrong
        finally:
            view.release()
    return None


def file_system(path: Path) -> str:
    """Type of the file system a path is on."""
    best, kind = "", "unknown"
    where = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4]
        if (where + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind
