"""A full ring: what finds no room is queued and retried from completions (reference A5)."""

import os
import queue
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from guests.daemon import eventually

from .conftest import Background, Rig, StartRig
from .fakedaemon import DEADLINE_S, Chain, answer
from .requests import ATTR_OUT, DESTROY, GETATTR, IOCTL, ROOT

IDLE_S = 0.5  # how long a thread is watched that should do nothing
IDLE_CPU_S = IDLE_S / 4  # a loop that does not sleep takes nearly all of it
PAGES = 4 * 4096  # the most that a queue of 8 takes
SOAK_S = float(os.environ.get("VFSD_SOAK", "10"))


def cpu_of_idle() -> float:
    """CPU seconds that this process takes while the caller waits."""
    nothing = threading.Event()
    begin = time.process_time()
    nothing.wait(IDLE_S)
    return time.process_time() - begin


class Results:
    """Collects what done functions are called with, and in which thread."""

    def __init__(self) -> None:
        self.all: queue.SimpleQueue[tuple[int, int, str]] = queue.SimpleQueue()

    def done(self, key: int) -> Callable[[int, bytes, bytes], None]:
        return lambda error, body, data: self.all.put((key, error, threading.current_thread().name))

    def take(self, n: int) -> list[tuple[int, int, str]]:
        return [self.all.get(timeout=DEADLINE_S) for _ in range(n)]


def getattr_(made: Rig, results: Results, node: int) -> None:
    """4 elements."""
    made.transport.submit(results.done(node), GETATTR, node, bytes(16), out=ATTR_OUT)


def destroy(made: Rig, results: Results, node: int) -> None:
    """2 elements."""
    made.transport.submit(results.done(node), DESTROY, node)


def six(made: Rig, results: Results, node: int) -> None:
    """6 elements: header, arguments, a page; header, arguments, the same page."""
    made.transport.submit(results.done(node), IOCTL, node, bytes(32), out=16, data=bytes(10), into=10)


@pytest.mark.parametrize("indirect", [True, False])
@pytest.mark.parametrize("event_idx", [True, False])
def test_what_finds_the_ring_full_is_queued_and_retried_from_completions(
    held: Callable[..., Rig], indirect: bool, event_idx: bool
) -> None:
    made, results = held(queue_size=8, slots=64, indirect=indirect, event_idx=event_idx), Results()
    room = 8 if indirect else 2
    for node in range(20):
        getattr_(made, results, node)
    on_ring = made.fake.take(room)
    assert [chain.nodeid for chain in on_ring] == list(range(room))
    assert made.fake.held.empty()
    assert made.counter("requests.0", "requests") == room
    assert made.counter("requests.0", "queued") == 20 - room
    assert made.transport.in_flight == 20
    seen = {chain.nodeid for chain in on_ring}
    while on_ring:
        on_ring.pop(0).reply(bytes(ATTR_OUT))
        if len(seen) < 20:
            on_ring.append(made.fake.next())
            seen.add(on_ring[-1].nodeid)
    assert sorted(results.take(20)) == [(node, 0, "requests.0") for node in range(20)]
    made.transport.drain()
    assert made.counter("requests.0", "requests") == 20
    assert made.counter("requests.0", "retries") == 20 - room
    assert made.counter("requests.0", "queued") == made.transport.in_flight == 0


def test_no_thread_is_busy_while_a_full_queue_waits(held: Callable[..., Rig]) -> None:
    made, results = held(queue_size=8, slots=64), Results()
    for node in range(40):
        getattr_(made, results, node)
    for node in range(20):
        made.transport.forget(node, 1)
    on_ring = made.fake.take(16)
    assert cpu_of_idle() < IDLE_CPU_S
    made.fake.handler = answer
    for chain in on_ring:
        answer(chain)
    assert all(error == 0 for _, error, _ in results.take(40))
    made.transport.drain()
    assert cpu_of_idle() < IDLE_CPU_S


def test_a_submitter_does_not_wait_for_a_full_ring(held: Callable[..., Rig]) -> None:
    made, results = held(queue_size=8, slots=64), Results()

    def submit() -> None:
        for node in range(60):
            getattr_(made, results, node)

    Background(submit).result()
    chains = made.fake.take(8)  # all the ring holds: before the handler may take one of them
    made.fake.handler = answer
    for chain in chains:
        answer(chain)
    results.take(60)


def test_new_requests_overtake_queued_ones(held: Callable[..., Rig]) -> None:
    made, results = held(queue_size=8, slots=8, indirect=False), Results()
    getattr_(made, results, 1)
    six(made, results, 2)
    destroy(made, results, 3)
    first, third = made.fake.take(2)
    assert (first.nodeid, third.nodeid) == (1, 3)
    assert made.counter("requests.0", "queued") == 1
    answer(first)
    second = made.fake.next()  # 6 elements fit beside the 2 of the third
    assert second.nodeid == 2
    answer(third)
    answer(second)
    assert [key for key, error, _ in results.take(3)] == [1, 3, 2]


