"""Front ends that break the protocol: their connection ends with one line, the daemon lives."""

import contextlib
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfsd.vhost import messages
from vfsd.vhost.frontend import Frontend
from vfsd.vhost.messages import (
    HEADER,
    SINGLE_REGION,
    U64,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    Region,
    VirtioFeature,
    encode,
)
from vfsd.vhost.messages import FrontendRequest as F

from .peers import DEADLINE_S, Daemon, Driver, Guest, Wire

LEFT = "the front end has left"


def drain(sock: socket.socket) -> None:
    """Read until the daemon has closed its end."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass


class Witness:
    """A front end that does nothing wrong."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.frontend = Frontend(daemon.connect(), DEADLINE_S)
        self.frontend.get_features()
        daemon.wait_line("has connected")
        self.fds = daemon.fd_count()
        daemon.take_lines()

    def outcome(self, wire: Wire, shutdown: bool = True) -> str:
        """How the connection of a front end ended that sends this, and then nothing more."""
        with self.daemon.connect() as sock:
            with contextlib.suppress(messages.PeerClosed):
                for data, fds in wire:
                    messages.send(sock, data, fds)
            if shutdown:
                with contextlib.suppress(OSError):  # not connected, if the daemon was faster
                    sock.shutdown(socket.SHUT_WR)
            drain(sock)
        return self.check()

    def check(self) -> str:
        """The one line about the connection that ended; nothing is left of it."""
        line = self.daemon.wait_line("", but="has connected")
        with self.daemon.connect() as sock:
            fresh = Frontend(sock, DEADLINE_S)
            assert VirtioFeature.VERSION_1 in fresh.get_features()
            sock.shutdown(socket.SHUT_WR)
            sock.setblocking(True)
            drain(sock)
        self.frontend.get_features()
        assert LEFT in self.daemon.wait_line("", but="has connected")
        assert self.daemon.fd_count() == self.fds
        assert self.daemon.take_lines() == []
        return line


@pytest.fixture(scope="module")
def witness(daemon: Daemon) -> Iterator[Witness]:
    witness = Witness(daemon)
    yield witness
    witness.frontend.close()


def message(request: int, payload: bytes = b"", *fds: int) -> tuple[bytes, list[int]]:
    return encode(request, payload), list(fds)


def table(guest: Guest, *regions: Region) -> tuple[bytes, list[int]]:
    return message(F.SET_MEM_TABLE, messages.encode_mem_table(regions), *[guest.fd] * len(regions))


# ---- single messages

PAST_LIMIT = messages.PAYLOAD_MAX + 1

