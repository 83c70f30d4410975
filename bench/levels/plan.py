"""What each profile measures on the wire: quick is a part of full."""

from __future__ import annotations

from collections.abc import Iterable

from ..model import Cell, Errand, Setting
from ..profiles import Profile
from ..workloads import WORKLOADS

DEPTHS = {"quick": (1, 32), "full": (1, 8, 32, 128)}
EVERY = tuple(name for name, row in WORKLOADS.items() if not row.direct and not row.xattr and name != "fsync")
DIRECT = tuple(name for name, row in WORKLOADS.items() if row.direct)
# Long enough, or on one thing that all would change.
ONE_AT_A_TIME = {"readdir-10000", "readdirplus-10000", "readdirplus-10000-new", "setattr-size", "fsync"}
# Whose cost depends on what a guest may keep.
CACHED = ("getattr", "lookup", "lookup-absent", "open-release", "open-flush-release", "readdirplus-10")


def across(setting: Setting, names: Iterable[str], depths: Iterable[int]) -> list[Cell]:
    """Each workload at each depth that makes sense for it."""
    return [
        Cell(setting, name, depth)
        for name in names
        for depth in depths
        if depth == 1 or name not in ONE_AT_A_TIME
    ]


def cells(profile: Profile) -> list[Cell]:
    """In the order in which it is measured; what shares a setting stands together."""
    full = profile.name == "full"
    depths = DEPTHS[profile.name]
    few = ("getattr", "read-4k", "write-4k", "read-1m") if full else ("getattr", "read-4k")
    found = across(Setting(), EVERY, depths)
    called = EVERY if full else ("getattr", "lookup", "create", "read-4k")
    found += across(Setting(completions="event"), called, depths)
    found += across(Setting(xattr=True), ("getxattr",), depths)
    found += across(Setting(backing="disk"),
                    (*EVERY, "fsync", *DIRECT) if full else ("create", "fsync", "read-4k", "read-4k-direct"),
                    (1, 32) if full else (1,))  # fmt: skip
    for queues in (1, 2, 4) if full else (2,):
        found += across(Setting(completions="event", queues=queues), few, (32, 128) if full else (32,))
    for size in (128, 256, 512) if full else (128,):
        found += across(Setting(queue_size=size), few, (32, 128) if full else (32,))
    for mode in ("none", "always", "metadata"):
        found += across(Setting(cache=mode), CACHED if full else CACHED[:4], (1,))
    if full:
        for mode in ("auto", "always"):
            found += across(
                Setting(cache=mode, writeback=True), ("open-flush-release", "write-4k", "read-4k"), (1,)
            )
    return list(dict.fromkeys(found))


def errands(profile: Profile) -> list[Errand]:
    """What is not in the table."""
    found = [Errand("inodes", Setting(completions="event"))]
    found += [Errand(what, Setting(backing="disk")) for what in ("fsync", "read", "lock")]
    modes = [(mode, False) for mode in ("none", "auto", "always", "metadata")]
    if profile.name == "full":
        modes += [(mode, True) for mode, _ in modes]
    found += [Errand("caching", Setting(completions="event", cache=mode, writeback=on)) for mode, on in modes]
    return found
