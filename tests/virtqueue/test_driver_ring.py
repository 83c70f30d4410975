import errno

import pytest
from ring.layout import DATA_GPA, INDIRECT, NEXT, UVA_OFFSET, WRITE, Layout, add_region

from vfsd.memory._regions import GuestMemory
from vfsd.virtqueue._driver_ring import DriverRing

A, B, C, D = (DATA_GPA + i * 0x1000 for i in range(4))
TABLES = DATA_GPA + 0x10000  # the second region


def refused(ring: DriverRing, code: int, readable: int, writable: int) -> None:
    with pytest.raises(OSError) as info:
        ring.add([(A, 1)] * readable, [(B, 1)] * writable, 0)
    assert info.value.errno == code


def lie(ring: DriverRing) -> None:
    """The used ring is refused, each time it is read."""
    for _ in range(2):
        with pytest.raises(OSError) as info:
            ring.pop_used()
        assert info.value.errno == errno.EIO


def test_direct_chain_as_linux_lays_it_out() -> None:
    layout = Layout(8)
    ring = layout.driver()
    ring.add([(A, 40), (B, 16)], [(C, 16), (D, 104)], 1)
    ring.publish()
    assert [layout.read_desc(layout.desc, i) for i in range(4)] == [
        (A, 40, NEXT, 1), (B, 16, NEXT, 2), (C, 16, NEXT | WRITE, 3), (D, 104, WRITE, 0),
    ]
    assert layout.u16(layout.avail + 4) == 0
    assert layout.u16(layout.avail + 2) == 1


def test_indirect_chain_takes_one_slot() -> None:
    layout = Layout(4)
    ring = layout.driver(indirect=TABLES)
    for token in range(4):
        ring.add([(A, 40), (B, 16)], [(C, 16)], token)
    refused(ring, errno.ENOSPC, 1, 0)
    for i in range(4):
        table = TABLES + i * 4 * 16
        assert layout.read_desc(layout.desc, i) == (table, 48, INDIRECT, 0)
        assert [layout.read_desc(table, k) for k in range(3)] == [
            (A, 40, NEXT, 1), (B, 16, NEXT, 2), (C, 16, WRITE, 0),
        ]


def test_one_element_is_never_indirect() -> None:
    layout = Layout(4)
    ring = layout.driver(indirect=TABLES)
    ring.add([(A, 48)], [], 1)
    assert layout.read_desc(layout.desc, 0) == (A, 48, 0, 0)


def test_longer_than_an_indirect_table_is_direct() -> None:
    layout = Layout(2048, region_size=2048 * 1024 * 16)
    ring = layout.driver(indirect=DATA_GPA)
    ring.add([(A, 1)] * 1024, [], 1)
    assert layout.read_desc(layout.desc, 0)[2] == INDIRECT
    ring.add([(A, 1)] * 1025, [], 2)
    assert layout.read_desc(layout.desc, 1)[2] == NEXT
    ring.add([(A, 1)] * 1024, [], 3)
    refused(ring, errno.ENOSPC, 1025, 0)
    refused(ring, errno.E2BIG, 2049, 0)


@pytest.mark.parametrize("indirect", [None, TABLES])
def test_never_fits(indirect: int | None) -> None:
    ring = Layout(4).driver(indirect)
    refused(ring, errno.E2BIG, 5, 0)
    refused(ring, errno.E2BIG, 2, 3)
    refused(ring, errno.EINVAL, 0, 0)
    ring.add([(A, 1)] * 2, [(B, 1)] * 2, 0)


def test_full_ring_has_room_after_a_completion() -> None:
    layout = Layout(4)
    ring = layout.driver()
    ring.add([(A, 1)] * 3, [], 1)
    refused(ring, errno.ENOSPC, 1, 1)
    ring.add([], [(B, 1)], 2)
    ring.publish()
    refused(ring, errno.ENOSPC, 1, 0)
    layout.give_back(1, (0, 0))
    assert ring.pop_used() == (1, 0)
    ring.add([(A, 1)] * 2, [(B, 1)], 3)
    refused(ring, errno.ENOSPC, 1, 0)


