"""Two reports: what has changed, and what is within noise."""

from __future__ import annotations

from dataclasses import dataclass

from .figures import DIFFERENT, Row, rows
from .model import FLOOR, Figure, Report

ROUNDS_MIN = 3  # below that nothing is known of the spread


@dataclass(frozen=True)
class Change:
    """One daemon in one cell. ratio: new time by old time; verdict: faster, slower, noise, or why none."""

    who: str
    row: Row
    old: Figure | None
    new: Figure | None
    ratio: float | None
    verdict: str


def verdict(old: Figure, new: Figure) -> str:
    """A difference is one only if the medians are more than 5 % apart, and no round of the one was as
    good as a round of the other."""
    ratio = new.us / old.us
    if min(old.rounds, new.rounds) < ROUNDS_MIN:
        return "too few rounds"
    if abs(ratio - 1) <= DIFFERENT or (new.low <= old.high and old.low <= new.high):
        return "noise"
    return "faster" if ratio < 1 else "slower"


def changes(old: Report, new: Report) -> list[Change]:
    """Of what is in both."""
    before = {row.cell: row for row in rows(old)}
    found = []
    for row in rows(new):
        if row.cell not in before:
            continue
        then = before[row.cell]
        for who, result in row.results.items():
            if who in then.results:
                found.append(change(who, row, then.figures[who], row.figures[who], result.failed))
        if then.floor and row.floor and row.cell.depth == 1:
            found.append(change(FLOOR, row, then.floor, row.floor, None))
    return found


def change(who: str, row: Row, old: Figure | None, new: Figure | None, failed: str | None) -> Change:
    if old and new:
        return Change(who, row, old, new, new.us / old.us, verdict(old, new))
    if failed:
        return Change(who, row, old, new, None, "FAILED")
    return Change(who, row, old, new, None, "no longer measured" if old else "not measured before")


def differences(old: Report, new: Report) -> list[str]:
    """What else was not the same: then ratios say little."""
    found = [
        f"{key}: {old.machine.get(key, 'unknown')} then, {value} now"
        for key, value in new.machine.items()
        if old.machine.get(key) != value and key not in ("load before", "vfsd")
    ]
    versions = {contestant.name: contestant.version for contestant in old.contestants}
    found += [
        f"version of {contestant.name}: {versions[contestant.name]} then, {contestant.version} now"
        for contestant in new.contestants
        if versions.get(contestant.name, contestant.version) != contestant.version
    ]
    if (old.profile, old.rounds, old.seconds) != (new.profile, new.rounds, new.seconds):
        found.append(f"profile: {old.profile} then, {new.profile} now")
    return found
