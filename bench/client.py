"""One request after the other, for all that is not timed: finding nodes, opening files, INIT."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.fuse.opcodes import NUMBER
from vfsd.fuse.shapes import SHAPES
from vfsd.guest.driver._transport import Transport
from vfsd.guest.driver.device import Device

from .fixture import FILES, SMALL, Tree
from .model import Failed, NotOffered
from .steps import Items

ENTRY_TIMES = struct.Struct("=QQQQII")  # nodeid, generation, entry_valid, attr_valid, and their ns
ATTR_TIMES = struct.Struct("=QI")
LISTING_BYTES = 1 << 17
POSIX_LOCKS, WRITEBACK_CACHE, HANDLE_KILLPRIV, CACHE_SYMLINKS = 1 << 1, 1 << 16, 1 << 19, 1 << 23
HANDLE_KILLPRIV_V2 = 1 << 28
# What Linux offers, but for answering opens with ENOSYS: then there would be nothing to measure.
OFFERED = (
    Init.ASYNC_READ | Init.BIG_WRITES | Init.AUTO_INVAL_DATA | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO | Init.ASYNC_DIO | Init.PARALLEL_DIROPS | Init.MAX_PAGES | Init.INIT_EXT
    | Init.ATOMIC_O_TRUNC
    | POSIX_LOCKS | HANDLE_KILLPRIV | CACHE_SYMLINKS | HANDLE_KILLPRIV_V2
)  # fmt: skip


class Entry(NamedTuple):
    """A reply to LOOKUP. Times in seconds."""

    nodeid: int
    entry_valid: float
    attr_valid: float


def seconds(whole: int, nanoseconds: int) -> float:
    return whole + nanoseconds / 1e9


@contextmanager
def answered(transport: Transport, seconds: float) -> Iterator[None]:
    """What is asked in here ends in Failed when there is no answer for so long in all."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        transport.abort(errno.ETIMEDOUT)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except OSError as problem:
        if late.is_set():
            raise Failed(f"no answer for {seconds:g} s") from problem
        raise
    finally:
        timer.cancel()


