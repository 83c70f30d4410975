"""A name that is not in the host's memory keeps nobody waiting but who asks for it.

The slowness is real: the share is a FUSE file system of the test's own, which answers some requests only
once a gate is opened. To look such a name up there, any program waits.
"""

import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import StartDaemon

from vfsd.fuse import abi
from vfsd.fuse.opcodes import NUMBER
from vfsd.guest.bridge import mounting
from vfsd.guest.driver._transport import Transport
from vfsd.guest.driver.device import Device

INIT = struct.pack("=IIIII44x", 7, 45, 131072, 0x73FFFFFB, 0x5FD)
IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
STATFS = struct.Struct("=QQQQQIIII24x")
ATTR_OUT = 104
WAIT_S = 20
NAMES = {b"known": 2, b"cold": 3, b"directory": 4}  # nodeids, also the inodes' numbers
OPENS = {NUMBER["OPEN"], NUMBER["OPENDIR"]}
SILENT = {NUMBER["FORGET"], NUMBER["BATCH_FORGET"]}
EMPTY = {NUMBER["RELEASE"], NUMBER["RELEASEDIR"], NUMBER["FLUSH"]}


def attr(node: int) -> bytes:
    mode = stat.S_IFREG | 0o644 if node in (2, 3) else stat.S_IFDIR | 0o755
    return abi.ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def listing(node: int, offset: int) -> bytes:
    """READDIR: the root has all names, the directory none."""
    records = b""
    for at, (name, number) in enumerate(NAMES.items() if node == abi.ROOT_ID else ()):
        if at >= offset:
            records += abi.DIRENT.pack(number, at + 1, len(name), 0) + name.ljust(-len(name) // 8 * -8, b"\0")
    return records


def answer(opcode: int, node: int, args: bytes) -> bytes | int:
    """The body of a reply, or an errno."""
    if opcode == NUMBER["INIT"]:
        return abi.INIT_OUT.pack(7, 31, 0, 0, 16, 12, 1 << 20, 1, 0, 0, 0)
    if opcode == NUMBER["LOOKUP"]:
        found = NAMES.get(args.rstrip(b"\0"), 0)
        return struct.pack("=QQQQII", found, 0, 3600, 3600, 0, 0) + attr(found) if found else 2
    if opcode == NUMBER["GETATTR"]:
        return struct.pack("=QII", 3600, 0, 0) + attr(node)
    if opcode == NUMBER["READDIR"]:
        return listing(node, abi.READ_IN.unpack_from(args)[1])
    if opcode == NUMBER["STATFS"]:
        return STATFS.pack(1, 1, 1, 1, 1, 4096, 255, 4096, 0)
    if opcode in OPENS:
        return abi.OPEN_OUT.pack(0, 0, 0)
    return b"" if opcode in EMPTY else 38  # ENOSYS


class Gated:
    """The file system. LOOKUP of "cold" and "directory", and READDIR of that, are answered by open_gate()."""

    def __init__(self, place: Path) -> None:
        self._fd = mounting.open_device()
        self._lock = threading.Lock()
        self._open = False
        self._held: list[bytes] = []
        self.place = place
        mounting.mount(self._fd, str(place), "gated", 0)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _gated(self, opcode: int, node: int, args: bytes) -> bool:
        if opcode == NUMBER["LOOKUP"]:
            return args.rstrip(b"\0") in (b"cold", b"directory")
        return opcode == NUMBER["READDIR"] and node == NAMES[b"directory"]

    def _reply(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        found = answer(opcode, node, request[IN_HEADER.size :])
        body, error = (b"", -found) if isinstance(found, int) else (found, 0)
        os.write(self._fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), error, unique) + body)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 21)
            except OSError:  # ENODEV: it has been unmounted
                return
            _, opcode, _, node, *_ = IN_HEADER.unpack_from(request)
            if opcode in SILENT:
                continue
            with self._lock:
                if not self._open and self._gated(opcode, node, request[IN_HEADER.size :]):
                    self._held.append(request)
                    continue
            self._reply(request)

    def open_gate(self) -> None:
        with self._lock:
            self._open = True
            held, self._held = self._held, []
        for request in held:
            self._reply(request)

    def close_gate(self) -> None:
        with self._lock:
            self._open = False

    def close(self) -> None:
        self.open_gate()
        mounting.unmount(str(self.place), mounting.MNT_DETACH)
        self._thread.join(WAIT_S)
        os.close(self._fd)


class Pending:
    """A request that has been sent."""

    def __init__(self, transport: Transport, opcode: str, nodeid: int, args: bytes, *, out: int = 0,
                 into: int = 0) -> None:  # fmt: skip
        self.end = threading.Event()
        self.error = 0
        self.out = self.data = b""
        transport.submit(self._done, NUMBER[opcode], nodeid, args, out=out, into=into, argvar=into > 0)

    def _done(self, error: int, out: bytes, data: bytes) -> None:
        self.error, self.out, self.data = error, out, data
        self.end.set()

    def wait(self) -> "Pending":
        assert self.end.wait(WAIT_S), "no reply"
        assert self.error == 0
        return self


