"""Frames between a kernel and a device, each played by the test: what is carried, and how it lies.

The kernel's side is one end of a socket pair that keeps packets apart, as /dev/fuse does.
"""

import errno
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guests import eventually
from mounts import readable
from scripted import IN_HEADER, OUT_HEADER, Answer, Frame, Scripted

from vfsd.fuse.shapes import SHAPES
from vfsd.guest.bridge._bridge import Bridge
from vfsd.guest.driver.device import Device

KERNEL_FLAGS, KERNEL_FLAGS2 = 0x73FFFFFB, 0x5FD | 7 << 9  # Linux 6.18, and the newest three bits
SPLICE = 7 << 7
MAX_PAGES, INIT_EXT = 1 << 22, 1 << 30
FORGET, INIT, INTERRUPT, BATCH_FORGET = 2, 26, 36, 42
UNIQUE = 1002


class Kernel:
    """One thread of a bridge, its kernel's side and the device."""

    def __init__(self, directory: Path, queue_size: int = 1024, slots: int = 16) -> None:
        self.device = Scripted(directory / "socket")
        self.guest = Device.connect(directory / "socket", queue_size=queue_size, slots=slots)
        self.side, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.side.settimeout(10)
        for end in (self.side, self.other):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        self.init_fd, self.end_fd = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        self.bridge = Bridge(self.guest.transport, [self.other.fileno()], self.init_fd, self.end_fd)
        self.thread = threading.Thread(target=self.bridge.run, args=(0,))
        self.thread.start()

    def close(self) -> None:
        self.side.close()
        self.thread.join()
        assert os.eventfd_read(self.end_fd) == 1
        assert self.bridge.running == 0
        self.guest.transport.abort(errno.EIO)  # whatever a test that failed has left on the way
        self.guest.remove()
        self.device.close()
        self.other.close()
        os.close(self.init_fd)
        os.close(self.end_fd)

    def send(self, opcode: int, arguments: bytes = b"", unique: int = UNIQUE, nodeid: int = 7) -> None:
        header = IN_HEADER.pack(40 + len(arguments), opcode, unique, nodeid, 1, 2, 3, 0, 0)
        self.side.send(header + arguments)

    def receive(self) -> tuple[int, int, bytes]:
        """unique, error and body of a reply."""
        reply = self.side.recv(8 << 20)
        length, error, unique = OUT_HEADER.unpack_from(reply)
        assert length == len(reply)
        return unique, error, reply[16:]

    def ask(self, opcode: int, arguments: bytes = b"") -> tuple[int, bytes, Frame]:
        """Error and body of the reply, and the frame the device got."""
        self.send(opcode, arguments)
        unique, error, body = self.receive()
        assert unique == UNIQUE
        return error, body, self.device.frames[-1]

    def agree(self, body: bytes) -> tuple[int, bytes, Frame]:
        self.device.answers[INIT] = always(body)
        arguments = struct.pack("=IIIII", 7, 45, 131072, KERNEL_FLAGS, KERNEL_FLAGS2) + bytes(44)
        found = self.ask(INIT, arguments)
        assert readable(self.init_fd, 10)  # said after the reply is out
        return found


def always(answer: bytes | int | None) -> Answer:
    return lambda frame: answer


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    it = Kernel(tmp_path)
    yield it
    it.close()


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Kernel]:
    """With queues of eight elements."""
    it = Kernel(tmp_path, queue_size=8)
    yield it
    it.close()


def init_out(
    flags: int, flags2: int = 0, max_write: int = 1 << 20, max_pages: int = 256, major: int = 7
) -> bytes:
    return struct.pack(
        "=IIIIHHIIHHIIH22x", major, 45, 131072, flags, 64, 48, max_write, 1, max_pages, 12, flags2, 1, 15
    )


