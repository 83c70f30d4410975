"""Requests as Linux makes them, and the elements that reference A3 gives them."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from vfsd.fuse.opcodes import NUMBER

ROOT = 1
GETATTR = NUMBER["GETATTR"]
DESTROY = NUMBER["DESTROY"]
READ = NUMBER["READ"]
WRITE = NUMBER["WRITE"]
IOCTL = 39
ATTR_OUT = 104


class Sample(NamedTuple):
    name: str
    request: dict[str, Any]  # for Transport.submit
    readable: list[int]
    writable: list[int]


def _sample(
    name: str, opcode: int, args: bytes, readable: list[int], writable: list[int], **options: Any
) -> Sample:
    return Sample(name, {"opcode": opcode, "nodeid": ROOT, "args": args, **options}, readable, writable)


SAMPLES = [
    _sample("INIT", 26, bytes(64), [40, 64], [16, 64], out=64, argvar=True),
    _sample("LOOKUP", 1, b"ab\0", [40, 3], [16, 128], out=128),
    _sample("GETATTR", 3, bytes(16), [40, 16], [16, 104], out=104),
    _sample("STATFS", 17, b"", [40], [16, 80], out=80),
    _sample("READLINK", 5, b"", [40], [16, 4095], into=4095, argvar=True),
    _sample("CREATE", 35, bytes(16) + b"ab\0", [40, 19], [16, 144], out=144),
    _sample("READ 8192", 15, bytes(40), [40, 40], [16, 4096, 4096], into=8192, argvar=True),
    _sample("READ 5000", 15, bytes(40), [40, 40], [16, 4096, 904], into=5000, argvar=True),
    _sample("WRITE 5000", 16, bytes(40), [40, 40, 4096, 904], [16, 8], out=8, data=b"w" * 5000),
    _sample("WRITE 1", 16, bytes(40), [40, 40, 1], [16, 8], out=8, data=b"w"),
    _sample("READDIR", 28, bytes(40), [40, 40], [16, 4096, 4096], into=8192, argvar=True),
    _sample("SETXATTR", 21, bytes(16) + b"user.a\0" + bytes(100), [40, 123], [16]),
    _sample("REMOVEMAPPING", 49, bytes(4 + 16 * 3), [40, 52], [16]),
    _sample("DESTROY", 38, b"", [40], [16]),
    _sample("IOCTL, in larger than out", 39, bytes(32), [40, 32, 4096, 2560], [16, 16, 4096],
            out=16, data=bytes(6656), into=4096, argvar=True),
    _sample("IOCTL, out larger than in", 39, bytes(32), [40, 32, 100], [16, 16, 4096, 4096],
            out=16, data=bytes(100), into=8192, argvar=True),
    _sample("IOCTL, without data", 39, bytes(32), [40, 32], [16, 16], out=16),
]  # fmt: skip


# ---- what a real daemon is asked; replies as in linux/fuse.h

ENTRY_OUT, OPEN_OUT = 128, 16
INIT_IN = struct.Struct("=IIIII 44x")  # major, minor, max_readahead, flags, flags2
CREATE_IN = struct.Struct("=IIII")  # flags, mode, umask, open_flags
READ_IN = struct.Struct("=QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, -
RELEASE_IN = struct.Struct("=QIIQ")  # fh, flags, release_flags, lock_owner
DIRENT = struct.Struct("=QQII")  # ino, off, namelen, type
MAX_PAGES = 1 << 22
