"""Random operations on one file, each checked against a mirror in memory: fsx.py FILE SEED STEPS.

What fsx of the Apple and xfstests suites does: read, write, truncate, fallocate in every mode, reads
and writes through a mapping, sync, close and open again. The first difference ends it, with the
operations that led there.
"""

import collections
import ctypes
import mmap
import os
import random
import sys
from errno import EOPNOTSUPP

SIZE_MAX = 256 * 1024
PART_MAX = 64 * 1024
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
MODES = (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)

libc = ctypes.CDLL(None, use_errno=True)


class Different(Exception):
    """The file is not what the mirror says."""


class Fsx:
    def __init__(self, path: str, seed: int) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.mirror = bytearray()
        self.done: collections.deque[str] = collections.deque(maxlen=30)
        self.counts: collections.Counter[str] = collections.Counter()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.modes = [mode for mode in MODES if self.fallocate(mode, 0, 1)]
        os.ftruncate(self.fd, 0)
        operations = {
            self.read: 25, self.write: 25, self.truncate: 8, self.allocate: 12,
            self.map_read: 12, self.map_write: 8, self.sync: 2, self.reopen: 3, self.size: 5,
        }  # fmt: skip
        self.operations = list(operations)
        self.weights = list(operations.values())

    def run(self, steps: int) -> None:
        for operation in self.random.choices(self.operations, self.weights, k=steps):
            self.counts[operation.__name__] += 1
            operation()
        self.reopen()
        self.check(os.pread(self.fd, SIZE_MAX + 1, 0), 0, SIZE_MAX)
        os.close(self.fd)

    def note(self, what: str, start: int, length: int) -> None:
        self.done.append(f"{what} {start:#x} + {length:#x}, file of {len(self.mirror):#x}")

    def part(self, size: int) -> tuple[int, int]:
        """Some part of a file of this size; often small, often at page borders."""
        start = self.random.randrange(size)
        if self.random.random() < 0.2:
            start &= -mmap.PAGESIZE
        length = 1 + int(min(PART_MAX, size - start) * self.random.random() ** 2)
        return start, min(length, size - start)

    def check(self, found: bytes, start: int, length: int) -> None:
        wanted = self.mirror[start : start + length]
        if found == wanted:
            return
        if len(found) != len(wanted):
            raise Different(f"{len(found)} bytes at {start:#x}, not {len(wanted)}")
        at = next(i for i, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other)
        raise Different(f"{found[at : at + 8].hex()} at {start + at:#x}, not {wanted[at : at + 8].hex()}")

    def extend(self, size: int) -> None:
        if size > len(self.mirror):
            self.mirror.extend(bytes(size - len(self.mirror)))

    def read(self) -> None:
        start, length = self.part(SIZE_MAX)
        self.note("read", start, length)
        self.check(os.pread(self.fd, length, start), start, length)

    def write(self) -> None:
        start, length = self.part(SIZE_MAX)
        self.note("write", start, length)
        data = self.random.randbytes(length)
        assert os.pwrite(self.fd, data, start) == length
        self.extend(start + length)
        self.mirror[start : start + length] = data

    def truncate(self) -> None:
        size = self.random.randrange(SIZE_MAX)
        self.note("truncate", size, 0)
        os.ftruncate(self.fd, size)
        del self.mirror[size:]
        self.extend(size)

    def fallocate(self, mode: int, start: int, length: int) -> bool:
        if libc.fallocate(self.fd, mode, ctypes.c_long(start), ctypes.c_long(length)) == 0:
            return True
        if ctypes.get_errno() != EOPNOTSUPP:
            raise OSError(ctypes.get_errno(), f"fallocate mode {mode:#x}")
        return False

    def allocate(self) -> None:
        if not self.modes:
            return
        mode = self.random.choice(self.modes)
        start, length = self.part(SIZE_MAX)
        self.note(f"fallocate {mode:#x}", start, length)
        if not self.fallocate(mode, start, length):
            raise Different(f"fallocate mode {mode:#x} has worked and does not any more")
        if not mode & KEEP_SIZE:
            self.extend(start + length)
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            end = min(start + length, len(self.mirror))
            self.mirror[start:end] = bytes(max(0, end - start))

    def mapping(self, write: bool) -> tuple[mmap.mmap, int, int, int] | None:
        if not self.mirror:
            return None
        start, length = self.part(len(self.mirror))
        border = start & -mmap.PAGESIZE
        access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        self.note("map write" if write else "map read", start, length)
        area = mmap.mmap(self.fd, start - border + length, mmap.MAP_SHARED, access, offset=border)
        return area, start - border, start, length

    def map_read(self) -> None:
        if found := self.mapping(False):
            area, at, start, length = found
            with area:
                self.check(area[at : at + length], start, length)

    def map_write(self) -> None:
        if found := self.mapping(True):
            area, at, start, length = found
            data = self.random.randbytes(length)
            with area:
                area[at : at + length] = data
                if self.random.random() < 0.3:
                    area.flush()
            self.mirror[start : start + length] = data

    def sync(self) -> None:
        self.note("fsync", 0, 0)
        os.fsync(self.fd)

    def reopen(self) -> None:
        self.note("reopen", 0, 0)
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)

    def size(self) -> None:
        self.note("fstat", 0, 0)
        if (size := os.fstat(self.fd).st_size) != len(self.mirror):
            raise Different(f"a size of {size:#x}, not {len(self.mirror):#x}")


def main(path: str, seed: int, steps: int) -> None:
    fsx = Fsx(path, seed)
    print(f"seed {seed}, {steps} steps, fallocate modes {[hex(mode) for mode in fsx.modes]}")
    try:
        fsx.run(steps)
    except Different as problem:
        sys.exit("\n".join([*fsx.done, f"seed {seed}: {problem}"]))
    print(f"{os.stat(path).st_size} bytes at the end; {dict(fsx.counts)}")
    with open(path + ".mirror", "wb") as file:
        file.write(fsx.mirror)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
