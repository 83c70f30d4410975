from collections.abc import Callable

import pytest

from vfsd import _ring
from vfsd._ring import CHAIN_ERRORS, DeviceRing, RingError
from vfsd.memory._regions import GuestMemory

from .layout import DATA_GPA, INDIRECT, NEXT, UVA_OFFSET, WRITE, Desc, Layout, add_region

A, B, C = DATA_GPA, DATA_GPA + 0x1000, DATA_GPA + 0x2000
TABLE = DATA_GPA + 0x8000


def lengths(views: list[memoryview]) -> list[int]:
    return [len(view) for view in views]


def pop(ring: DeviceRing) -> tuple[int, list[memoryview], list[memoryview]]:
    popped = ring.pop()
    assert popped is not None
    return popped


def code_of(layout: Layout, *heads: int) -> int:
    """The code of the chain at the front: each time it is asked for."""
    layout.offer(*(heads or (0,)))
    ring = layout.device()
    codes = set()
    for _ in range(3):
        with pytest.raises(RingError) as info:
            ring.pop_batch(8)
        codes.add(info.value.code)
        assert info.value.strerror == CHAIN_ERRORS[info.value.code]
    assert len(codes) == 1
    return codes.pop()


# Good chains


def test_empty_ring() -> None:
    ring = Layout(4).device()
    assert ring.pop() is None
    assert ring.pop_batch(4) == []


def test_direct_chain() -> None:
    layout = Layout(4)
    layout.memory.write(A, b"head")
    layout.memory.write(B, b"body!")
    layout.descs((C, 16, WRITE, 0), (A, 4, NEXT, 3), (0, 0, 0, 0), (B, 5, NEXT, 0))
    layout.offer(1)
    head, readable, writable = pop(layout.device())
    assert head == 1
    assert [bytes(view) for view in readable] == [b"head", b"body!"]
    assert lengths(writable) == [16]
    writable[0][:2] = b"ok"
    assert layout.memory.read(C, 2) == b"ok"


def test_indirect_chain() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(A, 4, NEXT, 2), (C, 8, WRITE, 0), (B, 5, NEXT, 1)])
    layout.descs((0, 0, 0, 0), (TABLE, 48, INDIRECT, 9))
    layout.offer(1)
    head, readable, writable = pop(layout.device())
    assert (head, lengths(readable), lengths(writable)) == (1, [4, 5], [8])


def test_indirect_table_needs_no_alignment_and_ignores_its_write_flag() -> None:
    layout = Layout(4)
    layout.table(TABLE + 3, [(A, 4, NEXT, 1), (C, 8, WRITE, 0)])
    layout.descs((TABLE + 3, 32, INDIRECT | WRITE, 0))
    layout.offer(0)
    _, readable, writable = pop(layout.device())
    assert (lengths(readable), lengths(writable)) == ([4], [8])


def test_indirect_after_direct() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(B, 5, NEXT, 1), (C, 8, WRITE, 0)])
    layout.descs((A, 4, NEXT, 2), (0, 0, 0, 0), (TABLE, 32, INDIRECT, 0))
    layout.offer(0)
    _, readable, writable = pop(layout.device())
    assert (lengths(readable), lengths(writable)) == ([4, 5], [8])


def test_adjacent_elements_of_one_direction_merge() -> None:
    layout = Layout(8)
    layout.descs(
        (A, 40, NEXT, 1), (A + 40, 60, NEXT, 2), (B, 8, NEXT, 3),
        (B + 8, 16, NEXT | WRITE, 4), (B + 24, 4072, NEXT | WRITE, 5), (A, 8, WRITE, 0),
    )
    layout.offer(0)
    _, readable, writable = pop(layout.device())
    assert (lengths(readable), lengths(writable)) == ([100, 8], [4088, 8])


def test_elements_do_not_merge_with_another_chain() -> None:
    layout = Layout(4)
    layout.descs((A, 8, 0, 0), (A + 8, 8, 0, 0), (A + 16, 8, WRITE, 0))
    layout.offer(0, 1, 2)
    got = [(h, lengths(r), lengths(w)) for h, r, w in layout.device().pop_batch(4)]
    assert got == [(0, [8], []), (1, [8], []), (2, [], [8])]


