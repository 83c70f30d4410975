"""A notification is lost by no order in which two CPUs' stores can become visible.

Each side stores its own word and then looks at the other's, to tell whether to notify, or to sleep. A CPU may
keep a store to itself until after a later load (x86 and all others); only a full fence has it out first. On
real threads that shows once in millions of times, so here every order is tried, for the stores, fences and
loads in the order in which the sources have them.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vfsd

SOURCES = Path(inspect.getfile(vfsd)).parent
USED, EVENT, AVAIL, AVAIL_EVENT = "used.idx", "used_event", "avail.idx", "avail_event"
STEP = re.compile(r"(store|load)_\w+_u16\(|(full_fence)\(\)")
Step = tuple[str, str]  # store or load, and of what; or a fence


def steps(path: str, function: str, words: dict[str, str]) -> list[Step]:
    """Of a function's source. words: what each of its words is, by how the line has it."""
    text = (SOURCES / path).read_text()
    (body,) = re.findall(rf"^cdef \w+ {function}\(.*?(?=^\S)", text, re.DOTALL | re.MULTILINE)
    found = []
    for line in body.splitlines():
        step = STEP.search(line)
        if step is None:
            continue
        if step[2]:
            found.append(("fence", ""))
            continue
        found += [(step[1], word) for pattern, word in words.items() if pattern in line]
    return found


def outcomes(*programs: list[Step]) -> set[tuple[bool, ...]]:
    """What the two can see: whether each one's load found the other's store."""
    found = set()
    Cpu = tuple[int, tuple[str, ...], bool]  # step, stores not out yet, whether it saw
    begin: tuple[tuple[Cpu, ...], frozenset[str]] = (((0, (), False), (0, (), False)), frozenset())
    todo = [begin]
    while todo:
        cpus, memory = todo.pop()
        after = [
            ((*cpus[:side], (step, buffer, cpus[side][2] or saw), *cpus[side + 1 :]), written)
            for side, program in enumerate(programs)
            for step, buffer, written, saw in moves(program, *cpus[side][:2], memory)
        ]
        todo += after
        if not after:
            found.add(tuple(saw for _, _, saw in cpus))
    return found


def moves(
    program: list[Step], at: int, buffer: tuple[str, ...], memory: frozenset[str]
) -> Iterator[tuple[int, tuple[str, ...], frozenset[str], bool]]:
    """What one CPU may do next: step, store buffer, memory, whether a load found the store."""
    if buffer:  # the oldest store goes out
        yield at, buffer[1:], memory | {buffer[0]}, False
    if at == len(program):
        return
    what, word = program[at]
    if what == "store":
        yield at + 1, (*buffer, word), memory, False
    elif what == "load":
        yield at + 1, buffer, memory, word in memory
    elif not buffer:
        yield at + 1, buffer, memory, False


CALL = (
    steps("_ring.pyx", "ring_push_batch", {"r.used[1]": USED})
    + steps("_ring.pyx", "ring_wants_call", {"used_event(": EVENT}),
    steps("virtqueue/_driver_ring.pyx", "driver_enable_call", {"used_event(": EVENT, "d.used[1]": USED}),
)
KICK = (
    steps("virtqueue/_driver_ring.pyx", "driver_publish", {"d.avail[1]": AVAIL})
    + steps("virtqueue/_driver_ring.pyx", "driver_wants_kick", {"avail_event(": AVAIL_EVENT}),
    steps("_ring.pyx", "ring_enable_kick", {"avail_event(": AVAIL_EVENT, "r.avail[1]": AVAIL}),
)
NOTIFICATIONS = pytest.mark.parametrize(("tells", "sleeps"), [CALL, KICK], ids=["call", "kick"])


@NOTIFICATIONS
def test_no_notification_is_lost(tells: list[Step], sleeps: list[Step]) -> None:
    for program in (tells, sleeps):
        assert [what for what, _ in program] == ["store", "fence", "load"]
    assert (False, False) not in outcomes(tells, sleeps)


@NOTIFICATIONS
def test_each_fence_is_needed(tells: list[Step], sleeps: list[Step]) -> None:
    """Or the model would find nothing."""
    for pair in ((without_fence(tells), sleeps), (tells, without_fence(sleeps))):
        assert (False, False) in outcomes(*pair)


def without_fence(program: list[Step]) -> list[Step]:
    return [step for step in program if step[0] != "fence"]
