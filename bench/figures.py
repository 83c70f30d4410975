"""From samples to what is shown: medians, spreads, ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from . import catalogue
from .model import FLOOR, Cell, Figure, Report, Result, Sample, Setting

QUIET = 0.05  # a sample in which others used more of the CPUs is left out, if enough are without
DIFFERENT = 0.05  # what is smaller is never called a difference


def items(report: Report, workload: str) -> int:
    """How many things one operation of it does."""
    return catalogue.items(workload, int(report.machine.get("entries of the large directory", "10000")))


def quiet(samples: Sequence[Sample]) -> tuple[list[Sample], bool]:
    """Those to take the median of, and whether too few were undisturbed to leave the others out."""
    undisturbed = [sample for sample in samples if sample.foreign <= QUIET]
    if 2 * len(undisturbed) >= len(samples):
        return undisturbed, False
    return list(samples), True


def figure(result: Result, per_op: int) -> Figure | None:
    """None: nothing was measured."""
    found = result.summary or summary(result.samples)
    return found.by(per_op) if found else None


def summary(samples: Sequence[Sample]) -> Figure | None:
    """By operation. None: nothing was measured."""
    used, noisy = quiet([sample for sample in samples if sample.ops])
    if not used:
        return None

    def middle(values: Sequence[float]) -> float:
        return float(median(values))

    us = [sample.elapsed / sample.ops * 1e6 for sample in used]
    return Figure(
        us=middle(us),
        low=min(us),
        high=max(us),
        mb_per_second=middle([sample.bytes / sample.elapsed / 1e6 for sample in used]),
        p50=middle([sample.p50 for sample in used]) / 1e3,
        p99=middle([sample.p99 for sample in used]) / 1e3,
        p999=middle([sample.p999 for sample in used]) / 1e3,
        max=max(sample.max for sample in used) / 1e3,
        cpu=middle([sample.daemon_cpu / sample.ops * 1e6 for sample in used]),
        requests=middle([sample.requests / sample.ops for sample in used]),
        kicks=middle([sample.kicks / max(1, sample.requests) for sample in used]),
        calls=middle([sample.calls / max(1, sample.requests) for sample in used]),
        rounds=len(used),
        noisy=noisy,
    )


@dataclass
class Row:
    """A cell, with what everybody reached in it."""

    cell: Cell
    floor: Figure | None
    results: dict[str, Result]
    figures: dict[str, Figure | None]

    @property
    def title(self) -> str:
        return catalogue.title(self.cell.workload)

    @property
    def unit(self) -> str:
        return catalogue.unit(self.cell.workload)

    @property
    def by(self) -> str:
        """What figures are by, unless it is an operation."""
        return "" if self.unit in ("op", "MB") else self.unit

    def ratio(self, who: str, to: str) -> float | None:
        """How many times as long `who` takes as `to`, which may be the floor."""
        mine, other = self.figures.get(who), self.floor if to == FLOOR else self.figures.get(to)
        return mine.us / other.us if mine and other else None


def names(report: Report) -> list[str]:
    """The columns, without the floor."""
    return [contestant.name for contestant in report.contestants]


def rows(report: Report) -> list[Row]:
    """In the order of the cells."""
    found: dict[Cell, Row] = {}
    floors: dict[tuple[str, str, str, int], Figure | None] = {}
    for result in report.results:
        value = figure(result, items(report, result.cell.workload))
        if result.who == FLOOR:
            floors[floor_key(result.cell, result.cell.depth)] = value
            continue
        row = found.setdefault(result.cell, Row(result.cell, None, {}, {}))
        row.results[result.who] = result
        row.figures[result.who] = value
    for row in found.values():
        row.floor = floors.get(floor_key(row.cell, row.cell.depth)) or floors.get(floor_key(row.cell, 1))
    return list(found.values())


def floor_key(cell: Cell, depth: int) -> tuple[str, str, str, int]:
    """Cells with the same one have the same floor; a mount's is a guest's too. Most have depth 1 alone."""
    level = "mount" if cell.setting.level == "guest" else cell.setting.level
    return level, cell.workload, cell.setting.backing, depth


def by_setting(report: Report) -> dict[Setting, list[Row]]:
    """Rows in groups, one table each."""
    found: dict[Setting, list[Row]] = {}
    for row in rows(report):
        found.setdefault(row.cell.setting, []).append(row)
    return found


def amount(us: float) -> str:
    """Microseconds, with three digits that count."""
    if us >= 100:
        return f"{us:,.0f}"
    return f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def times(ratio: float | None) -> str:
    """A ratio."""
    if ratio is None:
        return ""
    return f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"
