"""Files with holes: DIRECTORY."""

from __future__ import annotations

import ctypes
import json
import os
import sys

SIZE = 1 << 30
MIDDLE = SIZE // 2
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2


def main() -> None:
    """A file of 1 GiB with data in the middle, and one with a hole punched into it."""
    directory = sys.argv[1]
    answers = {}
    descriptor = os.open(f"{directory}/sparse", os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(descriptor, SIZE)
    os.pwrite(descriptor, b"island", MIDDLE)
    os.fsync(descriptor)
    status = os.fstat(descriptor)
    answers["size"] = status.st_size == SIZE
    answers["few blocks"] = 0 < status.st_blocks * 512 <= 1 << 20
    answers["SEEK_DATA"] = os.lseek(descriptor, 0, os.SEEK_DATA) == MIDDLE // 4096 * 4096
    answers["SEEK_HOLE"] = os.lseek(descriptor, MIDDLE, os.SEEK_HOLE) == MIDDLE + 4096
    # What has been read may be stored to by a mapping: from then on all may be data.
    answers["a hole reads as zeros"] = os.pread(descriptor, 4096, MIDDLE - 8192) == bytes(4096)
    answers["the data is there"] = os.pread(descriptor, 6, MIDDLE) == b"island"
    os.close(descriptor)

    data = os.urandom(1 << 20)
    descriptor = os.open(f"{directory}/punched", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(descriptor, data)
    libc = ctypes.CDLL(None, use_errno=True)
    start, length = 256 << 10, 512 << 10
    failed = libc.fallocate(
        descriptor,
        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
        ctypes.c_longlong(start),
        ctypes.c_longlong(length),
    )
    expected = data[:start] + bytes(length) + data[start + length :]
    answers["a hole can be punched"] = failed == 0 and os.pread(descriptor, 2 << 20, 0) == expected
    os.posix_fallocate(descriptor, 1 << 20, 1 << 20)
    status = os.fstat(descriptor)
    answers["space can be allocated"] = (
        status.st_size == 2 << 20 and status.st_blocks * 512 >= (2 << 20) - length
    )
    os.close(descriptor)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
