"""What each profile measures by programs, in a mount and in a guest: quick is a part of full."""

from __future__ import annotations

from collections.abc import Iterable

from ..catalogue import TASKS
from ..model import Cell, Errand, Setting
from ..profiles import Profile

CACHE_TABLE_LEVEL = "mount"
MODES = ("none", "auto", "metadata", "always")
# Of the table of cache modes: attributes and names, names and contents, and data to write back.
CACHED = ("find-again", "grep-again", "fio-randwrite-4k")
QUICK = ("untar", "git-status", "npm", "fio-randread-4k", "fio-read-1m")
QUICK_CACHED = ("find-again",)
QUICK_GUEST = ("untar", "find", "fio-randread-4k")
FULL_GUEST = (
    "untar", "rm", "git-status", "git-clone", "find", "grep", "sqlite",
    "fio-randread-4k", "fio-randwrite-4k", "fio-randread-4k-aio-direct", "fio-read-1m", "fio-write-1m",
)  # fmt: skip


def cells_of(setting: Setting, names: Iterable[str]) -> list[Cell]:
    return [Cell(setting, name, TASKS[name].depth) for name in names]


def mounted(cache: str = "auto", writeback: bool = False, dax: bool = False) -> Setting:
    return Setting("mount", completions="event", cache=cache, writeback=writeback, dax=dax)


def booted(guest: str) -> Setting:
    return Setting("guest", completions="event", guest=guest)


def cache_settings(profile: Profile) -> list[Setting]:
    """The rows of the table of cache modes."""
    found = [mounted(mode) for mode in MODES]
    if profile.name == "full":
        found += [mounted(mode, writeback=True) for mode in MODES]
        found.append(mounted(dax=True))
    return found


def in_cache_table(cell: Cell) -> bool:
    """Of any profile."""
    setting = cell.setting
    mode = mounted(setting.cache, setting.writeback, setting.dax)
    return cell.workload in CACHED and setting == mode


def mount_cells(profile: Profile) -> list[Cell]:
    full = profile.name == "full"
    found = cells_of(mounted(), TASKS if full else QUICK)
    for setting in cache_settings(profile):
        found += cells_of(setting, CACHED if full else QUICK_CACHED)
    return list(dict.fromkeys(found))


def mount_errands(profile: Profile) -> list[Errand]:
    return [Errand("staleness", setting) for setting in cache_settings(profile)]


def guest_cells(profile: Profile, guest: str) -> list[Cell]:
    return cells_of(booted(guest), FULL_GUEST if profile.name == "full" else QUICK_GUEST)


def guest_errands(profile: Profile, guest: str) -> list[Errand]:
    return [Errand("staleness", booted(guest))]
