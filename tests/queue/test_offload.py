"""A request that waits for the disk keeps nobody else waiting.

The slowness is real: ext4 on a loop device, frozen, so that a request that changes it waits until
it is thawed, however long that takes.
"""

import os
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from guests import StartDaemon, eventually

from vfsd.fuse import abi
from vfsd.fuse.opcodes import NUMBER
from vfsd.guest.driver._transport import Transport
from vfsd.guest.driver.device import Device

INIT = struct.pack("=IIIII44x", 7, 45, 131072, 0x73FFFFFB, 0x5FD)
ATTR_OUT = 104
WAIT_S = 20
SLOW_S = 0.1  # for a write: as if the kernel throttled it
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h
MANY = 4000  # requests of each thread
THREADS = 64  # that may wait at a time


def command(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of its own, mounted."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("needs root and loop devices")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    mounted.mkdir()
    command("mkfs.ext4", "-q", image)
    command("mount", "-o", "loop", image, mounted)
    yield mounted
    subprocess.run(["fsfreeze", "-u", str(mounted)], capture_output=True, check=False)
    command("umount", mounted)


class Share:
    """A device that shares the disk, with one open file."""

    def __init__(self, socket: Path) -> None:
        self.device = Device.connect(socket)
        self.transport: Transport = self.device.transport
        self.transport.call(NUMBER["INIT"], 0, INIT, out=abi.INIT_OUT.size, argvar=True)
        args = abi.CREATE_IN.pack(os.O_RDWR, 0o644, 0, 0) + b"file\0"
        reply, _ = self.transport.call(NUMBER["CREATE"], 1, args, out=144)
        self.nodeid = struct.unpack_from("=Q", reply)[0]
        self.fh = struct.unpack_from("=Q", reply, abi.ENTRY_OUT_SIZE)[0]
        self.ended: list[int] = []
        self.end = threading.Event()

    def _done(self, error: int, _out: bytes, _data: bytes) -> None:
        self.ended.append(error)
        self.end.set()

    def begin_fallocate(self) -> None:
        args = abi.FALLOCATE_IN.pack(self.fh, 0, 65536, 0, 0)
        self.transport.submit(self._done, NUMBER["FALLOCATE"], self.nodeid, args)

    def begin_sync_write(self) -> None:
        args = abi.WRITE_IN.pack(self.fh, 0, 4096, 0, 0, os.O_DSYNC, 0)
        self.transport.submit(self._done, NUMBER["WRITE"], self.nodeid, args, data=bytes(4096), out=8)

    def begin_write(self) -> None:
        args = abi.WRITE_IN.pack(self.fh, 0, 4096, 0, 0, 0, 0)
        self.transport.submit(self._done, NUMBER["WRITE"], self.nodeid, args, data=bytes(4096), out=8)

    def getattr(self) -> None:
        """Fails when it is not answered: the queue waits for something."""
        answered = threading.Event()
        self.transport.submit(
            lambda _error, _out, _data: answered.set(),
            NUMBER["GETATTR"],
            self.nodeid,
            bytes(16),
            out=ATTR_OUT,
        )
        assert answered.wait(WAIT_S)


@pytest.mark.parametrize("begin", [Share.begin_fallocate, Share.begin_sync_write])
def test_the_same_queue_goes_on_while_a_request_waits(
    disk: Path, daemon: StartDaemon, begin: Callable[[Share], None]
) -> None:
    share = Share(daemon(disk).socket)
    command("fsfreeze", "-f", disk)
    begin(share)
    for _ in range(100):
        share.getattr()
    assert not share.ended, "the disk is frozen: it can't have been done"
    command("fsfreeze", "-u", disk)
    assert share.end.wait(WAIT_S)
    assert share.ended == [0]
    assert (disk / "file").stat().st_size in (4096, 65536)
    share.device.remove()


def test_where_a_write_was_slow_the_next_ones_keep_nobody_waiting(disk: Path, daemon: StartDaemon) -> None:
    share = Share(daemon(disk).socket)
    root = os.open(disk, os.O_RDONLY)
    try:
        ioctl(root, FIFREEZE, 0)
        share.begin_write()
        time.sleep(SLOW_S)
        ioctl(root, FITHAW, 0)
        assert share.end.wait(WAIT_S)
        ioctl(root, FIFREEZE, 0)
        for _ in range(3):
            share.begin_write()
            share.getattr()
        assert share.ended == [0], "the disk is frozen: the others can't have been done"
    finally:
        ioctl(root, FITHAW, 0)
        os.close(root)
    share.transport.drain()
    assert share.ended == [0] * 4
    share.device.remove()


@pytest.mark.parametrize("n", [50, THREADS + 40])
def test_many_waiting_requests_are_all_answered(disk: Path, daemon: StartDaemon, n: int) -> None:
    share = Share(daemon(disk).socket)
    command("fsfreeze", "-f", disk)
    for _ in range(n):
        share.begin_fallocate()
    for _ in range(100):
        share.getattr()
    assert not share.ended
    command("fsfreeze", "-u", disk)
    share.transport.drain()
    assert share.ended == [0] * n
    share.device.remove()


def test_replies_of_the_pool_and_the_queue_lose_none(daemon: StartDaemon, tmp_path: Path) -> None:
    """Both write the used ring: a reply that overwrote another one would leave its request without any."""
    share = Share(daemon(tmp_path).socket)
    counted = Counter[str]()
    lock = threading.Lock()

    def ask(what: str, args: bytes, out: int) -> None:
        def done(error: int, _out: bytes, _data: bytes) -> None:
            with lock:
                counted[what if error == 0 else os.strerror(error)] += 1

        for _ in range(MANY):
            share.transport.submit(done, NUMBER[what], share.nodeid, args, out=out)

    asked = (
        ("FALLOCATE", abi.FALLOCATE_IN.pack(share.fh, 0, 4096, 0, 0), 0),
        ("FALLOCATE", abi.FALLOCATE_IN.pack(share.fh, 4096, 4096, 0, 0), 0),
        ("GETATTR", bytes(16), ATTR_OUT),
        ("GETATTR", bytes(16), ATTR_OUT),
    )
    threads = [threading.Thread(target=ask, args=one) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    end = time.monotonic() + WAIT_S
    while counted.total() < len(asked) * MANY and time.monotonic() < end:
        share.getattr()
    assert counted == {"FALLOCATE": 2 * MANY, "GETATTR": 2 * MANY}
    share.transport.drain()
    share.device.remove()


def test_a_guest_that_leaves_with_a_request_waiting_is_cleaned_up(disk: Path, daemon: StartDaemon) -> None:
    server = daemon(disk)
    before = server.descriptors()
    share = Share(server.socket)
    command("fsfreeze", "-f", disk)
    share.begin_fallocate()
    share.getattr()
    share.device._lost("the test says so")  # ends the request here: nothing is waited for
    share.device.remove()
    assert share.ended != [0]
    command("fsfreeze", "-u", disk)
    assert eventually(lambda: server.descriptors() == before, WAIT_S)
    again = Share(server.socket)
    again.getattr()
    again.device.remove()


def test_a_read_of_what_is_not_cached_gives_the_right_bytes(disk: Path, daemon: StartDaemon) -> None:
    content = os.urandom(1 << 20)
    with (disk / "cold").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    share = Share(daemon(disk).socket)
    reply, _ = share.transport.call(NUMBER["LOOKUP"], 1, b"cold\0", out=abi.ENTRY_OUT_SIZE)
    nodeid = struct.unpack_from("=Q", reply)[0]
    reply, _ = share.transport.call(NUMBER["OPEN"], nodeid, bytes(8), out=abi.OPEN_OUT.size)
    fh = struct.unpack_from("=Q", reply)[0]
    end = 1 << 20
    for size, offset in ((4096, 0), (131072, 4096), (end, 0), (end, 1000), (4096, end), (10, end - 5)):
        with (disk / "cold").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        into = bytearray(size)
        _, n = share.transport.call(
            NUMBER["READ"], nodeid, abi.READ_IN.pack(fh, offset, size, 0, 0, 0, 0), into=into, argvar=True
        )
        assert bytes(into[:n]) == content[offset : offset + size]
    share.device.remove()


def test_no_more_requests_wait_at_once_than_the_operator_allows(disk: Path, daemon: StartDaemon) -> None:
    served = daemon(disk, options=["--thread-pool-size", "2"])
    share = Share(served.socket)
    before = threads_below(served.pid)
    command("fsfreeze", "-f", disk)
    for _ in range(20):
        share.begin_fallocate()
    for _ in range(100):
        share.getattr()
    assert threads_below(served.pid) <= before + 2 + 1  # the queue's second one comes too
    command("fsfreeze", "-u", disk)
    assert eventually(lambda: share.ended == [0] * 20, WAIT_S)
    assert eventually(lambda: threads_below(served.pid) <= before + 1, WAIT_S)  # the pool's end when idle
    share.device.remove()


def threads_below(pid: int) -> int:
    """Of a daemon's server."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(len(os.listdir(f"/proc/{child}/task")) for child in children)