BROKEN_BYTES = [
    (HEADER.pack(1, 0, 0), "GET_FEATURES: version 0, not 1"),
    (HEADER.pack(1, 3, 0), "GET_FEATURES: version 3, not 1"),
    (HEADER.pack(1, 5, 0), "GET_FEATURES: a reply where a request belongs"),
    (HEADER.pack(2, 1, 7) + bytes(7), "SET_FEATURES: 7 bytes of payload, not 8"),
    (HEADER.pack(2, 1, 9) + bytes(9), "SET_FEATURES: 9 bytes of payload, not 8"),
    (HEADER.pack(5, 1, 265) + bytes(265), "SET_MEM_TABLE: 265 bytes of payload, not 8 to 264"),
    (HEADER.pack(9, 1, 0xFFFFFFFF), "SET_VRING_ADDR: 4294967295 bytes of payload, not 40"),
    (HEADER.pack(999, 1, PAST_LIMIT), "message 999: 4097 bytes of payload, not 0 to 4096"),
    (encode(F.SET_FEATURES, U64.pack(1 << 63)), "SET_FEATURES: bits 0x8000000000000000 were not"),
    (encode(F.SET_PROTOCOL_FEATURES, U64.pack(1 << 22)), "SET_PROTOCOL_FEATURES: bits 0x400000"),
    (encode(F.SET_VRING_NUM, VRING_STATE.pack(1, 100)), "queue 1: size 100 is no power of two"),
    (encode(F.SET_VRING_NUM, VRING_STATE.pack(1, 0)), "queue 1: size 0 is not 1 to 32768"),
    (encode(F.SET_VRING_NUM, VRING_STATE.pack(1, 1 << 31)), "queue 1: size 2147483648 is not"),
    (encode(F.SET_VRING_NUM, VRING_STATE.pack(9, 64)), "SET_VRING_NUM: queue 9: there are 9"),
    (encode(F.SET_VRING_BASE, VRING_STATE.pack(0, 1 << 16)), "queue 0: index 65536"),
    (encode(F.SET_VRING_ENABLE, VRING_STATE.pack(0, 3)), "queue 0: 3 is neither 0 nor 1"),
    (encode(F.GET_VRING_BASE, VRING_STATE.pack(1 << 31, 0)), "queue 2147483648: there are 9"),
    (encode(F.SET_VRING_KICK, U64.pack(1)), "SET_VRING_KICK: queue 1: no descriptor"),
    (encode(F.SET_VRING_KICK, U64.pack(1 | VRING_NO_FD)), "queue 1: no descriptor, rings are not"),
    (encode(F.SET_VRING_CALL, U64.pack(1)), "SET_VRING_CALL: queue 1: no descriptor"),
    (encode(F.SET_VRING_ERR, U64.pack(1 << 40)), "SET_VRING_ERR: queue 0: unknown bits"),
    (encode(F.SET_BACKEND_REQ_FD), "SET_BACKEND_REQ_FD: no descriptor"),
    (encode(F.ADD_MEM_REG, bytes(40)), "ADD_MEM_REG: no descriptor"),
    (encode(F.REM_MEM_REG, bytes(40)), "REM_MEM_REG: no memory region"),
    (encode(F.SET_MEM_TABLE, struct.pack("=I4x", 9) + bytes(256)), "9 regions, at most 8"),
    (encode(F.SET_MEM_TABLE, struct.pack("=I4x", 3) + bytes(64)), "3 regions take 104"),
    (encode(F.SET_MEM_TABLE, struct.pack("=I4x", 2) + bytes(64)), "2 regions with 0 descriptors"),
    (encode(F.GET_INFLIGHT_FD, bytes(24)), "GET_INFLIGHT_FD: INFLIGHT_SHMFD was not offered"),
    (encode(F.CHECK_DEVICE_STATE), "CHECK_DEVICE_STATE: DEVICE_STATE was not offered"),
]


@pytest.mark.parametrize(("data", "text"), BROKEN_BYTES, ids=[text for _, text in BROKEN_BYTES])
def test_a_broken_message_ends_its_connection(witness: Witness, data: bytes, text: str) -> None:
    line = witness.outcome([(data, [])], shutdown=False)
    assert text in line
    assert data == HEADER.pack(999, 1, PAST_LIMIT) or F(data[0]).name in line


@pytest.mark.parametrize(
    ("request_id", "payload", "n", "text"),
    [
        (F.GET_FEATURES, b"", 1, "GET_FEATURES: 1 descriptors, at most 0"),
        (F.SET_VRING_CALL, U64.pack(0), 2, "SET_VRING_CALL: 2 descriptors, at most 1"),
        (F.SET_VRING_KICK, U64.pack(VRING_NO_FD), 1, "a descriptor, and the bit for none"),
        (F.SET_BACKEND_REQ_FD, b"", 8, "SET_BACKEND_REQ_FD: 8 descriptors, at most 1"),
        (F.SET_OWNER, b"", 9, "message with more than 8 descriptors"),
        (F.SET_OWNER, b"", 200, "message with more than 8 descriptors"),
        (F.SET_VRING_KICK, U64.pack(0), 1, "queue 0: unusable descriptor"),  # a regular file
    ],
)
def test_descriptors_that_cannot_be_are_closed(
    witness: Witness, guest: Guest, request_id: F, payload: bytes, n: int, text: str
) -> None:
    assert text in witness.outcome([message(request_id, payload, *[guest.fd] * n)], shutdown=False)


