"""How a request is cut into elements: as Linux does, or scrambled."""

import os
import queue
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import StartDaemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfsd.guest.driver._transport import Transport
from vfsd.guest.driver.device import Device

from . import requests as rq
from .conftest import Rig, StartRig
from .fakedaemon import Chain
from .requests import ROOT, SAMPLES, Sample


@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_elements_are_those_of_linux(held: Callable[..., Rig], sample: Sample, indirect: bool) -> None:
    made = held(indirect=indirect, slots=8)
    results: queue.SimpleQueue[tuple[int, bytes, bytes]] = queue.SimpleQueue()
    made.transport.submit(lambda *result: results.put(result), **sample.request)
    chain = made.fake.next()
    assert (chain.readable, chain.writable) == (sample.readable, sample.writable)
    assert chain.length == sum(sample.readable)
    assert chain.body == sample.request["args"] + sample.request.get("data", b"")
    body = os.urandom(chain.room)
    chain.reply(body)
    out = sample.request.get("out", 0)
    assert results.get(timeout=20) == (0, body[:out], body[out:])


def test_ioctl_with_different_sizes_has_7_elements_not_8(held: Callable[..., Rig]) -> None:
    made = held()
    sample = next(sample for sample in SAMPLES if sample.name == "IOCTL, in larger than out")
    made.transport.submit(lambda *result: None, **sample.request)
    chain = made.fake.next()
    assert len(chain.elements) == 7
    chain.reply(bytes(chain.room))


def test_a_forget_is_48_bytes_alone_on_hiprio(held: Callable[..., Rig]) -> None:
    made = held()
    made.transport.forget(0x1234, 99)
    chain = made.fake.next()
    assert chain.queue.index == 0
    assert (chain.readable, chain.writable) == ([48], [])
    assert (chain.length, chain.opcode, chain.nodeid) == (48, 2, 0x1234)
    assert (chain.uid, chain.gid, chain.pid, chain.extlen) == (0, 0, 0, 0)
    assert chain.body == (99).to_bytes(8, "little")
    chain.give(0)
    made.transport.drain()


def test_a_megabyte_is_256_elements_of_a_page(held: Callable[..., Rig]) -> None:
    made = held(queue_size=1024, slots=4)
    made.transport.submit(lambda *result: None, rq.READ, ROOT, bytes(40), into=1 << 20)
    chain = made.fake.next()
    assert chain.writable == [16] + [4096] * 256
    chain.reply(bytes(1 << 20))


def test_no_reply_reaches_beyond_the_request_s_own_memory(rig: StartRig) -> None:
    def overwrite(chain: Chain) -> None:
        chain.put(b"\xff" * 10_000_000)
        chain.give(16)

    made = rig(overwrite, slots=4)
    for sample in SAMPLES:
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        made.transport.submit(lambda error, *rest, done=done: done.put(error), **sample.request)
        assert done.get(timeout=20) == 5


@pytest.mark.parametrize("queue_size", [8, 64, 1024])
def test_scrambled_elements_hold_the_same_bytes_in_other_pieces(
    held: Callable[..., Rig], queue_size: int
) -> None:
    made = held(scramble=12345, queue_size=queue_size, slots=8)
    framings = set()
    for sample in (sample for sample in SAMPLES if "IOCTL" not in sample.name):
        for _ in range(20):
            made.transport.submit(lambda *result: None, **sample.request)
            chain = made.fake.next()
            assert len(chain.elements) <= queue_size
            assert sum(chain.readable) == sum(sample.readable)
            assert sum(chain.writable) == sum(sample.writable)
            assert chain.body == sample.request["args"] + sample.request.get("data", b"")
            framings.add((sample.name, *chain.readable, 0, *chain.writable))
            chain.reply(bytes(chain.room))
    assert len(framings) > 10 * len(SAMPLES)


# ---- a real daemon and odd elements