def test_element_over_a_region_border() -> None:
    layout = Layout(4)
    layout.memory.write(layout.border - 3, b"abcdefg")
    layout.descs((layout.border - 3, 7, NEXT, 1), (layout.border - 5, 10, WRITE, 0))
    layout.offer(0)
    _, readable, writable = pop(layout.device())
    assert [bytes(view) for view in readable] == [b"abc", b"defg"]
    assert lengths(writable) == [5, 5]


def test_zero_length_elements_are_skipped() -> None:
    layout = Layout(4)
    layout.descs(
        (0xDEAD << 40, 0, NEXT, 1), (A, 8, NEXT, 2), (A + 8, 0, NEXT | WRITE, 3), (C, 4, WRITE, 0)
    )
    layout.offer(0)
    _, readable, writable = pop(layout.device())
    assert (lengths(readable), lengths(writable)) == ([8], [4])


def test_chain_of_nothing() -> None:
    layout = Layout(2)
    layout.descs((A, 0, 0, 0))
    layout.offer(0)
    assert pop(layout.device()) == (0, [], [])


@pytest.mark.parametrize("num", [1, 2, 128, 32768])
def test_full_table_in_one_chain(num: int) -> None:
    layout = Layout(num)
    descs: list[Desc] = [(A + 2 * i, 1, NEXT, i + 1) for i in range(num - 1)]
    layout.descs(*descs, (A + 2 * num, 1, 0, 0))
    layout.offer(0)
    _, readable, _ = pop(layout.device())
    assert lengths(readable) == [1] * num


@pytest.mark.parametrize("num", [1, 2, 128, 32768])
def test_full_ring(num: int) -> None:
    layout = Layout(num)
    layout.descs(*((A + i, 1, 0, 0) for i in range(num)))
    layout.offer(*range(num))
    ring = layout.device()
    got: list[int] = []
    while chains := ring.pop_batch(num):
        got += [head for head, _, _ in chains]
    assert got == list(range(num))


def test_a_batch_stops_when_the_iovecs_run_out_and_goes_on() -> None:
    """32 chains of 32 separate elements, the ring has iovecs for fewer."""
    layout = Layout(32)
    layout.table(TABLE, [(A + 2 * i, 1, NEXT if i < 31 else 0, (i + 1) % 32) for i in range(32)])
    layout.descs(*[(TABLE, 512, INDIRECT, 0)] * 32)
    layout.offer(*range(32))
    ring = layout.device()
    batches = []
    while chains := ring.pop_batch(32):
        assert all(lengths(readable) == [1] * 32 for _, readable, _ in chains)
        batches.append([head for head, _, _ in chains])
    assert len(batches) > 1
    assert [head for batch in batches for head in batch] == list(range(32))


@pytest.mark.parametrize("base", [0, 65535, 65530, 32767])
def test_indices_wrap(base: int) -> None:
    layout = Layout(4, base=base)
    layout.descs(*((A + 16 * i, 1 + i, 0, 0) for i in range(4)))
    ring = layout.device()
    for i in range(12):
        layout.offer(i % 4)
        head, readable, _ = pop(ring)
        assert (head, lengths(readable)) == (i % 4, [1 + i % 4])
        ring.push(head, i)
        assert layout.used_idx == (base + i + 1) % 65536
        assert layout.used_elem(base + i) == (i % 4, i)
        assert ring.pop() is None


def test_used_idx_goes_on_from_the_ring() -> None:
    """A daemon that starts again on a ring with chains still in flight at the old one's end."""
    layout = Layout(4, base=10)
    layout.u16(layout.used + 2, 8)
    ring = layout.device()
    ring.push(3, 0)
    assert layout.used_idx == 9
    assert layout.used_elem(8) == (3, 0)