# What the device finds and the room it gets, as Linux lays it out (virtio_fs_enqueue_req).
READ_IN = struct.pack("=QQIIQII", 1, 0, 8192, 0, 0, 0, 0)
WRITE_IN = struct.pack("=QQIIQII", 1, 0, 5000, 0, 0, 0, 0)
IOCTL_IN = struct.pack("=QIIQII", 1, 0, 0x5A004000, 0, 6656, 0)
LAYOUTS = {
    "LOOKUP": (b"ab\0", [40, 3], [16, 128]),
    "GETATTR": (bytes(16), [40, 16], [16, 104]),
    "STATFS": (b"", [40], [16, 80]),
    "READLINK": (b"", [40], [16, 4095]),
    "CREATE": (bytes(16) + b"ab\0", [40, 19], [16, 144]),
    "READ": (READ_IN, [40, 40], [16, 4096, 4096]),
    "WRITE": (WRITE_IN + os.urandom(5000), [40, 40, 4096, 904], [16, 8]),
    "READDIR": (READ_IN, [40, 40], [16, 4096, 4096]),
    "READDIRPLUS": (READ_IN, [40, 40], [16, 4096, 4096]),
    "SETXATTR": (bytes(8) + b"user.a\0" + os.urandom(65536), [40, 8 + 7 + 65536], [16]),
    "SYMLINK": (b"a" * 255 + b"\0" + b"b" * 4095 + b"\0", [40, 256 + 4096], [16, 128]),
    "GETXATTR": (struct.pack("=II", 65536, 0) + b"user.a\0", [40, 15], [16, 65536]),
    "LISTXATTR": (bytes(8), [40, 8], [16, 8]),
    "DESTROY": (b"", [40], [16]),
    "IOCTL": (IOCTL_IN + os.urandom(6656), [40, 32, 4096, 2560], [16, 16, 4096]),
    "RENAME": (bytes(8) + b"old\0new\0", [40, 16], [16]),
    "STATX": (bytes(24), [40, 24], [16, 288]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_elements_are_those_of_linux(kernel: Kernel, name: str) -> None:
    arguments, readable, writable = LAYOUTS[name]
    (opcode,) = [number for number, shape in SHAPES.items() if shape.name == name]
    body = random.Random(opcode).randbytes(sum(writable) - 16)
    kernel.device.answers[opcode] = always(body)
    error, found, frame = kernel.ask(opcode, arguments)
    assert (error, found) == (0, body)
    assert frame == Frame(opcode, UNIQUE, 7, arguments, 1, readable, writable)


def test_the_table_of_shapes_agrees(kernel: Kernel) -> None:
    """What the guest's own client computes from it is what the bridge does."""
    for shape in SHAPES.values():
        if shape.name in LAYOUTS:
            arguments, _, writable = LAYOUTS[shape.name]
            out_args, out_pages, _ = shape.room(arguments)
            assert out_args + out_pages == sum(writable) - 16, shape.name


def test_short_replies_come_through(kernel: Kernel) -> None:
    for opcode, arguments, body in (
        (15, READ_IN, b"x" * 5000),
        (15, READ_IN, b""),
        (5, b"", b"target"),
        (22, struct.pack("=II", 100, 0) + b"user.a\0", b"value"),
        (39, IOCTL_IN + bytes(6656), bytes(16) + b"data"),
        (39, IOCTL_IN + bytes(6656), bytes(16)),
    ):
        kernel.device.answers[opcode] = always(body)
        assert kernel.ask(opcode, arguments)[:2] == (0, body)


def test_errors_come_through(kernel: Kernel) -> None:
    for error in (-1, -errno.ENOENT, -511):
        kernel.device.answers[1] = always(error)
        assert kernel.ask(1, b"a\0")[:2] == (error, b"")


@pytest.mark.parametrize(
    "lie",
    [
        lambda right: right[:-1],
        lambda right: struct.pack("=I", len(right) + 1) + right[4:],
        lambda right: right[:8] + struct.pack("=Q", UNIQUE + 2) + right[16:],
        lambda right: right[:4] + struct.pack("=i", -2) + right[8:],
        lambda right: right[:4] + struct.pack("=i", 5) + right[8:],
        lambda right: struct.pack("=IiQ", 16, -512, UNIQUE),
        lambda right: b"",
        lambda right: b"short",
    ],
    ids=["cut", "length", "unique", "body", "positive", "large", "empty", "short"],
)
def test_a_reply_that_is_none_is_an_io_error(kernel: Kernel, lie: Callable[[bytes], bytes]) -> None:
    kernel.device.answers[1] = always(bytes(128))
    kernel.device.raw[1] = lie
    assert kernel.ask(1, b"a\0")[:2] == (-errno.EIO, b"")
    del kernel.device.raw[1]
    assert kernel.ask(1, b"a\0")[:2] == (0, bytes(128))


def test_init_offers_nothing_that_is_not_carried(kernel: Kernel) -> None:
    everything = init_out(0xFFFFFFFF, 0xFFFFFFFF, 1 << 30, 65535)
    assert kernel.bridge.init is None
    error, body, frame = kernel.agree(everything)
    assert error == 0
    assert kernel.bridge.init == 0
    assert os.eventfd_read(kernel.init_fd) == 1
    assert (frame.readable, frame.writable) == ([40, 64], [16, 64])
    _, _, _, flags, flags2 = struct.unpack_from("=IIIII", frame.arguments)
    # HAS_EXPIRE_ONLY, PASSTHROUGH, HAS_RESEND, OVER_IO_URING, REQUEST_TIMEOUT, HAS_IO_URING_BUFPOOL
    assert flags == KERNEL_FLAGS & ~SPLICE
    assert flags2 == KERNEL_FLAGS2 & ~(1 << 3 | 1 << 5 | 1 << 7 | 7 << 9)
    fields = struct.unpack("=IIIIHHIIHHIIH22x", body)
    agreed, max_write, max_pages, alignment, agreed2, depth, timeout = (
        fields[3], *fields[6:7], *fields[8:13]
    )  # fmt: skip
    assert (agreed, agreed2) == (flags, flags2)
    assert (max_write, max_pages) == (1 << 20, 256)
    assert (alignment, depth, timeout) == (0, 0, 0)


def test_init_is_bound_by_the_queue(narrow: Kernel) -> None:
    """Also when the daemon leaves the number of pages to the kernel, which would take 32."""
    for flags in (MAX_PAGES | INIT_EXT, INIT_EXT, 0):
        error, body, _ = narrow.agree(init_out(flags))
        fields = struct.unpack("=IIIIHHIIHHIIH22x", body)
        assert error == 0
        assert fields[3] & MAX_PAGES
        assert (fields[6], fields[8]) == (4 * 4096, 4)


@pytest.mark.parametrize(
    "body", [init_out(0, major=8), b"\7\0\0\0", init_out(0) + b"more"], ids=["major-8", "short", "long"]
)
def test_an_init_that_is_none(kernel: Kernel, body: bytes) -> None:
    error, *_ = kernel.agree(body)
    assert error in (-errno.EPROTO, -errno.EIO)
    assert kernel.bridge.init == error


def test_init_of_an_old_minor(kernel: Kernel) -> None:
    """24 bytes up to minor 22, 8 below 5: they are passed on as short as they are."""
    whole = init_out(0, max_write=1 << 30)
    error, body, _ = kernel.agree(whole[:24])
    assert (error, len(body)) == (0, 24)
    assert struct.unpack_from("=I", body, 20) == (1 << 20,)
    assert kernel.agree(whole[:8])[:2] == (0, whole[:8])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 500])
