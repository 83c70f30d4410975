"""Names and sizes of the queues, where requests go, and what is counted."""

import threading
from collections.abc import Callable

import pytest

from vfsd.guest.driver.device import Device

from .conftest import Background, Rig, StartRig
from .fakedaemon import FakeDaemon
from .requests import ATTR_OUT, DESTROY, GETATTR, READ, ROOT

NAME_LEN = 24  # VQ_NAME_LEN, with the NUL


@pytest.mark.parametrize("queues", [1, 4, 255])
def test_queue_names_are_bounded_and_terminated(rig: StartRig, queues: int) -> None:
    made = rig(queues=queues, queue_size=8, slots=8, fake={"request_queues": 255})
    assert made.transport.names == ["hiprio", *(f"requests.{i}" for i in range(queues))]
    assert all(0 < len(name.encode()) < NAME_LEN for name in made.transport.names)
    assert list(made.transport.counters())[:-1] == made.transport.names


@pytest.mark.parametrize(
    ("size", "pages"), [(8, 4), (16, 12), (128, 124), (256, 252), (512, 256), (1024, 256)]
)
def test_max_pages_is_limited_by_the_queue_size(rig: StartRig, size: int, pages: int) -> None:
    made = rig(queue_size=size, slots=8)
    assert made.transport.max_pages == pages
    into = bytearray(pages * 4096)
    assert made.transport.call(READ, ROOT, bytes(40), into=into, argvar=True) == (b"", len(into))
    with pytest.raises(OSError, match="too long"):
        made.transport.call(READ, ROOT, bytes(40), into=bytearray(len(into) + 1), argvar=True)


def test_the_largest_read_fits_the_smallest_ring_without_indirect_tables(held: Callable[..., Rig]) -> None:
    made = held(queue_size=8, slots=8, indirect=False)
    read = Background(lambda: made.transport.call(READ, ROOT, bytes(40), into=bytearray(4 * 4096)))
    chain = made.fake.next()
    assert (chain.readable, chain.writable) == ([40, 40], [16, 4096, 4096, 4096, 4096])
    chain.reply(bytes(4 * 4096))
    assert read.result() == (b"", 4 * 4096)


def test_unique_starts_at_2_goes_by_2_and_a_forget_takes_one(held: Callable[..., Rig]) -> None:
    made = held()
    calls = [Background(lambda: made.transport.call(DESTROY, 0)) for _ in range(2)]
    first = made.fake.take(2)
    assert sorted(chain.unique for chain in first) == [2, 4]
    made.transport.forget(7, 1)
    assert made.fake.next().unique == 6
    made.transport.restart_unique()
    calls.append(Background(lambda: made.transport.call(DESTROY, 0)))
    again = made.fake.next()
    assert again.unique == 2
    for chain in (*first, again):
        chain.reply()
    for call in calls:
        call.result()


def test_the_in_header_has_what_the_caller_gave(held: Callable[..., Rig]) -> None:
    made = held()
    call = Background(
        lambda: made.transport.call(
            GETATTR, 77, bytes(16), out=ATTR_OUT, uid=1001, gid=1002, pid=1003, extlen=5
        )
    )
    chain = made.fake.next()
    assert (chain.length, chain.opcode, chain.nodeid) == (56, GETATTR, 77)
    assert (chain.uid, chain.gid, chain.pid, chain.extlen) == (1001, 1002, 1003, 5)
    assert chain.request[38:40] == bytes(2)
    chain.reply(bytes(ATTR_OUT))
    call.result()


def test_a_request_goes_to_the_queue_asked_for_or_always_to_the_thread_s_own(
    held: Callable[..., Rig],
) -> None:
    made = held(queues=4, slots=64)
    for queue in (1, 2, 3, 4):
        call = Background(lambda queue=queue: made.transport.call(DESTROY, 0, queue=queue))  # type: ignore[misc]
        chain = made.fake.next()
        assert chain.queue.index == queue
        chain.reply()
        call.result()
    for queue in (0, 5, -1):
        with pytest.raises((ValueError, OverflowError)):
            made.transport.call(DESTROY, 0, queue=queue)
    for _ in range(8):
        made.transport.submit(lambda *result: None, DESTROY, 0)
    chains = made.fake.take(8)
    assert len({chain.queue.index for chain in chains}) == 1
    for chain in chains:
        chain.reply()


def test_counters_show_requests_kicks_calls_and_opcodes(rig: StartRig) -> None:
    made = rig(queues=2)
    for _ in range(10):
        made.transport.call(GETATTR, ROOT, bytes(16), out=ATTR_OUT, queue=2)
    made.transport.forget(5, 1)
    made.transport.drain()
    counters = made.transport.counters()
    assert counters["opcodes"] == {"GETATTR": 10, "FORGET": 1}
    assert counters["requests.1"]["requests"] == 10
    assert counters["requests.0"]["requests"] == 0
    assert counters["hiprio"]["requests"] == 1
    assert 1 <= counters["requests.1"]["kicks"] <= 10
    assert 1 <= counters["requests.1"]["calls"] <= 10
    assert all(counters[name]["in_flight"] == counters[name]["queued"] == 0 for name in made.transport.names)


@pytest.mark.parametrize("numbers", [{"slots": 0}, {"slots": -1}, {"queues": 0}, {"queues": -1},
                                     {"queue_size": 0}, {"queue_size": 4}, {"queue_size": 12},
                                     {"queue_size": 65536}, {"queue_size": -8}])  # fmt: skip
def test_numbers_that_make_no_device_are_refused_by_name(numbers: dict[str, int]) -> None:
    name = next(iter(numbers)).replace("_", " ")
    with FakeDaemon() as fake, pytest.raises(OSError, match=name):
        Device.connect(fake.path, **numbers).remove()  # type: ignore[arg-type]


def test_an_unknown_order_is_refused_by_name() -> None:
    with FakeDaemon() as fake, pytest.raises((OSError, ValueError), match="vmware"):
        Device.connect(fake.path, order="vmware")


def test_each_queue_has_a_thread_of_its_name(rig: StartRig) -> None:
    made = rig(queues=2)
    names = {thread.name for thread in threading.enumerate()}
    assert {*made.transport.names, "virtiofs-worker", f"{made.device.name}-watch"} <= names
