"""Rings a guest breaks: that queue stops, nothing else does, and it can be started anew."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guests import Daemon, eventually

from vfsd import _ring
from vfsd._ring import CHAIN_ERRORS

from . import wire
from .fixtures import StartGuest
from .rawguest import INDIRECT, MEMORY_GPA, NEXT, WRITE, Guest, GuestQueue
from .wire import ROOT

NUM = 64
PLUGGED_GPA = 0x20_0000_0000
NOWHERE = 0x1000
GIB = 1 << 30
U64 = 2**64

Breaker = Callable[[GuestQueue], None]
BREAKERS: list[tuple[int, str, Breaker]] = []


def breaks(code: int) -> Callable[[Breaker], Breaker]:
    def register(breaker: Breaker) -> Breaker:
        BREAKERS.append((code, breaker.__name__, breaker))
        return breaker

    return register


# The driver uses descriptors from the front of the table, these from the back.
def chain(queue: GuestQueue, *descs: tuple[int, int, int], first: int = NUM // 2) -> None:
    """Offer descriptors (addr, len, flags), each with NEXT but for the last."""
    last = len(descs) - 1
    for i, (addr, length, flags) in enumerate(descs):
        flags |= NEXT if i < last else 0
        queue.table(queue.desc + 16 * (first + i), [(addr, length, flags, first + i + 1 if i < last else 0)])
    queue.offer(first)


def table_of(queue: GuestQueue, *descs: tuple[int, int, int, int], length: int | None = None) -> None:
    """Offer an indirect table (addr, len, flags, next)."""
    at = queue.end - 0x10000
    queue.table(at, descs)
    chain(queue, (at, 16 * len(descs) if length is None else length, INDIRECT))


@breaks(_ring.CHAIN_LOOP)
def two_that_lead_to_each_other(queue: GuestQueue) -> None:
    queue.table(queue.desc + 16 * 40, [(queue.arena, 8, NEXT, 41), (queue.arena, 8, NEXT, 40)])
    queue.offer(40)


@breaks(_ring.CHAIN_LOOP)
def one_that_leads_to_itself(queue: GuestQueue) -> None:
    queue.table(queue.desc + 16 * 40, [(queue.arena, 0, NEXT | WRITE, 40)])
    queue.offer(40)


@breaks(_ring.CHAIN_LOOP)
def an_indirect_table_that_loops(queue: GuestQueue) -> None:
    table_of(queue, (queue.arena, 1, NEXT, 1), (queue.arena, 1, NEXT, 0))


@breaks(_ring.CHAIN_INDEX)
def a_head_past_the_table(queue: GuestQueue) -> None:
    queue.offer(NUM)


@breaks(_ring.CHAIN_INDEX)
def the_largest_head(queue: GuestQueue) -> None:
    queue.offer(0xFFFF)


@breaks(_ring.CHAIN_INDEX)
def a_next_past_the_table(queue: GuestQueue) -> None:
    queue.table(queue.desc + 16 * 40, [(queue.arena, 40, NEXT, NUM)])
    queue.offer(40)


@breaks(_ring.CHAIN_INDEX)
def a_next_past_the_indirect_table(queue: GuestQueue) -> None:
    table_of(queue, (queue.arena, 40, NEXT, 2), (queue.arena, 16, WRITE, 0))


@breaks(_ring.CHAIN_ADDRESS)
def an_address_outside_memory(queue: GuestQueue) -> None:
    chain(queue, (NOWHERE, 40, 0), (queue.arena, 16, WRITE))


@breaks(_ring.CHAIN_ADDRESS)
def a_writable_address_outside_memory(queue: GuestQueue) -> None:
    chain(queue, (queue.arena, 40, 0), (NOWHERE, 16, WRITE))


@breaks(_ring.CHAIN_ADDRESS)
def an_element_past_the_end_of_memory(queue: GuestQueue) -> None:
    end = queue.guest.queues[-1].end
    chain(queue, (end - 39, 40, 0), (queue.arena, 16, WRITE))


@breaks(_ring.CHAIN_ADDRESS)
def an_element_before_memory(queue: GuestQueue) -> None:
    chain(queue, (MEMORY_GPA - 1, 40, 0))


@breaks(_ring.CHAIN_ADDRESS)
def an_indirect_table_outside_memory(queue: GuestQueue) -> None:
    chain(queue, (NOWHERE, 32, INDIRECT))


@breaks(_ring.CHAIN_OVERFLOW)
def an_element_past_the_end_of_all_addresses(queue: GuestQueue) -> None:
    chain(queue, (U64 - 8, 40, 0))


@breaks(_ring.CHAIN_OVERFLOW)
def an_indirect_table_past_the_end_of_all_addresses(queue: GuestQueue) -> None:
    chain(queue, (U64 - 16, 32, INDIRECT))


@breaks(_ring.CHAIN_ORDER)
def readable_after_writable(queue: GuestQueue) -> None:
    chain(queue, (queue.arena, 16, WRITE), (queue.arena, 40, 0))


@breaks(_ring.CHAIN_ORDER)
def readable_after_writable_of_no_bytes(queue: GuestQueue) -> None:
    table_of(queue, (queue.arena, 0, WRITE | NEXT, 1), (queue.arena, 40, 0, 0))


@breaks(_ring.CHAIN_NESTED)
def indirect_in_indirect(queue: GuestQueue) -> None:
    table_of(queue, (queue.arena, 16, INDIRECT, 0))


@breaks(_ring.CHAIN_INDIRECT_LENGTH)
def an_indirect_table_of_nothing(queue: GuestQueue) -> None:
    table_of(queue, length=0)


@breaks(_ring.CHAIN_INDIRECT_LENGTH)
def an_indirect_table_and_a_bit(queue: GuestQueue) -> None:
    table_of(queue, (queue.arena, 40, 0, 0), length=17)


@breaks(_ring.CHAIN_TOO_LONG)
def more_elements_than_the_queue_has(queue: GuestQueue) -> None:
    table_of(queue, *((queue.arena, 1, NEXT, i + 1) for i in range(NUM)), (queue.arena, 1, 0, 0))


@breaks(_ring.CHAIN_TOO_LONG)
def more_elements_with_direct_ones_before_the_table(queue: GuestQueue) -> None:
    at = queue.end - 0x10000
    queue.table(at, [(queue.arena, 1, NEXT if i < NUM - 1 else 0, i + 1) for i in range(NUM)])
    chain(queue, (queue.arena, 40, 0), (at, 16 * NUM, INDIRECT))


@breaks(_ring.CHAIN_TOO_LONG)
def an_indirect_table_of_4_gib(queue: GuestQueue) -> None:
    table_of(queue, length=2**32 - 16)


@breaks(_ring.CHAIN_INDIRECT_NEXT)
def indirect_with_next(queue: GuestQueue) -> None:
    chain(queue, (queue.arena, 16, INDIRECT), (queue.arena, 16, WRITE))


@breaks(_ring.CHAIN_TOTAL)
def four_gib_to_read(queue: GuestQueue) -> None:
    queue.guest.add_region(PLUGGED_GPA, GIB)
    chain(queue, *[(PLUGGED_GPA, GIB, 0)] * 4)


@breaks(_ring.CHAIN_TOTAL)
def four_gib_to_write(queue: GuestQueue) -> None:
    queue.guest.add_region(PLUGGED_GPA, GIB)
    chain(queue, (queue.arena, 40, 0), *[(PLUGGED_GPA, GIB, WRITE)] * 4)


@breaks(_ring.CHAIN_FRAGMENTS)
def more_borders_than_iovecs(queue: GuestQueue) -> None:
    for i in range(100):
        queue.guest.add_region(PLUGGED_GPA + i * 4096, 4096)
    chain(queue, *[(PLUGGED_GPA, 100 * 4096, 0)] * 24)


@breaks(_ring.RING_AVAIL)
def an_index_ahead_of_the_ring(queue: GuestQueue) -> None:
    queue.avail_idx += NUM + 1
    queue.kick_always()


@breaks(_ring.RING_AVAIL)
def an_index_that_goes_back(queue: GuestQueue) -> None:
    queue.avail_idx -= 1
    queue.kick_always()


@pytest.fixture
def attacker(start_guest: StartGuest) -> Iterator[Guest]:
    guest = start_guest(num=NUM, request_queues=2)
    guest.init()
    yield guest
    for index in (0, 1, 2):
        guest.on(index).statfs()


def test_every_code_has_its_breaker() -> None:
    front_end = {_ring.CHAIN_TORN}  # test_lost_memory.py
    assert {code for code, _, _ in BREAKERS} == set(CHAIN_ERRORS) - front_end


@pytest.mark.parametrize(
    ("code", "breaker"), [pytest.param(code, breaker, id=name) for code, name, breaker in BREAKERS]
)
@pytest.mark.parametrize("index", [0, 1])
def test_broken_ring(
    attacker: Guest, served: Daemon, share: Path, index: int, code: int, breaker: Breaker
) -> None:
    (share / "f").touch()
    queue = attacker.queues[index]
    log_start = len(served.log)
    known = attacker.on(index).lookup(ROOT, b"f").nodeid
    before = queue.submit("STATFS", ROOT, kick=False)
    good = queue.avail_idx
    if code == _ring.RING_AVAIL:  # nothing before it is left to take
        queue.kick()
        queue.wait(before)
    breaker(queue)
    assert queue.broken()
    # What came before it is answered, and told.
    if code != _ring.RING_AVAIL:
        assert queue.wait(before).error == 0
    assert eventually(lambda: CHAIN_ERRORS[code] in served.log[log_start:]), served.log[log_start:]
    used = queue.used_idx
    assert used == good
    # Nothing more is taken from it, be the chain mended or not.
    last = NUM - 1
    queue.table(queue.desc + 16 * last, [(queue.arena, 8, 0, 0)])
    queue.set_u16(queue.avail + 4 + 2 * (good % NUM), last)
    queue.avail_idx = good + 1
    queue.kick_always()
    for other in {0, 1, 2} - {index}:
        attacker.on(other).statfs()
        assert not attacker.queues[other].broken(0)
    assert attacker.frontend.get_vring_base(index) == good
    assert queue.used_idx == used
    assert queue.restart() == good
    assert attacker.on(index).getattr(known).size == 0, "the session has ended with the ring"
    assert not queue.broken(0)


@pytest.mark.parametrize("index", [0, 1])
def test_a_ring_broken_again_and_again(attacker: Guest, index: int) -> None:
    queue = attacker.queues[index]
    for _ in range(20):
        an_address_outside_memory(queue)
        assert queue.broken()
        queue.restart()
        attacker.on(index).statfs()


def test_slow_requests_before_a_broken_chain(attacker: Guest, share: Path) -> None:
    """They are answered, whoever works on them; and the ring can be started anew at once after."""
    entry, fh = attacker.create(ROOT, b"f")
    queue = attacker.queue
    for _ in range(10):
        tokens = []
        for n in range(6):
            args = wire.WRITE_IN.pack(fh, 4096 * n, 4096, 0, 0, 0, 0)
            tokens.append(queue.submit("WRITE", entry.nodeid, args, data=bytes(4096), kick=False))
            args = fh.to_bytes(8, "little") + bytes(8)
            tokens.append(queue.submit("FSYNC", entry.nodeid, args, kick=False))
        an_address_outside_memory(queue)
        for token in tokens:
            assert queue.wait(token).error == 0
        assert queue.broken()
        queue.restart()
        attacker.statfs()


def test_all_rings_broken(attacker: Guest, served: Daemon) -> None:
    for queue in attacker.queues:
        one_that_leads_to_itself(queue)
    for queue in attacker.queues:
        assert queue.broken()
        queue.restart()
    assert served.running()


def test_a_broken_ring_of_another_guest(attacker: Guest, start_guest: StartGuest) -> None:
    victim = start_guest()
    victim.init()
    for queue in attacker.queues:
        the_largest_head(queue)
        assert queue.broken()
    victim.statfs()
    assert not victim.queue.broken(0)
    for queue in attacker.queues:
        queue.restart()


# Requests whose data is the ring


def write_by_hand(queue: GuestQueue, nodeid: int, fh: int, data: list[tuple[int, int]], reply: int) -> None:
    """A WRITE with data elements (gpa, bytes) and its reply at a place."""
    size = sum(n for _, n in data)
    args = wire.WRITE_IN.pack(fh, 0, size, 0, 0, 0, 0)
    queue.memory.write(queue.arena, wire.in_header(16, 77, nodeid, len(args) + size) + args)
    used = queue.used_idx
    chain(queue, (queue.arena, 80, 0), *((gpa, n, 0) for gpa, n in data), (reply, 24, WRITE))
    queue.wait_used(used + 1)
    assert queue.used_elem(used) == (NUM // 2, 24)
    assert queue.memory.read(reply, 24) == wire.OUT_HEADER.pack(24, 0, 77) + wire.WRITE_OUT.pack(size, 0)


def test_write_of_the_ring_itself(attacker: Guest, share: Path) -> None:
    entry, fh = attacker.create(ROOT, b"f")
    queue = attacker.queue
    ring = (queue.desc, queue.indirect - queue.desc)
    write_by_hand(queue, entry.nodeid, fh, [ring], queue.arena + 4096)
    assert (share / "f").stat().st_size == ring[1]
    descs = (share / "f").read_bytes()[: 16 * NUM]
    assert descs == queue.memory.read(queue.desc, 16 * NUM)
    queue.restart()


def test_write_whose_data_is_its_reply(attacker: Guest, share: Path) -> None:
    entry, fh = attacker.create(ROOT, b"f")
    queue = attacker.queue
    reply = queue.arena + 4096
    queue.memory.write(reply - 8, b"d" * 40)
    write_by_hand(queue, entry.nodeid, fh, [(reply - 8, 40), (queue.arena, 80)], reply)
    assert (share / "f").read_bytes()[:40] == b"d" * 40
    queue.restart()


def test_a_reply_over_its_own_request(attacker: Guest, share: Path) -> None:
    entry, fh = attacker.create(ROOT, b"f")
    queue = attacker.queue
    queue.memory.write(queue.arena + 4096, b"data")
    write_by_hand(queue, entry.nodeid, fh, [(queue.arena + 4096, 4)], queue.arena)
    assert (share / "f").read_bytes() == b"data"
    queue.restart()


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_read_into_a_ring(attacker: Guest, served: Daemon, share: Path, victim: int, part: str) -> None:
    """The guest may ruin its own rings; whatever comes of it, they can be started anew."""
    (share / "f").write_bytes(os.urandom(1024))
    nodeid = attacker.walk("f")
    fh = attacker.open(nodeid)
    queue = attacker.queue
    args = wire.read_in(fh, 0, 256)
    queue.memory.write(queue.arena, wire.in_header(15, 79, nodeid, len(args)) + args)
    target = getattr(attacker.queues[victim], part)
    chain(queue, (queue.arena, 80, 0), (queue.arena + 4096, 16, WRITE), (target, 256, WRITE))
    for other in attacker.queues:
        other.kick_always()
    attacker.frontend.get_vring_base(queue.index)  # the READ is over, or will not come
    for other in attacker.queues:
        other.restart()
    assert attacker.read(nodeid, fh, 0, 1024) == (share / "f").read_bytes()
    assert served.running()