def test_batches_of_forgets_become_single_ones(kernel: Kernel, count: int) -> None:
    items = [(100 + number, number + 1) for number in range(count)]
    kernel.send(BATCH_FORGET, struct.pack("=II", count, 0) + b"".join(struct.pack("=QQ", *i) for i in items))
    kernel.send(FORGET, struct.pack("=Q", 9), nodeid=9)
    assert eventually(lambda: len(kernel.device.of(FORGET)) == count + 1)
    frames = kernel.device.of(FORGET)
    assert sorted((f.nodeid, struct.unpack("=Q", f.arguments)[0]) for f in frames) == sorted([*items, (9, 9)])
    assert all((f.queue, f.readable, f.writable) == (0, [48], []) for f in frames)
    assert kernel.bridge.counters()["forgets"] == count + 1


def test_a_batch_that_is_shorter_than_it_says(kernel: Kernel) -> None:
    kernel.send(BATCH_FORGET, struct.pack("=IIQQQ", 1000, 0, 5, 1, 6))
    kernel.send(FORGET, struct.pack("=Q", 9), nodeid=9)
    assert eventually(lambda: len(kernel.device.of(FORGET)) == 2)
    assert {frame.nodeid for frame in kernel.device.of(FORGET)} == {5, 9}


def test_interrupts_are_answered_here(kernel: Kernel) -> None:
    kernel.send(INTERRUPT, struct.pack("=Q", UNIQUE), unique=UNIQUE | 1)
    assert kernel.receive() == (UNIQUE | 1, -errno.EAGAIN, b""), "nothing of that number is under way"
    assert kernel.device.frames == []
    assert kernel.bridge.counters()["interrupts"] == 1


