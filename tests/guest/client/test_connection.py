"""INIT and requests: what is agreed, who waits, who is refused (A4, A10, A12 of the kernel's rules)."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from guests.daemon import eventually

from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest import Filesystem, mount_device
from vfsd.guest.client.connection import Connection

from .stub import FLAGS, StubDevice, attr, entry, init_out


@contextmanager
def connected(device: StubDevice, **arguments: Any) -> Iterator[Connection]:
    conn = Connection(device, **arguments)  # type: ignore[arg-type]
    conn.send_init()
    yield conn
    conn.destroy()


def mounted(device: StubDevice, **arguments: Any) -> Filesystem:
    return mount_device(device, **arguments)  # type: ignore[arg-type]


def answer_init(device: StubDevice, **reply: Any) -> None:
    device.transport.answers[Opcode.INIT] = lambda nodeid, args: init_out(**reply)


@pytest.mark.parametrize(
    ("queue_size", "offered", "agreed"), [(1024, 256, 256), (128, 256, 124), (8, 256, 4), (1024, 0, 1)]
)
def test_max_pages_is_limited_by_the_queue_size(queue_size: int, offered: int, agreed: int) -> None:
    device = StubDevice(queue_size)
    answer_init(device, max_pages=offered)
    with connected(device) as conn:
        conn.initialized.wait(10)
        assert conn.max_pages == agreed
        assert conn.name_max == (4095 if agreed > 1 else 1024)


def test_without_max_pages_there_are_32() -> None:
    stub = StubDevice()
    answer_init(stub, flags=FLAGS & ~Init.MAX_PAGES, max_write=1)
    with connected(stub) as conn:
        conn.initialized.wait(10)
        assert (conn.max_pages, conn.name_max, conn.max_write) == (32, 1024, 4096)


def test_flags2_count_only_with_init_ext() -> None:
    for ext in (Init.INIT_EXT, Init(0)):
        device = StubDevice()
        answer_init(device, flags=(FLAGS & ~Init.INIT_EXT) | ext | Init.ALLOW_IDMAP)
        with connected(device) as conn:
            conn.initialized.wait(10)
            assert conn.has(Init.ALLOW_IDMAP) == bool(ext)


@pytest.mark.parametrize(("minor", "flags2"), [(38, 0xF), (41, 0x1FF), (45, 0x5FF)])
def test_init_is_sent_as_linux_sends_it(minor: int, flags2: int) -> None:
    device, seen = StubDevice(), []

    def answer(_nodeid: int, args: bytes) -> bytes:
        seen.append(args)
        return init_out(minor=minor)

    device.transport.answers[Opcode.INIT] = answer
    with connected(device, minor=minor) as conn:
        conn.initialized.wait(10)
    assert abi.INIT_IN.unpack(seen[0]) == (7, minor, 131072, 0x7BFFFFFB, flags2)
    assert len(seen[0]) == 64


def test_an_unknown_minor_is_refused() -> None:
    with pytest.raises(OSError, match="minor 44") as caught:
        Connection(StubDevice(), minor=44)  # type: ignore[arg-type]
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("reply", ["error", "major", "short"])
def test_after_a_failed_init_requests_are_refused(reply: str) -> None:
    device = StubDevice()

    def answer(_nodeid: int, _args: bytes) -> bytes:
        if reply == "error":
            raise OSError(errno.EPROTO, "")
        return init_out(major=8) if reply == "major" else init_out()[:60]

    device.transport.answers[Opcode.INIT] = answer
    with mounted(device) as fs:
        fs.conn.initialized.wait(10)
        with pytest.raises(OSError) as caught:
            fs.stat("/")
        assert caught.value.errno == errno.ECONNREFUSED
    assert (Opcode.DESTROY, 0) not in device.transport.sent


def test_who_waits_for_a_failing_init_gets_enotconn() -> None:
    device = StubDevice()
    device.transport.hold = True
    answer_init(device, major=6)
    with connected(device) as conn:
        caught: list[OSError] = []

        def ask() -> None:
            try:
                conn.call(Opcode.STATFS, 1)
            except OSError as problem:
                caught.append(problem)

        waiting = threading.Event()
        event = conn.initialized
        conn.initialized = Watched(event, waiting)  # type: ignore[assignment]
        asker = threading.Thread(target=ask)
        asker.start()
        waiting.wait(10)
        device.transport.release()
        asker.join(10)
        assert caught[0].errno == errno.ENOTCONN


class Watched:
    """An event that tells when somebody waits for it."""

    def __init__(self, event: threading.Event, waiting: threading.Event) -> None:
        self._event = event
        self._waiting = waiting

    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()

    def wait(self) -> None:
        self._waiting.set()
        self._event.wait()


def test_no_more_than_max_background_requests_are_under_way() -> None:
    device = StubDevice()
    answer_init(device, max_background=3)
    with connected(device) as conn:
        conn.initialized.wait(10)
        device.transport.hold = True
        device.transport.answers[Opcode.FSYNC] = lambda nodeid, args: b""
        ended = threading.Semaphore(0)

        def submit() -> None:
            for _ in range(8):
                conn.background(lambda error, out, data: ended.release(), Opcode.FSYNC, 1)

        submitter = threading.Thread(target=submit)
        submitter.start()
        done = 0
        while done < 8:
            done += device.transport.release()
        submitter.join(10)
        for _ in range(8):
            assert ended.acquire(timeout=10)
        assert device.transport.running_max <= 3


def test_enosys_is_remembered() -> None:
    device = StubDevice()
    device.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(2 + len(args), valid=3600)
    device.transport.answers[Opcode.GETATTR] = lambda nodeid, args: abi.ATTR_OUT.pack(3600, 0, 0) + entry(
        nodeid, mode=stat.S_IFDIR | 0o755 if nodeid == 1 else stat.S_IFREG | 0o644
    )[abi.ENTRY_OUT.size :]  # fmt: skip
    with mounted(device) as fs:
        for _ in range(2):
            with fs.open("/file", "r+") as file:  # no OPEN, FLUSH or RELEASE either
                fs.fsync(file)
                for number, call in (
                    (errno.EOPNOTSUPP, lambda file=file: fs.fallocate(file, 0, 0, 1)),
                    (errno.EOPNOTSUPP, lambda: fs.getxattr("/file", "user.x")),
                    (errno.ENOTTY, lambda file=file: fs.ioctl(file, 0x5401)),
                    (errno.ENXIO, lambda file=file: fs.lseek(file, 5, 3)),
                    (errno.EINVAL, lambda: fs.rename("/file", "/another", 2)),
                    (errno.EOPNOTSUPP, lambda: fs.open("/", 0o20200001)),
                ):
                    with pytest.raises(OSError) as caught:
                        call()
                    assert caught.value.errno == number
            fs.syncfs()
            assert fs.birthtime_ns("/file") is None
    sent = [opcode for opcode, _ in device.transport.sent]
    for opcode in (Opcode.OPEN, Opcode.FLUSH, Opcode.FSYNC, Opcode.FALLOCATE, Opcode.GETXATTR, Opcode.IOCTL,
                   Opcode.LSEEK, Opcode.SYNCFS, Opcode.STATX, Opcode.TMPFILE):  # fmt: skip
        assert sent.count(opcode) == 1, opcode
    assert Opcode.RELEASE not in sent


def test_names_longer_than_name_max_are_refused_without_a_request() -> None:
    device = StubDevice()
    answer_init(device, max_pages=1)
    with mounted(device) as fs:
        fs.stat("/")
        with pytest.raises(OSError) as caught:
            fs.stat("/" + "n" * 1025)
        assert caught.value.errno == errno.ENAMETOOLONG
    assert Opcode.LOOKUP not in [opcode for opcode, _ in device.transport.sent]


def test_identity_is_hidden_if_the_daemon_allows_idmapped_mounts() -> None:
    device, seen = StubDevice(), {}
    answer_init(device, flags=FLAGS | Init.ALLOW_IDMAP)
    call = device.transport.call

    def watched(opcode: int, *arguments: Any, **named: Any) -> tuple[bytes, int]:
        seen[Opcode(opcode)] = named["uid"], named["gid"]
        return call(opcode, *arguments, **named)

    device.transport.call = watched  # type: ignore[method-assign]
    device.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(0)
    device.transport.answers[Opcode.MKDIR] = lambda nodeid, args: entry(5, mode=stat.S_IFDIR)
    with mounted(device) as fs:
        fs.mkdir("/dir")
    assert seen[Opcode.LOOKUP] == (0xFFFFFFFF, 0xFFFFFFFF)
    assert seen[Opcode.MKDIR][0] != 0xFFFFFFFF


def test_who_asks_for_holes_waits_for_what_others_write_back() -> None:
    """The daemon knows of no data before it has answered the WRITE."""
    device, written = StubDevice(), threading.Event()
    transport = device.transport
    answer_init(device, flags=FLAGS | Init.WRITEBACK_CACHE)

    def answer_write(_nodeid: int, _args: bytes) -> bytes:
        written.set()
        return abi.WRITE_OUT.pack(3, 0)

    def answer_lseek(_nodeid: int, _args: bytes) -> bytes:
        if not written.is_set():
            raise OSError(errno.ENXIO, "")
        return abi.LSEEK_OUT.pack(0)

    transport.answers |= {
        Opcode.LOOKUP: lambda _nodeid, _args: entry(2, valid=100),
        Opcode.OPEN: lambda _nodeid, _args: abi.OPEN_OUT.pack(1, 0, 0),
        Opcode.RELEASE: lambda _nodeid, _args: b"",
        Opcode.SETATTR: lambda nodeid, _args: abi.ATTR_OUT.pack(100, 0, 0) + attr(nodeid),
        Opcode.WRITE: answer_write,
        Opcode.LSEEK: answer_lseek,
    }
    found: list[int] = []
    with mounted(device) as fs, fs.open("/file", "r+") as file, fs.open("/file") as other:
        file.write(b"new")
        transport.hold = True
        writer = threading.Thread(target=lambda: fs.fsync(file))
        writer.start()
        assert eventually(lambda: transport.running == 1)
        reader = threading.Thread(target=lambda: found.append(other.seek(0, os.SEEK_DATA)))
        reader.start()
        reader.join(0.3)  # it has its answer by then, if it asks before
        transport.hold = False
        transport.release()
        writer.join()
        reader.join()
    assert found == [0]
