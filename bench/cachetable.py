"""The table of cache modes: what each saves, and how old what a guest sees may be."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import catalogue
from .figures import figure
from .levels.programplan import CACHED, MODES, in_cache_table
from .model import FLOOR, Figure, Report, Result, Setting, Staleness

SEEN = {
    "attribute": "size", "content": "content", "created": "new name", "removed": "removed name",
}  # fmt: skip
"""Of a Staleness, with titles."""


@dataclass
class Mode:
    """One daemon in one mode. figures: by workload."""

    setting: Setting
    who: str
    figures: dict[str, Figure] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    staleness: Staleness | None = None

    @property
    def title(self) -> str:
        return mode_title(self.setting)

    @property
    def problem(self) -> tuple[bool, str] | None:
        """Whether it failed, and how; or why it is not offered. None: there is something to show."""
        parts: list[Result | Staleness] = list(self.results.values())
        parts += [self.staleness] if self.staleness else []
        if self.figures or (self.staleness and not self.staleness.failed and not self.staleness.missing):
            return None
        for part in parts:
            if part.failed:
                return True, part.failed
        return next(((False, f"not offered: {part.missing}") for part in parts if part.missing), (False, "-"))

    @property
    def oldest(self) -> str:
        """The longest that anything stayed old."""
        one = self.staleness
        if one is None or one.failed or one.missing:
            return ""
        values = [getattr(one, name) for name in SEEN]
        return late(None if None in values else max(values), one.limit)


def mode_title(setting: Setting) -> str:
    more = [name for name in ("writeback", "dax") if getattr(setting, name)]
    return " + ".join([{"none": "never"}.get(setting.cache, setting.cache), *more])


def late(seconds: float | None, limit: float) -> str:
    """How long something stayed old."""
    if seconds is None:
        return f"> {limit:g} s"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1e3:.0f} ms"


def workloads(report: Report) -> list[str]:
    """Those of the table that were measured."""
    there = {result.cell.workload for result in report.results if in_cache_table(result.cell)}
    return [name for name in CACHED if name in there]


def modes(report: Report) -> list[Mode]:
    """By setting, then by daemon."""
    found: dict[tuple[Setting, str], Mode] = {}
    for result in report.results:
        if result.who == FLOOR or not in_cache_table(result.cell):
            continue
        key = result.cell.setting, result.who
        mode = found.setdefault(key, Mode(*key))
        value = figure(result, 1)
        mode.results[result.cell.workload] = result
        if value is not None:
            mode.figures[result.cell.workload] = value
    for one in report.staleness:
        if one.setting.level == "mount":
            found.setdefault((one.setting, one.who), Mode(one.setting, one.who)).staleness = one
    order = {contestant.name: at for at, contestant in enumerate(report.contestants)}

    def place(mode: Mode) -> tuple[bool, bool, int, int]:
        setting = mode.setting
        return setting.dax, setting.writeback, MODES.index(setting.cache), order.get(mode.who, 0)

    return sorted(found.values(), key=place)


def seen(mode: Mode) -> list[str]:
    """Under SEEN."""
    one = mode.staleness
    if one is None or one.failed or one.missing:
        return ["-"] * len(SEEN)
    return [late(getattr(one, name), one.limit) for name in SEEN]


def things(workload: str) -> str:
    """What it does many of."""
    unit = catalogue.unit(workload)
    return "operations" if unit in ("op", "MB") else f"{unit}s"