def test_push_batch() -> None:
    layout = Layout(4, base=65534)
    ring = layout.device()
    ring.push_batch([(0, 5), (3, 6), (1, 7)])
    assert layout.used_idx == 1
    assert [layout.used_elem(i) for i in (65534, 65535, 65536)] == [(0, 5), (3, 6), (1, 7)]
    with pytest.raises(ValueError, match="more chains"):
        ring.push_batch([(0, 0)] * 5)
    ring.push_batch([])
    assert layout.used_idx == 1


# Refused chains: one test for each code


def test_chain_loop_direct() -> None:
    layout = Layout(4)
    layout.descs((A, 1, NEXT, 1), (B, 1, NEXT, 0))
    assert code_of(layout) == _ring.CHAIN_LOOP


def test_chain_loop_to_itself() -> None:
    layout = Layout(1)
    layout.descs((A, 1, NEXT, 0))
    assert code_of(layout) == _ring.CHAIN_LOOP


def test_chain_loop_indirect() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(A, 1, NEXT, 1), (B, 1, NEXT, 0)])
    layout.descs((TABLE, 32, INDIRECT, 0))
    assert code_of(layout) == _ring.CHAIN_LOOP


@pytest.mark.parametrize("head", [4, 65535])
def test_chain_index_head(head: int) -> None:
    assert code_of(Layout(4), head) == _ring.CHAIN_INDEX


@pytest.mark.parametrize("following", [4, 65535])
def test_chain_index_next(following: int) -> None:
    layout = Layout(4)
    layout.descs((A, 1, NEXT, following))
    assert code_of(layout) == _ring.CHAIN_INDEX


def test_chain_index_after_the_last_step() -> None:
    layout = Layout(1)
    layout.descs((A, 1, NEXT, 1))
    assert code_of(layout) == _ring.CHAIN_INDEX


def test_chain_index_in_indirect_table() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(A, 1, NEXT, 2), (A, 1, 0, 0), (A, 1, 0, 0)])
    layout.descs((TABLE, 32, INDIRECT, 0))
    assert code_of(layout) == _ring.CHAIN_INDEX


@pytest.mark.parametrize(
    ("where", "length"),
    [
        (lambda _: 0, 1),
        (lambda _: DATA_GPA - 1, 1),
        (lambda _: DATA_GPA - 1, 2),
        (lambda layout: layout.end, 1),
        (lambda layout: layout.end - 1, 2),
        (lambda _: 2**64 - 1, 1),
        (lambda _: DATA_GPA, 2**32 - 1),
    ],
)
@pytest.mark.parametrize("flags", [0, WRITE])
def test_chain_address(where: Callable[[Layout], int], length: int, flags: int) -> None:
    layout = Layout(4)
    layout.descs((where(layout), length, flags, 0))
    assert code_of(layout) == _ring.CHAIN_ADDRESS


@pytest.mark.parametrize("where", ["end", "border"])
def test_chain_address_of_indirect_table(where: str) -> None:
    """Outside memory, and over the border of two regions."""
    layout = Layout(4)
    layout.descs((getattr(layout, where) - 16, 32, INDIRECT, 0))
    assert code_of(layout) == _ring.CHAIN_ADDRESS


@pytest.mark.parametrize("flags", [0, WRITE, INDIRECT])
def test_chain_overflow(flags: int) -> None:
    layout = Layout(4)
    layout.descs((2**64 - 16, 32, flags, 0))
    assert code_of(layout) == _ring.CHAIN_OVERFLOW


@pytest.mark.parametrize("length", [0, 8])
def test_chain_order(length: int) -> None:
    layout = Layout(4)
    layout.descs((A, length, NEXT | WRITE, 1), (B, length, 0, 0))
    assert code_of(layout) == _ring.CHAIN_ORDER


def test_chain_order_across_the_indirect_descriptor() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(A, 1, 0, 0)])
    layout.descs((B, 1, NEXT | WRITE, 1), (TABLE, 16, INDIRECT, 0))
    assert code_of(layout) == _ring.CHAIN_ORDER


def test_chain_nested() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(A, 1, NEXT, 1), (TABLE, 32, INDIRECT, 0)])
    layout.descs((TABLE, 32, INDIRECT, 0))
    assert code_of(layout) == _ring.CHAIN_NESTED


