"""Runs everything: fresh daemons in turn, A B C A B C, each cell as often as the profile has rounds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

from .daemons import Running, Target
from .fixture import file_system
from .level import Level, Session
from .levels.place import Place
from .machine import facts
from .model import (
    FLOOR,
    Blocking,
    Caching,
    Cell,
    Contestant,
    Errand,
    Failed,
    Memory,
    NotOffered,
    PageCache,
    Report,
    Result,
    Setting,
    Staleness,
    Start,
)  # fmt: skip

STRIKES = 2  # starts in a row that come to nothing, after which a daemon is out


class Progress(Protocol):
    """Told what is going on. total: how many steps there will be."""

    def begin(self, total: int) -> None: ...
    def step(self, text: str) -> None: ...


class Silent:
    """Nobody looks."""

    def begin(self, total: int) -> None: ...
    def step(self, text: str) -> None: ...


def chunks(cells: Sequence[Cell], size: int, fresh: Callable[[Cell], bool]) -> list[list[Cell]]:
    """Parts of one setting each, and of at most so many cells. fresh: whether a cell must begin one."""
    found: list[list[Cell]] = []
    for cell in cells:
        last = found[-1] if found else []
        if not last or len(last) == size or last[0].setting != cell.setting or fresh(cell):
            found.append([])
        found[-1].append(cell)
    return found


class Entrant:
    """A target in the course of a run."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.shown = Contestant(target.name, target.version())
        self.strikes = 0
        self.out: str | None = None

    def fail(self, why: str, where: str) -> None:
        """Once for each reason: the same one mostly strikes everywhere."""
        if not any(text.endswith(why) for text in self.shown.failures):
            self.shown.failures.append(f"{where}: {why}")

    def strike(self, why: str) -> None:
        self.strikes += 1
        if self.strikes >= STRIKES:
            self.out = f"given up after {STRIKES} starts in a row: {why}"


