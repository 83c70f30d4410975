"""A FUSE file system whose inodes the server replaces, as a network's does: the same numbers, other files.

    python -m hostfs.stalefs DIRECTORY

Of old inodes it answers ESTALE to everything. Each line of standard input is an order, and done when DONE is
on standard output:

    replace         all but the root are other files and directories from now on, of the same numbers
    OPERATION       the next request of that name is answered ESTALE, once
"""

from __future__ import annotations

import errno
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfsd.fuse import abi
from vfsd.fuse.opcodes import NUMBER

from . import listfs

GENERATION = 1000  # node ids of one are its multiple and the inode's number
FILE, DIRECTORY, BELOW, OTHER = 100, 101, 102, 103
TREE = {abi.ROOT_ID: {b"file": FILE, b"dir": DIRECTORY, b"other": OTHER}, DIRECTORY: {b"below": BELOW}}


class StaleFs:
    def __init__(self) -> None:
        self.generation = 0
        self.once = 0  # opcode that is answered ESTALE

    def attr(self, number: int) -> bytes:
        is_directory = number in TREE
        mode = stat.S_IFDIR | 0o755 if is_directory else stat.S_IFREG | 0o644
        size = 0 if is_directory else len(self.content())
        return abi.ATTR.pack(number, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def entry(self, number: int) -> bytes:
        """Which no kernel keeps."""
        node = self.generation * GENERATION + number
        return struct.pack("=QQQQII", node, 0, 0, 0, 0, 0) + self.attr(number)

    def content(self) -> bytes:
        return b"%d" % self.generation

    def answer(self, opcode: int, node: int, args: bytes) -> bytes | int:
        """The body of a reply, or an errno."""
        generation, number = divmod(node, GENERATION)
        if opcode == NUMBER["INIT"]:
            return abi.INIT_OUT.pack(7, 31, 0, 0, 16, 12, 1 << 20, 1, 0, 0, 0)
        if opcode in listfs.EMPTY:
            return b""
        if opcode == NUMBER["STATFS"]:
            return abi.KSTATFS.pack(1, 1, 1, 1, 1, 4096, 1024, 4096, 0)
        if opcode == self.once:
            self.once = 0
            return errno.ESTALE
        if generation != self.generation and node != abi.ROOT_ID:
            return errno.ESTALE
        if opcode == NUMBER["LOOKUP"]:
            found = TREE[number].get(args.rstrip(b"\0"))
            return errno.ENOENT if found is None else self.entry(found)
        if opcode == NUMBER["GETATTR"]:
            return struct.pack("=QII", 0, 0, 0) + self.attr(number)
        if opcode in (NUMBER["OPEN"], NUMBER["OPENDIR"]):
            return abi.OPEN_OUT.pack(0, 0, 0)
        if opcode == NUMBER["READ"]:
            return self.content()
        if opcode == NUMBER["LINK"]:
            (old,) = struct.unpack_from("=Q", args)
            return errno.ESTALE if old // GENERATION != self.generation else self.entry(FILE)
        return errno.ENOSYS

    def obey(self) -> None:
        for line in sys.stdin:
            order = line.strip()
            if order == "replace":
                self.generation += 1
            else:
                self.once = NUMBER[order]
            print("DONE", flush=True)


class Mounted:
    """One that is there."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def order(self, order: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "DONE\n"


@contextmanager
def mounted(directory: Path) -> Iterator[Mounted]:
    with listfs.mounted(__name__, directory, spoken_to=True) as process:
        yield Mounted(process)


def main() -> None:
    served = StaleFs()
    threading.Thread(target=served.obey, daemon=True).start()
    listfs.serve(sys.argv[1], served.answer)


if __name__ == "__main__":
    main()