class Client:
    """A guest's first steps on a device. depth: operations that will be under way at a time.

    Raises OSError with the daemon's errno, Failed for an answer that can't be right.
    """

    def __init__(self, device: Device, tree: Tree, name: str, no_reply: float) -> None:
        self.device = device
        self.tree = tree
        self.name = name
        self.depth = 1
        self.flags = Init(0)
        self.no_reply = no_reply
        self._nodes: dict[str, int] = {}
        self._lists: dict[str, tuple[int, ...]] = {}
        self._handles: list[tuple[int, int]] = []
        self._patient = False

    def call(
        self, name: str, node: int, args: bytes = b"", into: bytearray | None = None
    ) -> tuple[bytes, int]:
        """One request: (out arguments, bytes written to `into`)."""
        shape = SHAPES[NUMBER[name]]
        out, _, argvar = shape.room(args)
        with self.patient():
            return self.device.transport.call(NUMBER[name], node, args, out=out, argvar=argvar, into=into)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """All that is asked in here has to be answered within the patience: for many short requests, which
        each by itself would take a thread to watch it. Failed."""
        if self._patient:
            yield
            return
        self._patient = True
        try:
            with answered(self.device.transport, self.no_reply):
                yield
        finally:
            self._patient = False

    def init(self, writeback: bool) -> None:
        """INIT as Linux sends it."""
        flags = OFFERED | (WRITEBACK_CACHE if writeback else 0)
        args = abi.INIT_IN_MIN.pack(abi.KERNEL_VERSION, abi.KERNEL_MINOR_VERSION, 1 << 17, flags & 0xFFFFFFFF)
        args += abi.INIT_FLAGS2.pack(flags >> 32) + bytes(44)
        with answered(self.device.transport, self.no_reply):
            reply, _ = self.device.transport.call(NUMBER["INIT"], 0, args, out=abi.INIT_OUT.size, argvar=True)
        if len(reply) < 24:
            raise Failed(f"INIT was answered with {len(reply)} bytes")
        major, minor, _, low = struct.unpack_from("=IIII", reply)
        if major != abi.KERNEL_VERSION:
            raise Failed(f"INIT was answered with version {major}.{minor}")
        high = struct.unpack_from("=I", reply, 32)[0] if len(reply) >= 36 else 0
        self.flags = Init(low | (high << 32 if low & Init.INIT_EXT else 0))

    def lookup(self, parent: int, name: str) -> Entry:
        reply, _ = self.call("LOOKUP", parent, name.encode() + b"\0")
        nodeid, _, entry, attr, entry_ns, attr_ns = ENTRY_TIMES.unpack_from(reply)
        if not nodeid:
            raise OSError(errno.ENOENT, "no such entry", name)
        return Entry(nodeid, seconds(entry, entry_ns), seconds(attr, attr_ns))

    def node(self, path: str) -> int:
        """Of a path below the served directory; asked for once."""
        if path not in self._nodes:
            parent, _, name = path.rpartition("/")
            self._nodes[path] = self.lookup(self.node(parent) if parent else abi.ROOT_ID, name).nodeid
        return self._nodes[path]

    def directory(self, name: str) -> int:
        """Of a directory, or file, all read."""
        self.tree.part(name)
        return self.node(f"common/{name}")

    @property
    def own(self) -> int:
        """The directory of this contestant."""
        return self.node(self.name)

    @property
    def file(self) -> int:
        """A file of 8 KiB of its own."""
        return self.node(f"{self.name}/file")

    def _numbered(self, parent: int, letter: str, count: int) -> tuple[int, ...]:
        with self.patient():
            return tuple(self.lookup(parent, f"{letter}{number:08x}").nodeid for number in range(count))

    def files(self) -> Items:
        """The files all read, known from now on."""
        if "files" not in self._lists:
            self._lists["files"] = self._numbered(self.directory("files"), "f", FILES)
        return Items(FILES, self._lists["files"])

    def directories(self, name: str) -> Items:
        """The directories to list, known from now on."""
        if name not in self._lists:
            count = SMALL if name.startswith("small") else 1
            self._lists[name] = self._numbered(self.directory(name), "d", count)
        return Items(len(self._lists[name]), self._lists[name])

    def make_names(self, letter: bytes) -> tuple[int, ...]:
        """Files of its own, one for each operation under way."""
        letter_text = letter.decode()
        names = [f"{letter_text}{number:08x}" for number in range(self.depth)]
        for name in names:
            (self.tree.base / self.name / name).write_bytes(bytes(8192))
        return tuple(self.node(f"{self.name}/{name}") for name in names)

    def open(self, node: int, flags: int) -> tuple[int, int]:
        """(fh, open flags of the reply)"""
        reply, _ = self.call("OPEN", node, abi.OPEN_IN.pack(flags, 0))
        fh, shown, _ = abi.OPEN_OUT.unpack(reply)
        return fh, shown

    def opened(self, nodes: Sequence[int], count: int) -> list[tuple[int, int]]:
        """Open them in turn, so often in all, to read: node and handle of each."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            with self.patient():
                found += [(node, self.open(node, os.O_RDONLY)[0]) for node in nodes[: count - len(found)]]
        return found

    def released(self, opened: list[tuple[int, int]]) -> None:
        """All of them."""
        for at in range(0, len(opened), FILES):
            with self.patient():
                for node, fh in opened[at : at + FILES]:
                    self.release(node, fh)

    def release(self, node: int, fh: int, flags: int = 0, directory: bool = False) -> None:
        self.call("RELEASEDIR" if directory else "RELEASE", node, abi.RELEASE_IN.pack(fh, flags, 0, 0))

    def _open_kept(self, node: int, flags: int) -> tuple[int, int]:
        fh, _ = self.open(node, flags)
        self._handles.append((node, fh))
        return node, fh

    def open_big(self, flags: int) -> tuple[int, int]:
        """(node, fh) of the file all read."""
        return self._open_kept(self.directory("big"), flags)

    def open_own_big(self, flags: int) -> tuple[int, int]:
        self.tree.own_big(self.name)
        return self._open_kept(self.node(f"{self.name}/big"), flags)

    def close_all(self) -> None:
        """Release what a workload has opened."""
        while self._handles:
            self.release(*self._handles.pop())

    def expect_xattr(self, node: int) -> None:
        """NotOffered: the daemon, or the directory, has no extended attributes."""
        args = abi.GETXATTR_IN.pack(256, 0) + b"user.bench\0"
        try:
            self.call("GETXATTR", node, args)
        except OSError as problem:
            raise NotOffered(f"getxattr: {problem.strerror}") from problem

    def expect_readdirplus(self, opcode: str) -> None:
        if opcode == "READDIRPLUS" and not self.flags & Init.DO_READDIRPLUS:
            raise NotOffered("the daemon does not agree to readdirplus")

    def list_all(self, name: str) -> int:
        """Look up everything in the directories of that name: how many entries had a nodeid."""
        return sum(self.list_plus(node) for node in self.directories(name).nodes)

    def list_plus(self, node: int) -> int:
        reply, _ = self.call("OPENDIR", node, abi.OPEN_IN.pack(os.O_RDONLY | os.O_DIRECTORY, 0))
        fh = abi.OPEN_OUT.unpack(reply)[0]
        into = bytearray(LISTING_BYTES)
        offset = known = 0
        while True:
            args = abi.READ_IN.pack(fh, offset, len(into), 0, 0, 0, 0)
            size = self.call("READDIRPLUS", node, args, into)[1]
            if size == 0:
                break
            at = 0
            while at < size:
                known += into[at : at + 8] != bytes(8)
                _, offset, length, _ = abi.DIRENT.unpack_from(into, at + abi.ENTRY_OUT_SIZE)
                at += (abi.ENTRY_OUT_SIZE + abi.DIRENT.size + length + 7) & ~7
        self.release(node, fh, directory=True)
        return known

    def path(self, name: str) -> Path:
        """Of a file of its own, on the host."""
        return self.tree.base / self.name / name