def test_a_retry_that_fails_goes_to_the_tail_and_ends_the_pass(held: Callable[..., Rig]) -> None:
    made, results = held(queue_size=8, slots=8, indirect=False), Results()
    getattr_(made, results, 1)
    getattr_(made, results, 2)  # full
    six(made, results, 3)
    destroy(made, results, 4)
    first, second = made.fake.take(2)
    answer(first)
    results.take(1)
    # 4 elements are free: 3 does not fit and goes behind 4, which would fit and is not looked at.
    assert eventually(lambda: made.counter("requests.0", "in_flight") == 3)
    assert cpu_of_idle() < IDLE_CPU_S
    assert made.fake.held.empty()
    assert made.counter("requests.0", "queued") == 2
    answer(second)
    fourth, third = made.fake.take(2)
    assert (fourth.nodeid, third.nodeid) == (4, 3)
    answer(fourth)
    answer(third)
    assert sorted(key for key, _, _ in results.take(3)) == [2, 3, 4]


def test_a_request_larger_than_the_ring_is_refused_at_once_by_the_worker(held: Callable[..., Rig]) -> None:
    made, results = held(queue_size=8, slots=8), Results()
    large: dict[str, Any] = {"out": 16, "data": bytes(PAGES), "into": PAGES}  # 12 elements
    made.transport.submit(results.done(99), IOCTL, ROOT, bytes(32), **large)
    assert results.take(1) == [(99, 7, "virtiofs-worker")]
    with pytest.raises(OSError, match="too long") as caught:
        made.transport.call(IOCTL, ROOT, bytes(32), out=16, data=bytes(PAGES), into=bytearray(PAGES))
    assert caught.value.errno == 7
    assert made.transport.in_flight == 0
    assert made.fake.held.empty()
    # Also while the ring is full: it does not wait in the queue.
    for node in range(8):
        if node < 6:
            getattr_(made, results, node)
    made.transport.submit(results.done(99), IOCTL, ROOT, bytes(32), **large)
    assert results.take(1) == [(99, 7, "virtiofs-worker")]
    for chain in made.fake.take(6):
        answer(chain)


def test_disconnect_ends_queued_requests_when_they_are_retried(held: Callable[..., Rig]) -> None:
    made, results = held(queue_size=8, slots=64), Results()
    for node in range(12):
        getattr_(made, results, node)
    on_ring = made.fake.take(8)
    made.transport.disconnect()
    drain = Background(made.transport.drain)
    on_ring.pop().reply(bytes(ATTR_OUT))
    ended = results.take(5)
    assert sorted(error for _, error, _ in ended) == [0, 107, 107, 107, 107]
    assert {name for _, error, name in ended if error} == {"virtiofs-worker"}
    assert drain.running
    for chain in on_ring:
        answer(chain)
    drain.result()


def test_a_queue_of_8_under_64_threads(rig: StartRig) -> None:
    """Every request gets its own reply, once; the CPU time is shown."""
    seen: Counter[int] = Counter()
    later: list[Chain] = []

    def echo(chain: Chain) -> None:
        """Answers out of order: every other chain waits for the next."""
        seen[chain.unique] += 1
        if not later and chain.unique % 8 == 0:
            later.append(chain)
            return
        for one in (chain, *later):
            one.reply(one.nodeid.to_bytes(8, "little") + bytes(one.room - 8))
        later.clear()

    made = rig(echo, queue_size=8, slots=64)
    finish = time.monotonic() + SOAK_S
    counts = [0] * 64

    def work(number: int) -> None:
        while time.monotonic() < finish:
            node = number << 32 | counts[number]
            body, _ = made.transport.call(GETATTR, node, bytes(16), out=ATTR_OUT)
            assert int.from_bytes(body[:8], "little") == node
            counts[number] += 1

    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    threads = [Background(lambda number=number: work(number)) for number in range(64)]  # type: ignore[misc]
    # One chain may wait for a next one that never comes once threads have finished.
    assert eventually(lambda: sum(t.running for t in threads) <= 1, SOAK_S + DEADLINE_S)
    while any(thread.running for thread in threads):
        if later:
            answer_last(later)
    for thread in threads:
        thread.result()
    made.transport.drain()
    after, elapsed = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - begin
    total = sum(counts)
    assert set(seen.values()) == {1}
    assert len(seen) == total == made.counter("requests.0", "requests")
    assert made.counter("requests.0", "retries") > 0
    assert made.transport.in_flight == 0
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    retries = made.counter("requests.0", "retries")
    print(f"\n{total} requests in {elapsed:.1f} s, {cpu:.1f} s CPU, {retries} retries")
    assert cpu_of_idle() < IDLE_CPU_S


def answer_last(later: list[Chain]) -> None:
    with later[0].queue.lock:
        for one in later:
            one.reply(one.nodeid.to_bytes(8, "little") + bytes(one.room - 8))
        later.clear()


def test_a_full_queue_of_8_with_the_daemon_idle_takes_no_cpu_from_64_threads(
    held: Callable[..., Rig],
) -> None:
    made = held(queue_size=8, slots=32)
    calls = [
        Background(lambda: made.transport.call(GETATTR, ROOT, bytes(16), out=ATTR_OUT)) for _ in range(64)
    ]
    on_ring = made.fake.take(8)
    assert eventually(lambda: made.transport.in_flight == 32)  # the others wait for a slot
    assert cpu_of_idle() < IDLE_CPU_S
    made.fake.handler = answer
    for chain in on_ring:
        answer(chain)
    for call in calls:
        call.result()
