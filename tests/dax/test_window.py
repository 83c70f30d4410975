"""The table of a DAX window against a plain list of what each range holds."""

import errno
import os
import random
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfsd._dax import Mapping, Window

RANGE = 4096
MILLION = 1_000_000


def bits(words: np.ndarray, n: int) -> list[bool]:
    """The bits of a bitmap; those past the window are off."""
    all_bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert not all_bits[n:].any()
    return [bool(b) for b in all_bits[:n]]


class Entry:
    """A mapping of the model, in ranges."""

    def __init__(self, start: int, n: int, inode: int, foffset: int, writable: bool) -> None:
        self.start, self.n, self.inode, self.foffset, self.writable = start, n, inode, foffset, writable
        self.users = 0

    @property
    def end(self) -> int:
        return self.start + self.n

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.start * RANGE, self.n * RANGE, self.inode, self.foffset * RANGE, self.writable)

    def file_order(self) -> tuple[int, int]:
        return self.foffset, self.start


def same_error(real: Callable[[], object], wanted: int) -> None:
    with pytest.raises(OSError) as caught:
        real()
    assert caught.value.errno == wanted


class WindowMachine(RuleBasedStateMachine):
    """Every operation, on mappings of every length, with files mapped more than once."""

    @initialize(n=st.sampled_from([1, 2, 3, 63, 64, 65, 200]))
    def begin(self, n: int) -> None:
        self.n = n
        self.window = Window(n * RANGE, RANGE)
        self.by_age: list[Entry] = []
        self.claimed: set[int] = set()

    def covering(self, at: int) -> Entry | None:
        return next((e for e in self.by_age if e.start <= at < e.end), None)

    def beginning(self, at: int) -> Entry | None:
        return next((e for e in self.by_age if e.start == at), None)

    def drop(self, entry: Entry, keep: bool) -> None:
        self.by_age.remove(entry)
        if keep:
            self.claimed |= set(range(entry.start, entry.end))

    numbers = st.integers(0, 2**31)

    @rule(at=numbers, n=st.integers(1, 80), inode=st.integers(0, 3), foffset=st.integers(0, 40),
          writable=st.booleans())  # fmt: skip
    def map(self, at: int, n: int, inode: int, foffset: int, writable: bool) -> None:
        at %= self.n

        def real() -> None:
            self.window.map(at * RANGE, n * RANGE, inode, foffset * RANGE, writable)

        if at + n > self.n:
            with pytest.raises(ValueError, match="not in the window"):
                real()
        elif any(e.start < at + n and at < e.end for e in self.by_age):
            same_error(real, errno.EEXIST)
        else:
            real()
            self.by_age.append(Entry(at, n, inode, foffset, writable))
            self.claimed -= set(range(at, at + n))

    @rule(at=numbers, keep=st.booleans(), aim=st.booleans())
    def unmap(self, at: int, keep: bool, aim: bool) -> None:
        at = self.aimed(at, aim)
        entry = self.beginning(at)
        if entry is None:
            same_error(lambda: self.window.unmap(at * RANGE, keep), errno.ENOENT)
        elif entry.users:
            same_error(lambda: self.window.unmap(at * RANGE, keep), errno.EBUSY)
        else:
            self.window.unmap(at * RANGE, keep)
            self.drop(entry, keep)

    def aimed(self, at: int, aim: bool) -> int:
        """Any range, or the first of some mapping."""
        return self.by_age[at % len(self.by_age)].start if aim and self.by_age else at % self.n

    @rule(at=numbers, n=st.integers(0, 100))
    def cut(self, at: int, n: int) -> None:
        at %= self.n
        n = min(n, self.n - at)
        hit = sorted((e for e in self.by_age if e.start < at + n and at < e.end), key=lambda e: e.start)
        assert self.window.overlapping(at * RANGE, n * RANGE) == [e.mapping for e in hit]
        if any(e.users for e in hit):
            same_error(lambda: self.window.cut(at * RANGE, n * RANGE), errno.EBUSY)
            return
        rests = self.window.cut(at * RANGE, n * RANGE)
        left = []
        for entry in hit:
            end = entry.end
            if end > at + n:
                skip = at + n - entry.start
                rest = Entry(at + n, end - at - n, entry.inode, entry.foffset + skip, entry.writable)
                self.by_age.append(rest)
                left.append(rest)
            if entry.start < at:
                entry.n = at - entry.start
                left.append(entry)
            else:
                self.by_age.remove(entry)
        assert rests == [e.mapping for e in sorted(left, key=lambda e: e.start)]

    @rule(at=numbers)
    def split(self, at: int) -> None:
        at %= self.n
        entry = self.covering(at)
        if entry is None:
            same_error(lambda: self.window.split(at * RANGE), errno.ENOENT)
        elif entry.start == at:
            self.window.split(at * RANGE)
        elif entry.users:
            same_error(lambda: self.window.split(at * RANGE), errno.EBUSY)
        else:
            self.window.split(at * RANGE)
            skip = at - entry.start
            self.by_age.append(Entry(at, entry.n - skip, entry.inode, entry.foffset + skip, entry.writable))
            entry.n = skip

    @rule(at=numbers, aim=st.booleans())
    def merge(self, at: int, aim: bool) -> None:
        at = self.aimed(at, aim)
        entry = self.beginning(at)
        if entry is None:
            same_error(lambda: self.window.merge(at * RANGE), errno.ENOENT)
            return
        low = next((e for e in self.by_age if e.end == at), None)
        if low is None or (low.inode, low.foffset + low.n, low.writable) != (
            entry.inode, entry.foffset, entry.writable,
        ):  # fmt: skip
            assert self.window.merge(at * RANGE) is False
        elif low.users or entry.users:
            same_error(lambda: self.window.merge(at * RANGE), errno.EBUSY)
        else:
            assert self.window.merge(at * RANGE) is True
            low.n += entry.n
            self.by_age.remove(entry)

    @rule()
    def alloc(self) -> None:
        free = self.free_ranges()
        at = self.window.alloc()
        if at is None:
            assert not free
        else:
            assert at // RANGE in free
            self.claimed.add(at // RANGE)

    def free_ranges(self) -> set[int]:
        used = {i for e in self.by_age for i in range(e.start, e.end)}
        return set(range(self.n)) - used - self.claimed

    @rule(at=numbers)
    def release(self, at: int) -> None:
        at %= self.n
        if at in self.claimed:
            self.window.release(at * RANGE)
            self.claimed.remove(at)
        else:
            same_error(lambda: self.window.release(at * RANGE), errno.EINVAL)

    @rule(at=numbers, aim=st.booleans())
    def get(self, at: int, aim: bool) -> None:
        at = self.aimed(at, aim)
        entry = self.beginning(at)
        if entry is None:
            same_error(lambda: self.window.get(at * RANGE), errno.ENOENT)
        else:
            self.window.get(at * RANGE)
            entry.users += 1

    @rule(at=numbers, aim=st.booleans())
    def put(self, at: int, aim: bool) -> None:
        at = self.aimed(at, aim)
        entry = self.beginning(at)
        if entry is None:
            same_error(lambda: self.window.put(at * RANGE), errno.ENOENT)
        elif entry.users == 0:
            same_error(lambda: self.window.put(at * RANGE), errno.EINVAL)
        else:
            entry.users -= 1
            assert self.window.put(at * RANGE) is (entry.users == 0)

    @rule(at=numbers)
    def upgrade(self, at: int) -> None:
        at = self.aimed(at, True)
        entry = self.beginning(at)
        if entry is None:
            same_error(lambda: self.window.set_writable(at * RANGE), errno.ENOENT)
        else:
            self.window.set_writable(at * RANGE)
            entry.writable = True

    @rule(at=numbers)
    def touch(self, at: int) -> None:
        at = self.aimed(at, True)
        entry = self.beginning(at)
        if entry is None:
            same_error(lambda: self.window.touch(at * RANGE), errno.ENOENT)
        else:
            self.window.touch(at * RANGE)
            self.by_age.remove(entry)
            self.by_age.append(entry)

    @rule(inode=st.integers(0, 4))
    def steal(self, inode: int) -> None:
        own = sorted((e for e in self.by_age if e.inode == inode), key=Entry.file_order)
        idle = next((e for e in own if e.users == 0), None)
        if not own:
            same_error(lambda: self.window.steal(inode), errno.ENOENT)
        elif idle is None:
            assert self.window.steal(inode) is None
        else:
            assert self.window.steal(inode) == idle.mapping
            self.drop(idle, True)

    @rule()
    def take_oldest(self) -> None:
        idle = next((e for e in self.by_age if e.users == 0), None)
        assert self.window.oldest_idle() == (idle and idle.mapping)
        assert self.window.take_oldest() == (idle and idle.mapping)
        if idle:
            self.drop(idle, True)

    @rule()
    def clear(self) -> None:
        self.window.clear()
        self.by_age.clear()
        self.claimed.clear()

    @rule(inode=st.integers(0, 4), foffset=st.integers(0, 130), byte=st.integers(0, RANGE - 1))
    def find(self, inode: int, foffset: int, byte: int) -> None:
        wanted = {
            (e.start + foffset - e.foffset) * RANGE
            for e in self.by_age
            if e.inode == inode and 0 <= foffset - e.foffset < e.n
        }
        found = self.window.find(inode, foffset * RANGE + byte)
        assert found in wanted if wanted else found is None

    @invariant()
    def agrees(self) -> None:
        window, entries = self.window, self.by_age
        assert window.mappings() == [e.mapping for e in entries]
        assert window.n_mapped == len(entries)
        assert window.n_busy == sum(e.users > 0 for e in entries)
        holders = [self.covering(i) for i in range(self.n)]
        for i, holder in enumerate(holders):
            assert window.at(i * RANGE + 1) == (holder and holder.mapping)
        assert bits(window.writable, self.n) == [bool(h and h.writable) for h in holders]
        assert bits(window.busy, self.n) == [bool(h and h.users) for h in holders]
        free = self.free_ranges()
        assert bits(window.free, self.n) == [i in free for i in range(self.n)]
        assert window.n_free == len(free)
        for inode in range(4):
            own = sorted((e for e in entries if e.inode == inode), key=Entry.file_order)
            assert window.has(inode) is bool(own)
            assert window.of(inode) == [e.mapping for e in own]


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_million_random_operations() -> None:
    """As a guest works: find, else take a free range, else steal one, else reclaim the oldest."""
    n, size = 512, 1 << 21
    random.seed(7)
    window = Window(n * size, size)
    model: OrderedDict[tuple[int, int], int] = OrderedDict()  # (inode, index) -> moffset, oldest first
    freed = 0
    numbers = random.choices(range(1 << 16), k=MILLION)
    for number in numbers:
        inode, index = number & 7, (number >> 3) % 100
        moffset = window.find(inode, index * size + number)
        assert moffset == model.get((inode, index))
        if number >> 13 == 0 and moffset is not None:
            window.unmap(moffset)
            del model[inode, index]
            freed += 1
        elif moffset is None:
            moffset = window.alloc()
            if moffset is None and number & 1024:
                # Every inode has some: 800 parts are asked for, 512 fit.
                was = window.steal(inode)
                assert was is not None and was.inode == inode
                moffset = model.pop((inode, was.foffset // size))
                assert moffset == was.moffset
            elif moffset is None:
                was = window.take_oldest()
                assert was is not None
                assert ((was.inode, was.foffset // size), was.moffset) == model.popitem(last=False)
                moffset = was.moffset
            window.map(moffset, size, inode, index * size, bool(number & 2048))
            model[inode, index] = moffset
    assert window.n_mapped == len(model) and window.n_free == n - len(model)
    assert sorted(m.moffset for m in window.mappings()) == sorted(model.values())
    assert freed > 1000 and window.counters()["stolen"] > 1000


def test_ranges_are_handed_out_in_turn() -> None:
    window = Window(3 * RANGE, RANGE)
    assert [window.alloc() for _ in range(4)] == [0, RANGE, 2 * RANGE, None]
    window.release(0)
    window.release(2 * RANGE)
    assert [window.alloc() for _ in range(3)] == [0, 2 * RANGE, None]


@pytest.mark.parametrize(
    ("size", "range_size"),
    [(0, RANGE), (RANGE - 1, RANGE), (RANGE + 1, RANGE), (3 * RANGE, 3 * 1024), (RANGE, 0), (2**50, RANGE)],
)
def test_a_window_of_another_size_is_refused(size: int, range_size: int) -> None:
    with pytest.raises(ValueError, match="range"):
        Window(size, range_size)


def test_offsets_between_ranges_are_refused() -> None:
    window = Window(4 * RANGE, RANGE)
    for call in (
        lambda: window.map(1, RANGE, 1, 0, True),
        lambda: window.map(0, RANGE + 1, 1, 0, True),
        lambda: window.map(0, RANGE, 1, 1, True),
        lambda: window.map(0, 0, 1, 0, True),
        lambda: window.map(4 * RANGE, RANGE, 1, 0, True),
        lambda: window.map(0, 2**64 - RANGE, 1, 0, True),
        lambda: window.map(0, RANGE, 1, 2**64 - RANGE, True) or window.at(2**63),
        lambda: window.cut(RANGE, 4 * RANGE),
        lambda: window.cut(2**64 - RANGE, 2 * RANGE),
        lambda: window.overlapping(8 * RANGE, RANGE),
        lambda: window.at(4 * RANGE),
    ):
        with pytest.raises(ValueError):
            call()


def test_a_window_keeps_the_numerics_library_from_starting_threads() -> None:
    import subprocess
    import sys

    code = (
        "import os, vfsd._dax\n"
        "from vfsd._dax import Window\n"
        "import sys; assert 'numpy' not in sys.modules\n"
        "Window(1 << 21, 4096); print(len(os.listdir('/proc/self/task')))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert out.stdout.strip() == "1", out.stderr