@pytest.mark.parametrize("opcode", [0, 7, 19, 41, 54, 63, 64, 4096, 0xFFFFFFFF])
def test_opcodes_nobody_knows_are_answered_here(kernel: Kernel, opcode: int) -> None:
    kernel.send(opcode, bytes(100))
    assert kernel.receive() == (UNIQUE, -errno.ENOSYS, b"")
    assert kernel.device.frames == []


def test_what_no_queue_carries_is_refused(narrow: Kernel) -> None:
    for opcode, arguments, expected in (
        (15, struct.pack("=QQIIQII", 1, 0, 4 * 4096 + 1, 0, 0, 0, 0), errno.E2BIG),
        (15, struct.pack("=QQIIQII", 1, 0, 0xFFFFFFFF, 0, 0, 0, 0), errno.E2BIG),
        (22, struct.pack("=II", 0xFFFFFFFF, 0) + b"user.a\0", errno.E2BIG),
        (39, struct.pack("=QIIQII", 1, 0, 0, 0, 0, 0xFFFFFFFF), errno.E2BIG),
        (15, bytes(8), errno.EIO),
    ):
        narrow.send(opcode, arguments)
        assert narrow.receive() == (UNIQUE, -expected, b""), opcode
    assert narrow.device.frames == []
    assert narrow.bridge.counters()["refused"] == 5


def test_frames_that_are_none_are_dropped(kernel: Kernel) -> None:
    kernel.side.send(b"x")
    kernel.side.send(IN_HEADER.pack(41, 1, UNIQUE, 1, 0, 0, 0, 0, 0))
    kernel.device.answers[1] = always(bytes(128))
    assert kernel.ask(1, b"a\0")[:2] == (0, bytes(128))
    assert len(kernel.device.frames) == 1


def test_replies_out_of_order_reach_who_asked(kernel: Kernel) -> None:
    kernel.device.answers[5] = always(None)
    uniques = list(range(2, 22, 2))
    for unique in uniques:
        kernel.send(5, unique=unique)
    assert eventually(lambda: len(kernel.device.held) == len(uniques))
    order = random.Random(1).sample(kernel.device.held, len(uniques))
    for frame, reply in order:
        body = str(frame.unique).encode()
        reply(OUT_HEADER.pack(16 + len(body), 0, frame.unique) + body)
    assert [kernel.receive() for _ in order] == [(f.unique, 0, str(f.unique).encode()) for f, _ in order]


def test_a_device_that_goes_leaves_nobody_waiting(kernel: Kernel) -> None:
    kernel.device.answers[5] = always(None)
    for unique in (2, 4, 6):
        kernel.send(5, unique=unique)
    assert eventually(lambda: len(kernel.device.held) == 3)
    kernel.guest.transport.abort(errno.EIO)
    assert sorted(kernel.receive() for _ in range(3)) == [(u, -errno.ECONNABORTED, b"") for u in (2, 4, 6)]
    kernel.send(5, unique=8)
    assert kernel.receive() == (8, -errno.ECONNABORTED, b"")


def test_too_few_slots_or_pages(tmp_path: Path) -> None:
    with Scripted(tmp_path / "socket"):
        guest = Device.connect(tmp_path / "socket", slots=2)
        with pytest.raises(ValueError, match="2 slots for 2 threads"):
            Bridge(guest.transport, [0, 1], 0, 0)
        guest.remove()