def test_descriptors_of_unknown_messages_are_closed(witness: Witness, guest: Guest) -> None:
    wire = [message(request, b"", *[guest.fd] * 8) for request in (0, 45, 1002, 0xFFFFFFFF)]
    assert LEFT in witness.outcome(wire)


# ---- memory

MIB = 1 << 20


@pytest.mark.parametrize(
    "region",
    [
        Region(MIB, 0, MIB, 0),
        Region(0, MIB, 0, 1),
        Region(0, MIB + 1, 0, 0),
        Region(0, 1 << 63, 0, 0),
        Region(0, MIB, 0, (1 << 64) - 1),
        Region((1 << 64) - 4096, MIB, 0, 0),
        Region(0, MIB, (1 << 64) - 4096, 0),
    ],
)
def test_memory_that_cannot_be(witness: Witness, guest: Guest, region: Region) -> None:
    good = Region(1 << 40, MIB, 1 << 40, 0)
    assert "SET_MEM_TABLE: region 1" in witness.outcome([table(guest, good, region)], False)
    single = message(F.ADD_MEM_REG, SINGLE_REGION.pack(*region), guest.fd)
    assert "ADD_MEM_REG: region" in witness.outcome([table(guest, good), single], False)


def test_memory_that_overlaps(witness: Witness, guest: Guest) -> None:
    here, there = Region(0, MIB, 0, 0), Region(MIB - 4096, MIB, 1 << 40, 0)
    assert "region 1" in witness.outcome([table(guest, here, there)], False)


def test_memory_from_descriptors_that_have_none(witness: Witness, guest: Guest) -> None:
    read_only = os.open(f"/proc/self/fd/{guest.fd}", os.O_RDONLY)
    ours, theirs = socket.socketpair()
    payload = SINGLE_REGION.pack(0, MIB, 0, 0)
    with ours, theirs:
        for fd in (read_only, guest.kicks[0][0], ours.fileno()):
            line = witness.outcome([message(F.ADD_MEM_REG, payload, fd)], shutdown=False)
            assert "ADD_MEM_REG: region (gpa 0x0)" in line
    os.close(read_only)


# ---- rings


@pytest.mark.parametrize(
    ("desc", "used", "avail"),
    [
        (MIB, 0x2000, 0x1000),
        (0, MIB, 0x1000),
        (0, 0x2000, MIB),
        (MIB - 512, 0x2000, 0x1000),  # begins inside, ends outside
        (8, 0x2000, 0x1000),  # not aligned
        (0, 0x2002, 0x1000),
        (0, 0x2000, 0x1001),
        (1 << 63, 1 << 63, 1 << 63),
    ],
)
def test_rings_that_are_not_in_memory(
    witness: Witness, guest: Guest, desc: int, used: int, avail: int
) -> None:
    uva = guest.region.uva
    wire = [
        message(F.SET_FEATURES, U64.pack(1 << 32)),
        table(guest, guest.region),
        message(F.SET_VRING_NUM, VRING_STATE.pack(1, 64)),
        message(F.SET_VRING_ADDR, VRING_ADDR.pack(1, 0, uva + desc, uva + used, uva + avail, 0)),
        message(F.SET_VRING_KICK, U64.pack(1), guest.kicks[1][1]),
    ]
    line = witness.outcome(wire, shutdown=False)
    assert "SET_VRING_KICK: queue 1: " in line


def test_memory_taken_from_under_a_ring(
    witness: Witness, guest: Guest, record: Callable[[str], Wire]
) -> None:
    wire = [*record("crosvm"), table(guest, Region(0, 4096, 0, 0))]
    assert "SET_MEM_TABLE: queue 0: " in witness.outcome(wire, shutdown=False)


def test_a_running_ring_that_is_changed(witness: Witness, record: Callable[[str], Wire]) -> None:
    wire = [*record("crosvm"), message(F.SET_VRING_NUM, VRING_STATE.pack(1, 32))]
    assert "queue 1: size changes" in witness.outcome(wire, shutdown=False)


# ---- streams


def cut(wire: Wire, size: int) -> Wire:
    """The first `size` bytes."""
    kept: Wire = []
    for data, fds in wire:
        if size > 0:
            kept.append((data[:size], fds))
        size -= len(data)
    return kept