@pytest.mark.parametrize("num", [1, 2, 128, 32768])
def test_sizes(num: int) -> None:
    layout = Layout(num)
    ring, device = layout.driver(), layout.device()
    for _ in range(2):
        for token in range(num):
            ring.add([(A, 1)], [], token)
        refused(ring, errno.ENOSPC, 1, 0)
        ring.publish()
        heads = [head for head, _, _ in device.pop_batch(num)]
        assert len(set(heads)) == num
        device.push_batch([(head, i) for i, head in enumerate(heads)])
        assert [ring.pop_used() for _ in range(num)] == [(i, i) for i in range(num)]
        assert ring.pop_used() is None


@pytest.mark.parametrize("event_idx", [False, True])
def test_indices_wrap(event_idx: bool) -> None:
    layout = Layout(2, event_idx=event_idx)
    ring, device = layout.driver(), layout.device()
    for i in range(66000):
        ring.add([(A, 1)], [], i)
        ring.publish()
        popped = device.pop()
        assert popped is not None
        device.push(popped[0], i)
        assert ring.pop_used() == (i, i)
    assert layout.used_idx == 66000 % 65536


def test_token_is_64_bits() -> None:
    layout = Layout(2)
    ring = layout.driver()
    ring.add([(A, 1)], [], 2**64 - 1)
    ring.publish()
    layout.give_back(1, (0, 2**32 - 1))
    assert ring.pop_used() == (2**64 - 1, 2**32 - 1)


def test_added_is_not_visible_before_publish() -> None:
    layout = Layout(4)
    ring = layout.driver()
    ring.add([(A, 1)], [], 1)
    ring.add([(A, 1)], [], 2)
    assert layout.u16(layout.avail + 2) == 0
    assert not ring.wants_kick()
    ring.publish()
    assert layout.u16(layout.avail + 2) == 2
    assert ring.wants_kick()


def test_starts_on_a_cleared_ring() -> None:
    layout = Layout(4, base=77, event_idx=True)
    layout.u16(layout.avail, 1)
    layout.u16(layout.used_event, 5)
    layout.u16(layout.used, 1)
    layout.driver()
    size = layout.avail_event + 2 - layout.avail
    assert layout.memory.read(layout.avail, size) == bytes(size)


# A device that lies


@pytest.mark.parametrize("id_", [1, 3, 4, 65536, 2**32 - 1])
def test_used_id_not_in_flight(id_: int) -> None:
    """1 is inside the chain, 3 is free, the others are no descriptors."""
    layout = Layout(4)
    ring = layout.driver()
    ring.add([(A, 1)] * 2, [], 1)
    ring.publish()
    layout.give_back(1, (id_, 0))
    lie(ring)


def test_used_twice() -> None:
    layout = Layout(4)
    ring = layout.driver()
    ring.add([(A, 1)], [], 1)
    ring.add([(A, 1)], [], 2)
    ring.publish()
    layout.give_back(2, (0, 0), (0, 0))
    assert ring.pop_used() == (1, 0)
    lie(ring)


@pytest.mark.parametrize("idx", [2, 3, 65535])
def test_used_idx_runs_away(idx: int) -> None:
    layout = Layout(4)
    ring = layout.driver()
    ring.add([(A, 1)], [], 1)
    ring.publish()
    ring.add([(A, 1)], [], 2)  # not visible: the device cannot have used it
    layout.give_back(idx, (0, 0))
    lie(ring)


def test_used_idx_without_requests() -> None:
    layout = Layout(4)
    ring = layout.driver()
    layout.give_back(1, (0, 0))
    lie(ring)