class Client:
    """Just enough of a file system driver."""

    def __init__(self, transport: Transport) -> None:
        self.call = transport.call
        self.call(26, 0, rq.INIT_IN.pack(7, 41, 1 << 17, rq.MAX_PAGES, 0), out=64, argvar=True)

    def create(self, name: bytes) -> tuple[int, int]:
        args = rq.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + name + b"\0"
        body, _ = self.call(35, ROOT, args, out=rq.ENTRY_OUT + rq.OPEN_OUT)
        return int.from_bytes(body[:8], "little"), int.from_bytes(body[128:136], "little")

    def write(self, node: int, fh: int, offset: int, data: bytes) -> None:
        args = rq.READ_IN.pack(fh, offset, len(data), 0, 0, 0, 0)
        body, _ = self.call(16, node, args, out=8, data=data)
        assert int.from_bytes(body[:4], "little") == len(data)

    def read(self, node: int, fh: int, offset: int, size: int) -> bytes:
        into = bytearray(size)
        _, n = self.call(15, node, rq.READ_IN.pack(fh, offset, size, 0, 0, 0, 0), into=into, argvar=True)
        return bytes(into[:n])

    def release(self, node: int, fh: int) -> None:
        self.call(18, node, rq.RELEASE_IN.pack(fh, 0, 0, 0))

    def listdir(self, size: int) -> set[bytes]:
        body, _ = self.call(27, ROOT, bytes(8), out=rq.OPEN_OUT)
        fh, offset, names = int.from_bytes(body[:8], "little"), 0, set()
        into = bytearray(size)
        while True:
            _, n = self.call(28, ROOT, rq.READ_IN.pack(fh, offset, size, 0, 0, 0, 0), into=into, argvar=True)
            if n == 0:
                break
            at = 0
            while at < n:
                _, offset, length, _ = rq.DIRENT.unpack_from(into, at)
                names.add(bytes(into[at + 24 : at + 24 + length]))
                at += (24 + length + 7) & ~7
        self.call(29, ROOT, rq.RELEASE_IN.pack(fh, 0, 0, 0))
        return names - {b".", b".."}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(1, 2**32 - 1),
    queue_size=st.sampled_from([16, 64, 256]),
    indirect=st.booleans(),
    writes=st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 40_000)), min_size=1, max_size=4),
    names=st.sets(st.text("abcdefgh", min_size=1, max_size=60), min_size=1, max_size=30),
)
def test_a_real_daemon_understands_scrambled_elements(
    daemon: StartDaemon, tmp_path: Path, seed: int, queue_size: int, indirect: bool,
    writes: list[tuple[int, int]], names: set[str],
) -> None:  # fmt: skip
    shared = tmp_path / "shared"
    shared.mkdir(exist_ok=True)
    for old in shared.iterdir():
        old.unlink()
    started = started_once(daemon, shared)
    device = Device.connect(started, scramble=seed, queue_size=queue_size, indirect=indirect, slots=8)
    try:
        client = Client(device.transport)
        most = device.transport.max_pages * 4096
        node, fh = client.create(b"data")
        expected = bytearray()
        for number, (offset, size) in enumerate(writes):
            data = bytes([number + 1]) * min(size, most)
            client.write(node, fh, offset, data)
            expected.extend(bytes(max(0, offset + len(data) - len(expected))))
            expected[offset : offset + len(data)] = data
        assert (shared / "data").read_bytes() == expected
        for offset, size in writes:
            size = min(size, most)
            assert client.read(node, fh, offset, size) == expected[offset : offset + size]
        tail = max(len(expected) - 5, 0)
        assert client.read(node, fh, tail, 100) == expected[tail:]
        client.release(node, fh)
        for name in names:
            (shared / name).touch()
        assert client.listdir(4096) == {b"data", *(name.encode() for name in names)}
    finally:
        device.remove()


_STARTED: dict[Path, str] = {}


def started_once(daemon: StartDaemon, shared: Path) -> str:
    """One daemon for all examples of the test."""
    if shared not in _STARTED:
        _STARTED[shared] = str(daemon(shared, options=["--num-request-queues", "2"]).socket)
    return _STARTED[shared]
