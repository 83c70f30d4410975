"""A FUSE file system of one directory of empty files, with names and positions as no local one has them.

    python -m hostfs.listfs DIRECTORY FIRST STEP NAME_BYTES...

The position behind file number i is FIRST + i * STEP, its name has so many bytes. Each FLUSH, of a close(2),
is told on standard output, and waits for a line of standard input, or its end. `served` runs it as a process
of its own.
"""

import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from vfsd.fuse import abi
from vfsd.fuse.opcodes import NUMBER
from vfsd.guest.bridge import mounting

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
FIRST_FILE = 2  # inode number
SILENT = {NUMBER["FORGET"], NUMBER["BATCH_FORGET"]}
EMPTY = {NUMBER["RELEASE"], NUMBER["RELEASEDIR"]}
FLUSH = NUMBER["FLUSH"]
TESTS = Path(__file__).parent.parent


def names_of(lengths: list[int]) -> list[bytes]:
    return [(b"%d-" % i).ljust(length, b"n") for i, length in enumerate(lengths)]


class ListFs:
    def __init__(self, first: int, step: int, names: list[bytes]) -> None:
        self.names = names
        self.positions = [first + i * step for i in range(len(names))]

    def attr(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == abi.ROOT_ID else stat.S_IFREG | 0o644
        return abi.ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def listing(self, offset: int, size: int) -> bytes:
        records = b""
        start = self.positions.index(offset) + 1 if offset else 0
        for i in range(start, len(self.names)):
            name = self.names[i]
            record = abi.DIRENT.pack(FIRST_FILE + i, self.positions[i], len(name), stat.S_IFREG >> 12)
            record += name.ljust(-len(name) // 8 * -8, b"\0")
            if len(records) + len(record) > size:
                break
            records += record
        return records

    def answer(self, opcode: int, node: int, args: bytes) -> bytes | int:
        """The body of a reply, or an errno."""
        if opcode == NUMBER["INIT"]:
            return abi.INIT_OUT.pack(7, 31, 0, 0, 16, 12, 1 << 20, 1, 0, 0, 0)
        if opcode == NUMBER["LOOKUP"]:
            name = args.rstrip(b"\0")
            if name not in self.names:
                return errno.ENOENT
            number = FIRST_FILE + self.names.index(name)
            return struct.pack("=QQQQII", number, 0, 3600, 3600, 0, 0) + self.attr(number)
        if opcode == NUMBER["GETATTR"]:
            return struct.pack("=QII", 3600, 0, 0) + self.attr(node)
        if opcode in (NUMBER["OPEN"], NUMBER["OPENDIR"]):
            return abi.OPEN_OUT.pack(0, 0, 0)
        if opcode == NUMBER["READDIR"]:
            _, offset, size, *_ = abi.READ_IN.unpack_from(args)
            return self.listing(offset, size)
        if opcode == FLUSH:
            print("FLUSH", flush=True)
            sys.stdin.readline()
            return b""
        if opcode == NUMBER["STATFS"]:
            return abi.KSTATFS.pack(1, 1, 1, 1, 1, 4096, 1024, 4096, 0)
        return b"" if opcode in EMPTY else errno.ENOSYS


def serve(directory: str, answer: Callable[[int, int, bytes], bytes | int]) -> None:
    """Mount it there and tell so, then answer opcode, node id and arguments until it is unmounted."""
    fd = mounting.open_device()
    mounting.mount(fd, directory, "listfs", 0)
    print("READY", flush=True)
    while True:
        try:
            request = os.read(fd, 1 << 21)
        except OSError as problem:
            if problem.errno == errno.ENODEV:
                return
            continue
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        if opcode in SILENT:
            continue
        found = answer(opcode, node, request[IN_HEADER.size :])
        body, error = (b"", -found) if isinstance(found, int) else (found, 0)
        with contextlib.suppress(OSError):  # the request was interrupted
            os.write(fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), error, unique) + body)


def served(
    directory: Path, lengths: list[int], first: int = 1, step: int = 1, *, gated: bool = False
) -> AbstractContextManager["subprocess.Popen[str]"]:
    """Mounted there: its process. gated: the caller answers each FLUSH."""
    return mounted(__name__, directory, first, step, *lengths, spoken_to=gated)


@contextlib.contextmanager
def mounted(
    module: str, directory: Path, *words: object, spoken_to: bool
) -> Iterator["subprocess.Popen[str]"]:
    """What a module that calls serve() mounts there: its process. spoken_to: by its standard input."""
    directory.mkdir(exist_ok=True)
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    stdin = subprocess.PIPE if spoken_to else subprocess.DEVNULL
    with subprocess.Popen(
        [sys.executable, "-m", module, str(directory), *map(str, words)],
        stdin=stdin, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "READY\n"
        try:
            yield process
        finally:
            mounting.unmount(str(directory), mounting.MNT_DETACH)
            process.kill()  # whoever has it open yet is told that it is gone


def main() -> None:
    directory, first, step, *lengths = sys.argv[1:]
    serve(directory, ListFs(int(first), int(step), names_of([int(n) for n in lengths])).answer)


if __name__ == "__main__":
    main()