@pytest.mark.parametrize("order", ["qemu", "crosvm", "uml"])
def test_a_connection_closed_after_any_byte(
    witness: Witness, record: Callable[[str], Wire], order: str
) -> None:
    wire = record(order)
    ends, end = {0}, 0
    for data, _ in wire:
        end += len(data)
        ends.add(end)
    for size in range(end + 1):
        line = witness.outcome(cut(wire, size))
        assert (LEFT if size in ends else "connection closed after") in line, (size, line)


@pytest.mark.parametrize("seed", range(40))
def test_garbage(witness: Witness, seed: int) -> None:
    data = random.Random(seed).randbytes(4096)
    assert "version" in witness.outcome([(data, [])]) or data[4] & 3 == 1


@pytest.mark.parametrize("seed", range(40))
def test_garbage_after_good_headers(witness: Witness, guest: Guest, seed: int) -> None:
    """Known messages of the right size, with numbers and descriptors that mean nothing."""
    source = random.Random(seed)
    fds = [guest.fd, *guest.kicks[0], *guest.calls[1]]
    wire = []
    for _ in range(100):
        request = source.choice(list(F))
        shape = messages.FRONTEND_SHAPES[request]
        payload = bytearray(source.randbytes(source.choice(shape.payload)))
        payload[1:8] = bytes(len(payload[1:8]))  # small numbers get further
        n = source.randint(0, min(shape.fds, 2))
        wire.append(message(request, bytes(payload), *source.sample(fds, n)))
    witness.outcome(wire)


def test_a_front_end_that_does_not_read(witness: Witness) -> None:
    with witness.daemon.connect() as sock:
        with contextlib.suppress(messages.PeerClosed):
            for _ in range(100_000):
                messages.send(sock, encode(F.GET_FEATURES), timeout_s=DEADLINE_S)
        assert "GET_FEATURES: the other end does not read" in witness.check()


def test_a_thousand_front_ends(witness: Witness) -> None:
    for _ in range(10):
        socks = [witness.daemon.connect() for _ in range(100)]
        for sock in socks:
            sock.close()
        for _ in socks:
            witness.daemon.wait_line(LEFT)
    witness.frontend.get_features()
    assert witness.daemon.fd_count() == witness.fds


# ---- notifications nobody reads


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, "--tag", "test", "--inband-notifications")
    yield daemon
    daemon.kill()


def answered(driver: Driver, frontend: Frontend, n: int, stalls_s: float) -> int:
    """How many of n requests, kicked in-band, were answered before one took so long."""

    def poll() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    for i in range(n):
        deadline = time.monotonic() + stalls_s
        try:
            driver.init(lambda: frontend.vring_kick(1), poll)
        except TimeoutError:
            return i
    return n


def test_a_call_counter_that_is_full(own_daemon: Daemon, guest: Guest) -> None:
    """The guest has calls to see: one more would tell it nothing."""
    full = os.eventfd(0)  # a write to it blocks
    os.write(full, (2**64 - 2).to_bytes(8, sys.byteorder))
    with Frontend(own_daemon.connect(), timeout_s=3) as frontend:
        frontend.handshake("uml", guest.setup())
        frontend.start("uml", guest.setup())
        frontend.set_vring_call(1, full)
        assert answered(Driver(guest, event_idx=False), frontend, 3, stalls_s=3) == 3
        assert frontend.get_vring_base(1) == 3
    os.close(full)


def test_a_channel_that_is_not_read(own_daemon: Daemon, guest: Guest) -> None:
    """Its queue may wait for it; the control thread, and so other front ends, may not."""
    setup = guest.setup(features=VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES)
    with Frontend(own_daemon.connect(), timeout_s=3) as frontend:
        frontend.handshake("uml", setup)
        frontend.start("uml", setup)
        n = answered(Driver(guest, event_idx=False), frontend, 2000, stalls_s=1)
        assert n > 100
        assert frontend.get_vring_base(1) >= n
        with Frontend(own_daemon.connect(), timeout_s=3) as other:
            other.get_features()