def test_descriptor_table_overwritten_by_the_device() -> None:
    layout = Layout(8)
    ring = layout.driver()
    ring.add([(A, 1)] * 3, [(B, 1)], 1)
    ring.add([(A, 1)], [(B, 1)], 2)
    ring.publish()
    layout.memory.write(layout.desc, b"\xff" * 128)
    layout.give_back(2, (4, 5), (0, 6))
    assert [ring.pop_used(), ring.pop_used()] == [(2, 5), (1, 6)]
    ring.add([(A, 1)] * 4, [(B, 1)] * 4, 3)
    ring.publish()
    head, seen = layout.u16(layout.avail + 4 + 2 * 2), set()
    while True:
        seen.add(head)
        _, _, flags, head = layout.read_desc(layout.desc, head)
        if not flags & NEXT:
            break
    assert seen == set(range(8))


# Notifications


def test_kick_by_flag() -> None:
    layout = Layout(4)
    ring = layout.driver()
    ring.add([(A, 1)], [], 1)
    ring.publish()
    assert ring.wants_kick()
    assert not ring.wants_kick()
    layout.u16(layout.used, 1)
    ring.add([(A, 1)], [], 1)
    ring.publish()
    assert not ring.wants_kick()


def test_kick_by_event_index() -> None:
    layout = Layout(8, event_idx=True)
    layout.u16(layout.used, 1)  # the flag has no meaning with EVENT_IDX
    layout.u16(layout.avail_event, 2)
    ring = layout.driver()
    layout.u16(layout.avail_event, 2)
    asked = []
    for _ in range(5):
        ring.add([(A, 1)], [], 1)
        ring.publish()
        asked.append(ring.wants_kick())
    assert asked == [False, False, True, False, False]


def test_kick_for_what_is_published_after_an_early_question() -> None:
    layout = Layout(4)
    ring = layout.driver()
    ring.add([(A, 1)], [], 1)
    ring.publish()
    ring.add([(A, 1)], [], 2)
    assert ring.wants_kick()
    ring.publish()
    assert ring.wants_kick()


def test_call_by_flag() -> None:
    layout = Layout(4)
    ring = layout.driver()
    ring.disable_call()
    assert layout.u16(layout.avail) == 1
    assert not ring.enable_call()
    assert layout.u16(layout.avail) == 0
    ring.add([(A, 1)], [], 1)
    ring.publish()
    layout.give_back(1, (0, 0))
    assert ring.enable_call()


def test_call_by_event_index() -> None:
    layout = Layout(4, event_idx=True)
    ring = layout.driver()
    ring.add([(A, 1)], [], 1)
    ring.publish()
    layout.give_back(1, (0, 0))
    assert ring.enable_call()
    ring.pop_used()
    assert not ring.enable_call()
    assert layout.u16(layout.used_event) == 1
    ring.disable_call()
    assert (layout.u16(layout.used_event) - 1) % 65536 > 3 * layout.num
    assert layout.u16(layout.avail) == 0


# Setting up


@pytest.mark.parametrize("num", [0, 3, 65536, 2**32 - 1])
def test_queue_size(num: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        DriverRing(GuestMemory(), num, 0, 0, 0)


@pytest.mark.parametrize("indirect", [0, TABLES + 8, TABLES + 0x10000 - 16 * 15, 2**64 - 16])
def test_indirect_tables_outside_memory_or_unaligned(indirect: int) -> None:
    with pytest.raises(ValueError, match="indirect"):
        Layout(4).driver(indirect)
    Layout(4).driver(TABLES + 0x10000 - 16 * 16)


def test_ring_outside_memory() -> None:
    memory = GuestMemory()
    add_region(memory, 0, 0x1000)
    DriverRing(memory, 4, UVA_OFFSET, UVA_OFFSET + 0x400, UVA_OFFSET + 0x800)
    with pytest.raises(ValueError, match="outside memory"):
        DriverRing(memory, 4, 0, UVA_OFFSET + 0x400, UVA_OFFSET + 0x800)