@pytest.mark.parametrize("length", [0, 1, 15, 17, 40, 2**32 - 1])
def test_chain_indirect_length(length: int) -> None:
    layout = Layout(4)
    layout.descs((TABLE, length, INDIRECT, 0))
    assert code_of(layout) == _ring.CHAIN_INDIRECT_LENGTH


def test_chain_too_long_indirect_table() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(A, 1, 0, 0)] * 5)
    layout.descs((TABLE, 80, INDIRECT, 0))
    assert code_of(layout) == _ring.CHAIN_TOO_LONG


def test_chain_too_long_direct_and_indirect_together() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(A, 1, NEXT, 1), (A, 1, NEXT, 2), (A, 1, 0, 0)])
    layout.descs((A, 0, NEXT, 1), (A, 0, NEXT, 2), (TABLE, 48, INDIRECT, 0))
    assert code_of(layout) == _ring.CHAIN_TOO_LONG


def test_chain_indirect_next() -> None:
    layout = Layout(4)
    layout.table(TABLE, [(A, 1, 0, 0)])
    layout.descs((TABLE, 16, INDIRECT | NEXT, 1), (A, 1, 0, 0))
    assert code_of(layout) == _ring.CHAIN_INDIRECT_NEXT


@pytest.mark.parametrize("flags", [0, WRITE])
def test_chain_total(flags: int) -> None:
    layout = Layout(8, regions=1, region_size=1 << 30)
    gib = (DATA_GPA, 1 << 30, NEXT | flags, 1)
    descs: list[Desc] = [(*gib[:3], i + 1) for i in range(4)]
    layout.descs(*descs[:3], (DATA_GPA, (1 << 30) - 1, flags, 0))
    layout.offer(0)
    _, readable, writable = pop(layout.device())
    assert sum(lengths(writable if flags else readable)) == 2**32 - 1
    layout = Layout(8, regions=1, region_size=1 << 30)
    layout.descs(*descs, (DATA_GPA, 0, flags, 0))
    assert code_of(layout) == _ring.CHAIN_TOTAL


def test_chain_fragments() -> None:
    layout = Layout(2, regions=200, region_size=0x1000)
    layout.descs((DATA_GPA, 200 * 0x1000, 0, 0))
    assert code_of(layout) == _ring.CHAIN_FRAGMENTS


@pytest.mark.parametrize("num", [1, 4, 32768])
@pytest.mark.parametrize("base", [0, 65535])
def test_ring_avail(num: int, base: int) -> None:
    layout = Layout(num, base=base)
    layout.descs((A, 1, 0, 0))
    ring = layout.device()
    for ahead in (num + 1, 65535):
        layout.u16(layout.avail + 2, base + ahead)
        for _ in range(2):
            with pytest.raises(RingError) as info:
                ring.pop()
            assert info.value.code == _ring.RING_AVAIL
    layout.u16(layout.avail + 2, base + num)
    assert pop(ring)[0] == 0


def test_every_code_has_its_own_text() -> None:
    names = {n for n in vars(_ring) if n.startswith("CHAIN_")} - {"CHAIN_ERRORS"} | {"RING_AVAIL"}
    assert {getattr(_ring, name) for name in names} == set(CHAIN_ERRORS) == set(range(-13, 0))
    assert len(set(CHAIN_ERRORS.values())) == 13


def test_good_chains_before_a_bad_one_come_first() -> None:
    layout = Layout(4)
    layout.descs((A, 1, 0, 0), (B, 2, 0, 0), (0, 1, 0, 0), (C, 3, 0, 0))
    layout.offer(0, 1, 2, 3)
    ring = layout.device()
    assert [head for head, _, _ in ring.pop_batch(4)] == [0, 1]
    for _ in range(3):
        with pytest.raises(RingError) as info:
            ring.pop_batch(4)
        assert info.value.code == _ring.CHAIN_ADDRESS
    layout.table(layout.desc + 32, [(A, 9, 0, 0)])
    assert [(head, lengths(r)) for head, r, _ in ring.pop_batch(4)] == [(2, [9]), (3, [3])]


# Notifications


