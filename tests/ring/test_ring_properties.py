"""Driver side against device side, and the device side against any bytes."""

import errno
import random
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from vfsd import _ring
from vfsd._ring import RingError

from .layout import DATA_GPA, INDIRECT, NEXT, WRITE, Layout

SLOT = 0x400  # data bytes of one request: elements of up to 48 bytes, 64 apart
TABLES = DATA_GPA + 0x10000

element_sizes = st.lists(st.integers(0, 48), max_size=6)


class Request:
    def __init__(self, token: int, slot: int, readable: list[int], writable: list[int]) -> None:
        self.token = token
        self.slot = slot
        at = [DATA_GPA + slot * SLOT + 64 * i for i in range(len(readable) + len(writable))]
        self.readable = list(zip(at, readable, strict=False))
        self.writable = list(zip(at[len(readable):], writable, strict=True))
        self.sent = random.Random(token).randbytes(sum(readable))
        self.reply = random.Random(~token).randbytes(sum(writable))


class RingMachine(RuleBasedStateMachine):
    """The model: each request is in exactly one of these lists, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[Request] = []
        self.visible: list[Request] = []
        self.popped: list[tuple[int, Request]] = []
        self.used: list[Request] = []
        self.tokens = 0
        self.device_kicks = "asked"  # asked, asleep, off
        self.driver_calls = "asked"
        self.kick_due = False
        self.call_due = False

    @initialize(
        log=st.integers(0, 4), event_idx=st.booleans(), indirect=st.booleans(), wrap=st.booleans()
    )
    def start(self, log: int, event_idx: bool, indirect: bool, wrap: bool) -> None:
        self.layout = Layout(1 << log, event_idx=event_idx)
        self.indirect = indirect
        self.slots = [*range(32)]
        self.driver = self.layout.driver(TABLES if indirect else None)
        self.device = self.layout.device()
        for i in range(65530 if wrap else 0):
            self.driver.add([(DATA_GPA, 1)], [], i)
            self.driver.publish()
            popped = self.device.pop()
            assert popped is not None
            self.device.push(popped[0], 0)
            assert self.driver.pop_used() == (i, 0)
            if i % 1000 == 0 or i == 65529:  # neither side may fall 2^16 behind in asking
                self.driver.wants_kick()
                self.device.wants_call()
        self.device.enable_kick()
        self.driver.enable_call()

    def cost(self, request: Request) -> int:
        elements = len(request.readable) + len(request.writable)
        return 1 if self.indirect else elements

    def free(self) -> int:
        out = [*self.added, *self.visible, *(r for _, r in self.popped), *self.used]
        return self.layout.num - sum(self.cost(r) for r in out)

    @rule(readable=element_sizes, writable=element_sizes)
    def add(self, readable: list[int], writable: list[int]) -> None:
        request = Request(self.tokens, self.slots[0], readable, writable)
        at = 0
        for gpa, size in request.readable:
            self.layout.memory.write(gpa, request.sent[at:at + size])
            at += size
        elements = len(readable) + len(writable)
        expected = (
            errno.EINVAL if elements == 0
            else errno.E2BIG if elements > self.layout.num
            else errno.ENOSPC if self.cost(request) > self.free()
            else 0
        )
        try:
            self.driver.add(request.readable, request.writable, request.token)
            result = 0
        except OSError as error:
            result = error.errno or -1
        assert result == expected
        if result == 0:
            self.tokens += 1
            self.slots.pop(0)
            self.added.append(request)

    @rule()
    def publish(self) -> None:
        self.driver.publish()
        if self.added:
            self.kick_due = True
        self.visible += self.added
        self.added = []

    @precondition(lambda self: self.kick_due)
    @rule()
    def ask_for_kick(self) -> None:
        wants = self.driver.wants_kick()
        if self.device_kicks == "asleep" and self.visible:
            assert wants, "the device sleeps and nobody wakes it"
            self.device_kicks = "asked"
        if self.device_kicks == "off":
            assert not wants
        self.kick_due = False

    @rule(max=st.integers(0, 20))
    def pop(self, max: int) -> None:
        chains = self.device.pop_batch(max)
        assert len(chains) <= max
        assert chains or not self.visible or not max
        if self.device_kicks == "asleep" and chains:
            self.device_kicks = "asked"
        for head, readable, writable in chains:
            request = self.visible.pop(0)
            assert b"".join(readable) == request.sent
            at = 0
            for view in writable:
                view[:] = request.reply[at:at + len(view)]
                at += len(view)
            assert at == len(request.reply)
            self.popped.append((head, request))

    @precondition(lambda self: self.popped)
    @rule(data=st.data())
    def push(self, data: st.DataObject) -> None:
        head, request = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        self.device.push(head, len(request.reply))
        self.used.append(request)
        self.call_due = True

    @precondition(lambda self: self.popped)
    @rule()
    def push_all(self) -> None:
        self.device.push_batch([(head, len(r.reply)) for head, r in reversed(self.popped)])
        self.used += [request for _, request in reversed(self.popped)]
        self.popped = []
        self.call_due = True

    @precondition(lambda self: self.call_due)
    @rule()
    def ask_for_call(self) -> None:
        wants = self.device.wants_call()
        # What it has taken before it went to sleep is no reason to wake it.
        if self.driver_calls == "asleep" and self.used:
            assert wants, "the driver sleeps and nobody wakes it"
            self.driver_calls = "asked"
        if self.driver_calls == "off":
            assert not wants
        self.call_due = False

    @rule()
    def pop_used(self) -> None:
        got = self.driver.pop_used()
        if not self.used:
            assert got is None
            return
        request = self.used.pop(0)
        assert got == (request.token, len(request.reply))
        assert self.read(request.writable) == request.reply
        self.slots.append(request.slot)
        if self.driver_calls == "asleep":
            self.driver_calls = "asked"

    def read(self, elements: list[tuple[int, int]]) -> bytes:
        return b"".join(self.layout.memory.read(gpa, size) for gpa, size in elements)

    @rule()
    def device_sleeps(self) -> None:
        waiting = self.device.enable_kick()
        assert waiting == bool(self.visible)
        self.device_kicks = "asked" if waiting else "asleep"
        if not waiting:
            self.kick_due = False  # it has taken all there is: nothing is owed to it

    @rule()
    def device_polls(self) -> None:
        self.device.disable_kick()
        self.device_kicks = "off"

    @rule()
    def driver_sleeps(self) -> None:
        waiting = self.driver.enable_call()
        assert waiting == bool(self.used)
        self.driver_calls = "asked" if waiting else "asleep"

    @rule()
    def driver_polls(self) -> None:
        self.driver.disable_call()
        self.driver_calls = "off"

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "slots"):
            waiting = len(self.added) + len(self.visible) + len(self.popped) + len(self.used)
            assert len(self.slots) + waiting == 32

    def teardown(self) -> None:
        if not hasattr(self, "slots"):
            return
        self.publish()
        while self.visible:
            self.pop(16)
        if self.popped:
            self.push_all()
        while self.used:
            self.pop_used()
        self.nothing_is_lost()
        assert self.free() == self.layout.num


RingMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestRing = RingMachine.TestCase


# Any bytes in the descriptor table: the answer must be that of this plain reading of the
# specification. Every 8 bytes of memory hold their own address, so bytes show where they are from.

FUZZ_SIZE = 0x4000


class Refused(Exception):
    pass


class Walk:
    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.readable = self.writable = b""
        self.elements = 0
        self.seen_writable = False
        self.totals = {False: 0, True: 0}  # of the writable ones

    def element(self, addr: int, length: int, flags: int) -> None:
        self.elements += 1
        if self.elements > self.layout.num:
            raise Refused(_ring.CHAIN_TOO_LONG)
        if self.seen_writable and not flags & WRITE:
            raise Refused(_ring.CHAIN_ORDER)
        self.seen_writable |= bool(flags & WRITE)
        self.totals[self.seen_writable] += length
        if self.totals[self.seen_writable] >= 2**32:
            raise Refused(_ring.CHAIN_TOTAL)
        if addr + max(length, 1) > 2**64:
            raise Refused(_ring.CHAIN_OVERFLOW)
        if length == 0:
            return
        try:
            data = self.layout.memory.read(addr, length)
        except ValueError:
            raise Refused(_ring.CHAIN_ADDRESS) from None
        if flags & WRITE:
            self.writable += data
        else:
            self.readable += data

    def table(self, gpa: int, n: int, i: int, inside: bool) -> None:
        for _ in range(n):
            if i >= n:
                raise Refused(_ring.CHAIN_INDEX)
            addr, length, flags, following = self.layout.read_desc(gpa, i)
            if flags & INDIRECT:
                if inside:
                    raise Refused(_ring.CHAIN_NESTED)
                return self.indirect(addr, length, flags)
            self.element(addr, length, flags)
            if not flags & NEXT:
                return None
            i = following
        raise Refused(_ring.CHAIN_LOOP if i < n else _ring.CHAIN_INDEX)

    def indirect(self, addr: int, length: int, flags: int) -> None:
        if flags & NEXT:
            raise Refused(_ring.CHAIN_INDIRECT_NEXT)
        if length == 0 or length % 16:
            raise Refused(_ring.CHAIN_INDIRECT_LENGTH)
        if length // 16 > self.layout.num:
            raise Refused(_ring.CHAIN_TOO_LONG)
        if addr + length > 2**64:
            raise Refused(_ring.CHAIN_OVERFLOW)
        regions = self.layout.memory.regions()
        if not any(gpa <= addr and addr + length <= gpa + size for gpa, size, _ in regions):
            raise Refused(_ring.CHAIN_ADDRESS)
        self.table(addr, length // 16, 0, True)


def mostly(good: st.SearchStrategy[int], any_: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    return st.integers(0, 11).flatmap(lambda n: good if n else any_)


addresses = mostly(
    st.integers(DATA_GPA, DATA_GPA + 2 * FUZZ_SIZE - 0x80) | st.sampled_from(
        [DATA_GPA, DATA_GPA + FUZZ_SIZE - 8, DATA_GPA + 0x100, DATA_GPA + 0x140]
    ),
    st.integers(0, 2**64 - 1) | st.sampled_from([2**64 - 8, DATA_GPA + 2 * FUZZ_SIZE - 8]),
)
sizes = mostly(
    st.integers(0, 64) | st.sampled_from([16, 32, 64, 128]), st.integers(0, 2**32 - 1)
)
flag_bits = st.sampled_from([0, NEXT, NEXT, NEXT, NEXT | WRITE, NEXT | WRITE, WRITE, INDIRECT]) | (
    st.integers(0, 65535)
)
indices = mostly(st.integers(0, 7), st.integers(0, 65535))
descriptors = st.tuples(addresses, sizes, flag_bits, indices)


@settings(max_examples=1500, deadline=None)
@given(
    descs=st.lists(descriptors, min_size=8, max_size=8),
    table=st.lists(descriptors, min_size=8, max_size=8),
    heads=st.lists(indices, min_size=1, max_size=8),
    raw=st.none() | st.binary(min_size=128, max_size=128),
)
def test_any_descriptors(
    descs: list[tuple[int, int, int, int]], table: list[tuple[int, int, int, int]],
    heads: list[int], raw: bytes | None,
) -> None:
    layout = Layout(8, region_size=FUZZ_SIZE)
    words = range(DATA_GPA, DATA_GPA + 2 * FUZZ_SIZE, 8)
    layout.memory.write(DATA_GPA, struct.pack(f"<{len(words)}Q", *words))
    layout.table(DATA_GPA + 0x100, table)
    layout.descs(*descs)
    if raw is not None:
        layout.memory.write(layout.desc, raw)
    layout.offer(*heads)
    device = layout.device()
    for head in heads:
        walk = Walk(layout)
        refused = None
        try:
            walk.table(layout.desc, 8, head, False)
        except Refused as error:
            refused = error.args[0]
        try:
            popped = device.pop()
        except RingError as error:
            assert error.code == refused
            return
        assert refused is None
        assert popped is not None
        assert popped[0] == head
        assert b"".join(popped[1]) == walk.readable
        assert b"".join(popped[2]) == walk.writable
    assert device.pop() is None


@settings(max_examples=300, deadline=None)
@given(ring=st.binary(min_size=300, max_size=300), idx=st.integers(0, 65535), log=st.integers(0, 3))
def test_any_bytes_in_the_whole_ring(ring: bytes, idx: int, log: int) -> None:
    layout = Layout(1 << log, event_idx=True)
    layout.memory.write(layout.desc, ring[:layout.avail_event + 2 - layout.desc])
    layout.u16(layout.avail + 2, idx)
    device = layout.device()
    for _ in range(4):
        try:
            for head, readable, writable in device.pop_batch(8):
                assert sum(map(sum, readable + writable)) == 0
                device.push(head, 0)
        except RingError as error:
            assert -13 < error.code < 0
        device.wants_call()
        device.enable_kick()


@settings(max_examples=300, deadline=None)
@given(
    used=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**32 - 1)), min_size=8, max_size=8),
    idx=st.integers(0, 9) | st.integers(0, 65535),
    chains=st.lists(st.integers(1, 4), max_size=6),
)
def test_any_bytes_in_the_used_ring(
    used: list[tuple[int, int]], idx: int, chains: list[int]
) -> None:
    """The driver gives each token out at most once and has its ring whole in the end."""
    layout = Layout(8)
    driver = layout.driver()
    tokens: set[int] = set()
    for token, elements in enumerate(chains):
        try:
            driver.add([(DATA_GPA, 1)] * elements, [], token)
        except OSError:
            break
        tokens.add(token)
    driver.publish()
    layout.give_back(8, *used)
    layout.u16(layout.used + 2, idx)
    lengths = [length for _, length in used]
    try:
        while (got := driver.pop_used()) is not None:
            assert got[1] == lengths.pop(0)
            tokens.remove(got[0])
    except OSError as error:
        assert error.errno == errno.EIO
    free = 8 - sum(chains[token] for token in tokens)
    for i in range(free):
        driver.add([(DATA_GPA, 1)], [], 100 + i)
    try:
        driver.add([(DATA_GPA, 1)], [], 200)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    else:
        raise AssertionError("more descriptors than the ring has")
