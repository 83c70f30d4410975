"""A FUSE file system with one file, each read of which takes its time: `python -m vfsd_bench.slowfs`.

    slowfs DIRECTORY SECONDS

Mounts itself at DIRECTORY and prints READY. Ends when it is unmounted, or told to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import struct
import sys
import time
from typing import NoReturn

from vfsd.fuse import abi
from vfsd.guest.bridge import mounting

FILE = b"file"
FILE_ID = 2
SIZE = 1 << 20
DIRECT_IO = 1
IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
ATTR = struct.Struct("=QQQQQQ IIIIIIIIII")
BUFFER = (1 << 20) + 4096


def attr(node: int) -> bytes:
    mode, size = (stat.S_IFREG | 0o644, SIZE) if node == FILE_ID else (stat.S_IFDIR | 0o755, 4096)
    return ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, args: bytes, seconds: float) -> bytes | int | None:
    """The body of a reply, or an errno; None: none is awaited."""
    if opcode in (2, 42):  # FORGET, BATCH_FORGET
        return None
    if opcode == 26:  # INIT
        return abi.INIT_OUT.pack(7, 31, 0, 0, 16, 12, 1 << 20, 1, 0, 0, 0)
    if opcode == 1:  # LOOKUP
        if node != abi.ROOT_ID or args.rstrip(b"\0") != FILE:
            return errno.ENOENT
        return struct.pack("=QQQQII", FILE_ID, 0, 3600, 3600, 0, 0) + attr(FILE_ID)
    if opcode == 3:  # GETATTR
        return struct.pack("=QII", 3600, 0, 0) + attr(node)
    if opcode in (14, 27):  # OPEN, OPENDIR: nothing of it stays in the page cache
        return abi.OPEN_OUT.pack(0, DIRECT_IO if opcode == 14 else 0, 0)
    if opcode == 15:  # READ
        time.sleep(seconds)
        (_, offset, size, *_) = abi.READ_IN.unpack(args[: abi.READ_IN.size])
        return bytes(max(0, min(size, SIZE - offset)))
    return b"" if opcode in (18, 25, 29) else errno.ENOSYS  # RELEASE, FLUSH, RELEASEDIR


def serve(fd: int, seconds: float) -> None:
    """Until it is unmounted."""
    while True:
        try:
            request = os.read(fd, BUFFER)
        except OSError as problem:
            if problem.errno == errno.ENODEV:
                return
            continue
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        found = answer(opcode, node, request[IN_HEADER.size :], seconds)
        if found is None:
            continue
        body, error = (b"", -found) if isinstance(found, int) else (found, 0)
        with contextlib.suppress(OSError):  # the request was interrupted
            os.write(fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), error, unique) + body)


def main() -> NoReturn:
    directory, seconds = sys.argv[1], float(sys.argv[2])
    fd = mounting.open_device()
    mounting.mount(fd, directory, "slow", 0)

    def end(*_: object) -> None:
        with contextlib.suppress(OSError):  # it has been unmounted
            mounting.unmount(directory, mounting.MNT_DETACH)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    print("READY", flush=True)
    serve(fd, seconds)
    sys.exit(0)


if __name__ == "__main__":
    main()