class Run:
    """One run of a level. cells, errands: already chosen. What goes wrong is in the report."""

    def __init__(
        self, place: Place, targets: Sequence[Target], level: Level, cells: Sequence[Cell],
        errands: Sequence[Errand], report: Report, progress: Progress,
    ) -> None:  # fmt: skip
        self.place = place
        self.level = level
        self.cells = cells
        self.errands = errands
        self.report = report
        self.progress = progress
        self.entrants = [Entrant(target) for target in targets]
        self.results: dict[tuple[Cell, str], Result] = {}

    def all(self) -> None:
        """Everything."""
        rounds = self.level.rounds(self.place.profile)
        self.progress.begin(
            rounds * len(self.cells) * (len(self.entrants) + 1) + len(self.errands) * len(self.entrants)
        )
        for number in range(rounds):
            done = {one.cell for one in self.report.results if one.who == FLOOR}  # and of this round
            for cells in chunks(self.cells, self.level.chunk, self.level.fresh):
                self._chunk(number, cells, done)
        for errand in self.errands:
            for entrant in self.entrants:
                self._errand(entrant, errand)
        self._enter()
        self.report.results += list(self.results.values())

    def _enter(self) -> None:
        """A daemon that was there at another level is the same one."""
        there = {one.name: one for one in self.report.contestants}
        for entrant in self.entrants:
            one, before = entrant.shown, there.get(entrant.shown.name)
            if before is None:
                self.report.contestants.append(one)
                continue
            before.commands |= one.commands
            for name in ("starts", "inodes", "handles", "failures"):
                getattr(before, name).extend(getattr(one, name))

    def _result(self, cell: Cell, who: str) -> Result:
        return self.results.setdefault((cell, who), Result(cell, who))

    def _chunk(self, number: int, cells: list[Cell], done: set[Cell]) -> None:
        """Each daemon, and the floor, in an order that changes from round to round."""
        turns: list[Entrant | None] = [*self.entrants, None]
        by = number % len(turns)
        for entrant in turns[by:] + turns[:by]:
            if entrant is None:
                self._floors(cells, done)
            else:
                self._cells(entrant, cells)

    def _floors(self, cells: list[Cell], done: set[Cell]) -> None:
        """Once a round is enough for all cells that have the same one."""
        profile = self.place.profile
        for cell in cells:
            self.progress.step(f"{FLOOR}  {cell.id}")
            key = self.level.floor_cell(cell)
            if key in done or cell.setting.backing not in self.place.trees:
                continue
            done.add(key)
            result = self._result(key, FLOOR)
            try:
                result.samples.append(self.level.floor(cell, profile.seconds, profile.warm))
            except (NotOffered, Failed) as problem:
                result.missing = str(problem)

    def _cells(self, entrant: Entrant, cells: list[Cell]) -> None:
        """From a fresh start, and from another one after each failure."""
        todo = list(cells)
        while todo and entrant.out is None:
            ready = False
            try:
                with self._started(entrant, todo[0].setting) as session:
                    ready = True
                    while todo:
                        self._cell(entrant, session, todo[0])
                        todo.pop(0)
            except NotOffered as problem:
                self._all(entrant, todo, missing=str(problem))
                return
            except Failed as problem:
                if not ready:
                    entrant.strike(str(problem))
                    self._all(entrant, todo, failed=str(problem))
                    return
                self._fail(entrant, todo.pop(0), str(problem))
        self._all(entrant, todo, failed=entrant.out)

    def _all(
        self, entrant: Entrant, cells: list[Cell], failed: str | None = None, missing: str | None = None
    ) -> None:
        """What none of these could be measured for."""
        for cell in cells:
            self.progress.step(f"{entrant.target.name}  {cell.id}")
            if failed is not None:
                self._fail(entrant, cell, failed)
            else:
                self._result(cell, entrant.target.name).missing = missing

    def _cell(self, entrant: Entrant, session: Session, cell: Cell) -> None:
        self.progress.step(f"{entrant.target.name}  {cell.id}")
        result = self._result(cell, entrant.target.name)
        if result.failed or result.missing:
            return
        profile = self.place.profile
        try:
            result.samples.append(session.run(cell, profile.seconds, profile.warm))
        except NotOffered as problem:
            result.missing = str(problem)
        entrant.strikes = 0

    def _fail(self, entrant: Entrant, cell: Cell, why: str) -> None:
        result = self._result(cell, entrant.target.name)
        if result.failed is None:
            result.failed = why
            result.samples.clear()
            entrant.fail(why, f"{cell.workload} at depth {cell.depth}, {cell.setting.id}")

    @contextmanager
    def _started(self, entrant: Entrant, setting: Setting) -> Iterator[Session]:
        """A fresh daemon with its own directory as it should be. Failed, NotOffered."""
        target = entrant.target
        if setting.backing not in self.place.trees:
            raise NotOffered(self.place.missing[setting.backing])
        tree = self.place.trees[setting.backing]
        tree.own(target.name)
        running = Running(target, setting, tree.base, self.place.pinning, self.place.no_reply)
        try:
            entrant.shown.commands[setting.id] = running.argv
            with self.level.session(target, running, setting) as session:
                entrant.shown.starts.append(Start(setting.id, running.listening, running.resident()))
                yield session
        finally:
            running.end()

    def _errand(self, entrant: Entrant, errand: Errand) -> None:
        """What is measured once."""
        self.progress.step(f"{entrant.target.name}  {errand.what}  {errand.setting.id}")
        failed = missing = None
        try:
            if entrant.out is not None:
                raise Failed(entrant.out)
            with self.level.around(errand, entrant.target), self._started(entrant, errand.setting) as session:
                self._do(entrant, session, errand)
            return
        except NotOffered as problem:
            missing = str(problem)
        except Failed as problem:
            failed = str(problem)
            entrant.fail(failed, errand.what)
        self._nothing(entrant.target.name, errand, failed, missing)

    def _nothing(self, who: str, errand: Errand, failed: str | None, missing: str | None) -> None:
        """There is nothing to show for an errand."""
        setting, report = errand.setting, self.report
        if errand.what == "caching":
            report.caching.append(
                Caching(setting.cache, who, writeback=setting.writeback, failed=failed, missing=missing)
            )
        elif errand.what == "pagecache":
            report.pagecache.append(PageCache(setting, who, failed=failed, missing=missing))
        elif errand.what == "staleness":
            report.staleness.append(Staleness(setting, who, failed=failed, missing=missing))
        elif errand.what in ("inodes", "handles"):
            report.notes.append(f"{who}: memory of {errand.what}: {failed or missing}")
        else:
            report.blocking.append(Blocking(setting.id, errand.what, who, failed=failed, missing=missing))

    def _do(self, entrant: Entrant, session: Session, errand: Errand) -> None:
        found = session.errand(errand.what)
        if isinstance(found, Memory):
            (entrant.shown.inodes if errand.what == "inodes" else entrant.shown.handles).append(found)
        elif isinstance(found, Caching):
            self.report.caching.append(found)
        elif isinstance(found, PageCache):
            self.report.pagecache.append(found)
        elif isinstance(found, Staleness):
            self.report.staleness.append(found)
        else:
            self.report.blocking.append(found)


def new_report(place: Place) -> Report:
    """Empty, with the facts."""
    profile = place.profile
    report = Report(
        datetime.now(UTC).isoformat(timespec="seconds"), sys.argv, profile.name, profile.rounds,
        profile.seconds, facts(),
    )  # fmt: skip
    report.machine["entries of the large directory"] = str(profile.large)
    for backing, tree in place.trees.items():
        report.machine[f"{backing} files on"] = file_system(tree.base)
    for who, cpus in (("daemons", place.pinning.daemon), ("front end", place.pinning.front)):
        report.machine[f"CPUs of the {who}"] = ", ".join(map(str, sorted(cpus))) or "any"
    report.notes += [f"{backing}: {why}" for backing, why in place.missing.items()]
    return report
