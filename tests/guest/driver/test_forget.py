"""Forgets: alone on hiprio, without a reply, counted, and queued when it is full (reference A9)."""

from collections.abc import Callable

import pytest

from .conftest import Background, Rig, StartRig
from .fakedaemon import Chain, answer
from .requests import ATTR_OUT, DESTROY, GETATTR, ROOT


def collect(rig: StartRig, **connect: object) -> tuple[Rig, list[tuple[int, int]]]:
    """A rig whose daemon holds requests and writes forgets down."""
    forgets: list[tuple[int, int]] = []

    def note(chain: Chain) -> None:
        if chain.writable:
            made.fake.hold(chain)
        else:
            forgets.append((chain.nodeid, int.from_bytes(chain.body, "little")))
            chain.give(0)

    made = rig(**connect)  # type: ignore[arg-type]
    made.fake.handler = note
    return made, forgets


def test_forgets_queued_while_hiprio_is_full_are_retried_and_none_is_lost(held: Callable[..., Rig]) -> None:
    made = held(queue_size=8)
    for node in range(1, 51):
        made.transport.forget(node, node)
    chains = made.fake.take(8)
    assert made.fake.held.empty()
    hiprio = made.transport.counters()["hiprio"]
    assert (hiprio["requests"], hiprio["queued"], hiprio["in_flight"]) == (8, 42, 50)
    sent = {(chain.nodeid, int.from_bytes(chain.body, "little")) for chain in chains}
    for answered in range(50):
        answer(chains.pop(0))
        if answered < 42:
            chain = made.fake.next()
            assert (chain.queue.index, chain.readable, chain.writable) == (0, [48], [])
            sent.add((chain.nodeid, int.from_bytes(chain.body, "little")))
            chains.append(chain)
    made.transport.drain()
    assert sent == {(node, node) for node in range(1, 51)}
    hiprio = made.transport.counters()["hiprio"]
    assert (hiprio["requests"], hiprio["queued"], hiprio["in_flight"], hiprio["retries"]) == (50, 0, 0, 42)
    assert made.transport.counters()["opcodes"] == {"FORGET": 50}


def test_20_000_forgets_all_arrive_once(rig: StartRig) -> None:
    made, forgets = collect(rig, queue_size=8)
    for node in range(20_000):
        made.transport.forget(node, 1)
    made.transport.drain()
    assert sorted(forgets) == [(node, 1) for node in range(20_000)]


def test_forgets_from_many_threads_all_arrive_once(rig: StartRig) -> None:
    made, forgets = collect(rig, queue_size=16)

    def send(start: int) -> None:
        for node in range(start, start + 500):
            made.transport.forget(node, 2)

    for thread in [Background(lambda n=n: send(500 * n)) for n in range(16)]:  # type: ignore[misc]
        thread.result()
    made.transport.drain()
    assert sorted(forgets) == [(node, 2) for node in range(8000)]


def test_forgets_pass_while_the_request_queues_are_full(rig: StartRig) -> None:
    made, forgets = collect(rig, queue_size=8, slots=32)
    for _ in range(20):
        made.transport.submit(lambda *result: None, GETATTR, ROOT, bytes(16), out=ATTR_OUT)
    chains = made.fake.take(8)
    for node in range(20):
        made.transport.forget(node, 1)
    made.transport.drain_queue(0)
    assert len(forgets) == 20
    made.fake.handler = answer
    for chain in chains:
        answer(chain)
    made.transport.drain()


def test_a_forget_to_a_disconnected_queue_is_dropped_silently(rig: StartRig) -> None:
    made, forgets = collect(rig)
    made.transport.disconnect(0)
    made.transport.forget(1, 1)
    assert made.transport.in_flight == 0
    made.transport.connect()
    made.transport.forget(2, 1)
    made.transport.drain()
    assert forgets == [(2, 1)]
    assert made.transport.counters()["opcodes"] == {"FORGET": 1}


def test_queued_forgets_are_dropped_and_no_longer_counted_after_a_disconnect(
    held: Callable[..., Rig],
) -> None:
    made = held(queue_size=8)
    for node in range(20):
        made.transport.forget(node, 1)
    chains = made.fake.take(8)
    made.transport.disconnect()
    drain = Background(made.transport.drain)
    for chain in chains[:-1]:
        answer(chain)
    assert drain.running
    answer(chains[-1])
    drain.result()
    assert made.fake.held.empty()
    assert made.counter("hiprio", "queued") == made.transport.in_flight == 0


def test_a_forget_given_back_with_a_length_is_no_error(held: Callable[..., Rig]) -> None:
    """Linux does not look at it."""
    made = held(queue_size=8)
    for _ in range(20):
        made.transport.forget(1, 1)
        made.fake.next().give(0xFFFFFFFF)
    made.transport.drain()
    assert made.device.gone is None


def test_a_device_that_is_lost_ends_forgets_on_the_ring_and_queued(held: Callable[..., Rig]) -> None:
    made = held(queue_size=8)
    for node in range(20):
        made.transport.forget(node, 1)
    made.fake.take(8)
    drain = Background(made.transport.drain)
    made.fake.drop()
    drain.result()
    assert made.transport.in_flight == 0
    made.transport.forget(1, 1)
    assert made.transport.in_flight == 0


@pytest.mark.parametrize("nodeid", [0, 1, 2**64 - 1])
def test_numbers_of_64_bits_pass_unchanged(rig: StartRig, nodeid: int) -> None:
    made, forgets = collect(rig)
    made.transport.forget(nodeid, 2**64 - 1)
    made.transport.drain()
    assert forgets == [(nodeid, 2**64 - 1)]


def test_forgets_and_requests_have_different_uniques(held: Callable[..., Rig]) -> None:
    made = held(slots=64)
    for node in range(20):
        made.transport.forget(node, 1)
        made.transport.submit(lambda *result: None, DESTROY, 0)
    chains = made.fake.take(40)
    assert sorted(chain.unique for chain in chains) == [2 * n for n in range(1, 41)]
    for chain in chains:
        answer(chain)