def test_call_suppression_by_flag() -> None:
    layout = Layout(4)
    ring = layout.device()
    assert not ring.wants_call()
    ring.push(0, 0)
    assert ring.wants_call()
    assert not ring.wants_call()
    layout.u16(layout.avail, 1)
    ring.push(1, 0)
    assert not ring.wants_call()


@pytest.mark.parametrize("base", [0, 65533])
def test_call_suppression_by_event_index(base: int) -> None:
    layout = Layout(8, base=base, event_idx=True)
    layout.u16(layout.avail, 1)  # the flag has no meaning with EVENT_IDX
    layout.u16(layout.used_event, base + 2)
    ring = layout.device()
    asked = []
    for _ in range(5):
        ring.push(0, 0)
        asked.append(ring.wants_call())
    assert asked == [False, False, True, False, False]
    layout.u16(layout.used_event, base + 6)
    ring.push_batch([(0, 0)] * 4)
    assert ring.wants_call()
    assert not ring.wants_call()


def test_a_call_is_heard_when_the_event_index_moves() -> None:
    layout = Layout(8, event_idx=True)
    layout.u16(layout.used_event, 0)
    ring = layout.device()
    assert not ring.call_unheard()  # there was none
    ring.push(0, 0)
    assert ring.wants_call() and ring.call_unheard()
    ring.push(1, 0)
    assert not ring.wants_call() and ring.call_unheard()
    layout.u16(layout.used_event, 2)
    assert not ring.call_unheard()
    ring.push(2, 0)
    assert ring.wants_call() and ring.call_unheard()


def test_whether_a_call_was_heard_is_unknown_without_an_event_index() -> None:
    ring = Layout(4).device()
    ring.push(0, 0)
    assert ring.wants_call() and not ring.call_unheard()


def test_kick_suppression_by_flag() -> None:
    layout = Layout(4)
    ring = layout.device()
    ring.disable_kick()
    assert layout.u16(layout.used) == 1
    assert not ring.enable_kick()
    assert layout.u16(layout.used) == 0
    layout.offer(0)
    assert ring.enable_kick()


@pytest.mark.parametrize("base", [0, 65535])
def test_kick_suppression_by_event_index(base: int) -> None:
    layout = Layout(4, base=base, event_idx=True)
    layout.descs((A, 1, 0, 0))
    ring = layout.device()
    assert not ring.enable_kick()
    assert layout.u16(layout.avail_event) == base
    layout.offer(0)
    assert ring.enable_kick()
    pop(ring)
    assert not ring.enable_kick()
    assert layout.u16(layout.avail_event) == (base + 1) % 65536
    ring.disable_kick()
    assert (layout.u16(layout.avail_event) - base - 1) % 65536 > 3 * layout.num
    assert layout.u16(layout.used) == 0


# Setting up


@pytest.mark.parametrize("num", [0, 3, 100, 32767, 65536, 2**32 - 1])
def test_queue_size(num: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        DeviceRing(GuestMemory(), num, 0, 0, 0)


@pytest.mark.parametrize("event_idx", [False, True])
def test_parts_of_the_ring(event_idx: bool) -> None:
    memory = GuestMemory()
    size = 0x1000
    add_region(memory, 0, size)
    extra = 2 if event_idx else 0
    good = {"desc": size - 8 * 16, "avail": size - 20 - extra, "used": (size - 68 - extra) & ~3}

    def ring(**parts: int) -> DeviceRing:
        uva = {name: gpa + UVA_OFFSET for name, gpa in (good | parts).items()}
        return DeviceRing(memory, 8, **uva, event_idx=event_idx)

    assert ring().pop() is None
    for part, step in (("desc", 16), ("avail", 2), ("used", 4)):
        for wrong in (good[part] + step, good[part] - step // 2, size, 1 << 40):
            with pytest.raises(ValueError, match="outside memory or not aligned"):
                ring(**{part: wrong})


def test_ring_addresses_are_user_addresses() -> None:
    memory = GuestMemory()
    add_region(memory, 0, 0x1000)
    with pytest.raises(ValueError, match="outside memory"):
        DeviceRing(memory, 8, 0, 0x400, 0x800)
