"""What each profile measures on the wire: quick is a part of full."""

from __future__ import annotations

from collections.abc import Iterable

from ..model import Cell, Errand, Setting
from ..profiles import Profile
from ..workloads import WORKLOADS

DEPTHS = {"quick": (1, 32), "full": (1, 8, 32, 128)}
EVERY = tuple(name for name, row in WORKLOADS.items() if not row.direct and not row.xattr and name != "fsync")
DIRECT = tuple(name for name, row in WORKLOADS.items() if row.direct)
XATTR = tuple(name for name, row in WORKLOADS.items() if row.xattr)
# One of each kind: what else there is changes with depth, completions, queues and backing as these do.
KINDS = ("getattr", "lookup", "open-release", "create", "read-4k", "write-4k")
MORE_KINDS = (*KINDS, "lookup-new", "readdirplus-10", "read-128k")
SHARED = ("getattr", "read-4k", "read-1m")  # by several queues, or in a short one
ON_DISK = ("create", "mkdir-rmdir", "rename", "fsync", "read-4k", "write-4k", "read-1m", *DIRECT)
# Whose cost depends on what a guest may keep.
CACHED = ("getattr", "lookup", "lookup-absent", "open-release", "readdirplus-10")
# Long enough, or on one thing that all would change.
ONE_AT_A_TIME = {
    "readdir-10000", "readdirplus-10000", "readdirplus-1000-new", "readdirplus-10000-new", "setattr-size",
    "fsync",
}  # fmt: skip


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
    deep = DEPTHS[profile.name]
    found = across(Setting(), EVERY, (1, 32) if full else (1,))
    found += across(Setting(), MORE_KINDS if full else KINDS, deep)
    called = Setting(completions="event")
    found += across(called, (*MORE_KINDS, "readdir-10", "read-1m") if full else KINDS[::3], (1,))
    found += across(called, SHARED if full else SHARED[:2], (32,))
    found += across(Setting(xattr=True), XATTR, (1, 32) if full else (1,))
    found += across(Setting(backing="disk"), ON_DISK if full else ("fsync", "read-4k-direct"), (1,))
    if full:
        found += across(Setting(backing="disk"), ("read-4k", "read-4k-direct"), (32,))
    for queues in (2, 4) if full else (2,):
        found += across(Setting(completions="event", queues=queues), SHARED if full else SHARED[:2], (32,))
    for size in (128, 512) if full else (128,):
        found += across(Setting(queue_size=size), SHARED[:2] if full else SHARED[:1], (32,))
    for mode in ("none", "always", "metadata"):
        found += across(Setting(cache=mode), CACHED if full else CACHED[:1], (1,))
    if full:
        found += across(Setting(writeback=True), ("open-flush-release", "write-4k", "read-4k"), (1,))
    return list(dict.fromkeys(found))


def errands(profile: Profile) -> list[Errand]:
    """What is not in the table."""
    found = [Errand(what, Setting(completions="event")) for what in ("inodes", "handles")]
    found += [Errand(what, Setting(backing="disk")) for what in ("fsync", "read")]
    found.append(Errand("lock", Setting(backing="disk", locks=True)))
    modes = [(mode, False) for mode in ("none", "auto", "always", "metadata")]
    if profile.name == "full":
        modes += [(mode, True) for mode, _ in modes]
    found += [Errand("caching", Setting(completions="event", cache=mode, writeback=on)) for mode, on in modes]
    return found
