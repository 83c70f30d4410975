"""Whether files are mapped rather than cached (statx's STATX_ATTR_DAX), without opening them: FILE..."""

from __future__ import annotations

import ctypes
import json
import os
import sys

AT_FDCWD = -100
STATX_ATTR_DAX = 0x200000
STATX_BASIC_STATS = 0x7FF
ATTRIBUTES = slice(8, 16)  # of struct statx
ATTRIBUTES_MASK = slice(56, 64)


def is_dax(path: str) -> bool:
    """By the attribute that the guest's kernel sets from its inode."""
    answer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(AT_FDCWD, os.fsencode(path), 0, STATX_BASIC_STATS, answer) < 0:
        raise OSError(ctypes.get_errno(), "statx", path)
    assert int.from_bytes(answer.raw[ATTRIBUTES_MASK], "little") & STATX_ATTR_DAX, "it does not say"
    return bool(int.from_bytes(answer.raw[ATTRIBUTES], "little") & STATX_ATTR_DAX)


def main() -> None:
    """See above."""
    print(json.dumps([is_dax(path) for path in sys.argv[1:]]))


if __name__ == "__main__":
    main()