class Guest:
    def __init__(self, socket: Path) -> None:
        self.device = Device.connect(socket)
        self.transport: Transport = self.device.transport
        self.transport.call(NUMBER["INIT"], 0, INIT, out=abi.INIT_OUT.size, argvar=True)

    def lookup(self, name: bytes) -> Pending:
        return Pending(self.transport, "LOOKUP", abi.ROOT_ID, name + b"\0", out=abi.ENTRY_OUT_SIZE)

    def nodeid(self, name: bytes) -> int:
        return int(struct.unpack_from("=Q", self.lookup(name).wait().out)[0])

    def opendir(self, nodeid: int) -> int:
        out = Pending(self.transport, "OPENDIR", nodeid, bytes(8), out=abi.OPEN_OUT.size).wait().out
        return int(abi.OPEN_OUT.unpack(out)[0])

    def read_directory(self, opcode: str, nodeid: int, fh: int, offset: int) -> Pending:
        args = abi.READ_IN.pack(fh, offset, 4096, 0, 0, 0, 0)
        return Pending(self.transport, opcode, nodeid, args, into=4096)

    def expect_served(self, nodeid: int) -> None:
        """The same queue has time for others."""
        for _ in range(50):
            Pending(self.transport, "GETATTR", nodeid, bytes(16), out=ATTR_OUT).wait()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Gated]:
    if os.geteuid() != 0 or not os.path.exists(mounting.DEVICE):
        pytest.skip(f"needs root and {mounting.DEVICE}")
    place = tmp_path / "gated"
    place.mkdir()
    gated = Gated(place)
    yield gated
    gated.close()


@pytest.fixture
def guest(slow: Gated, daemon: StartDaemon) -> Iterator[Guest]:
    guest = Guest(daemon(slow.place).socket)
    yield guest
    slow.open_gate()  # or what still waits could not be answered
    guest.device.remove()


def test_lookup(slow: Gated, guest: Guest) -> None:
    known = guest.nodeid(b"known")
    waiting = guest.lookup(b"cold")
    guest.expect_served(known)
    assert guest.nodeid(b"known") == known
    assert not waiting.end.is_set(), "the gate is closed: it can't have been done"
    slow.open_gate()
    ino = struct.unpack_from("=Q", waiting.wait().out, abi.ENTRY_OUT.size)[0]
    assert ino == NAMES[b"cold"]


def test_many_lookups_are_all_answered(slow: Gated, guest: Guest) -> None:
    known = guest.nodeid(b"known")
    waiting = [guest.lookup(b"cold") for _ in range(40)]
    guest.expect_served(known)
    assert not any(pending.end.is_set() for pending in waiting)
    slow.open_gate()
    assert len({pending.wait().out[:8] for pending in waiting}) == 1


def test_readdirplus_gives_what_it_has_and_waits_for_the_rest(slow: Gated, guest: Guest) -> None:
    known = guest.nodeid(b"known")
    fh = guest.opendir(abi.ROOT_ID)
    first = guest.read_directory("READDIRPLUS", abi.ROOT_ID, fh, 0).wait().data
    assert names_of(first) == [b"known"]
    waiting = guest.read_directory("READDIRPLUS", abi.ROOT_ID, fh, 1)
    guest.expect_served(known)
    assert not waiting.end.is_set()
    slow.open_gate()
    assert names_of(waiting.wait().data) == [b"cold", b"directory"]


@pytest.mark.parametrize("opcode", ["READDIR", "READDIRPLUS"])
def test_a_directory_that_came_from_the_disk_is_read_by_who_may_wait(
    slow: Gated, guest: Guest, opcode: str
) -> None:
    known = guest.nodeid(b"known")
    opened = guest.lookup(b"directory")
    guest.expect_served(known)
    slow.open_gate()
    nodeid = struct.unpack_from("=Q", opened.wait().out)[0]
    slow.close_gate()
    fh = guest.opendir(nodeid)
    waiting = guest.read_directory(opcode, nodeid, fh, 0)
    guest.expect_served(known)
    assert not waiting.end.is_set()
    slow.open_gate()
    assert waiting.wait().data == b""


def names_of(records: bytes) -> list[bytes]:
    """Of a READDIRPLUS reply."""
    found, at = [], 0
    while at < len(records):
        _, _, size, _ = abi.DIRENT.unpack_from(records, at + abi.ENTRY_OUT_SIZE)
        start = at + abi.ENTRY_OUT_SIZE + abi.DIRENT.size
        found.append(records[start : start + size])
        at = start + -size // 8 * -8
    return found
