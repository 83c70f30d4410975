"""Every workload, really run, for a moment: vfsd, and the C daemon where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vfsd_bench import levels, runner
from vfsd_bench._floor import KINDS
from vfsd_bench.daemons import Pinning, found_targets
from vfsd_bench.fixture import Tree
from vfsd_bench.levels import plan
from vfsd_bench.levels.place import Place
from vfsd_bench.model import FLOOR, Cell, Errand, Report, Result, Setting
from vfsd_bench.profiles import MIB, PROFILES
from vfsd_bench.workloads import WORKLOADS

TINY = replace(
    PROFILES["quick"],
    rounds=1,
    seconds=0.004,
    warm=0.002,
    big=4 * MIB,
    large=300,
    known=300,
    dirty=MIB,
    opened=100,
)
ON_DISK = [name for name, row in WORKLOADS.items() if row.direct or name == "fsync"]
WITH_XATTR = [name for name, row in WORKLOADS.items() if row.xattr]
PLAIN = [name for name in WORKLOADS if name not in ON_DISK + WITH_XATTR]
CELLS = [
    *(Cell(Setting(), name, 4) for name in PLAIN),
    *(Cell(Setting(completions="event", queues=1, queue_size=128), name) for name in ("getattr", "create")),
    *(Cell(Setting(completions="event", queues=2), name, 8) for name in ("getattr", "read-4k", "write-4k")),
    *(Cell(Setting(xattr=True), name) for name in WITH_XATTR),
    *(Cell(Setting(backing="disk"), name) for name in ON_DISK),
]
ASIDE = Setting(completions="event", backing="disk")
ERRANDS = [Errand(what, ASIDE) for what in ("inodes", "handles", "caching", "fsync", "read")]
ERRANDS.append(Errand("lock", replace(ASIDE, locks=True)))
DAEMONS = [target.name for target in found_targets() if target.kind in ("vfsd", "c")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    base = tmp_path_factory.mktemp("wire")
    found = {name: Tree(base / name, TINY.big, TINY.large, TINY.known) for name in ("memory", "disk")}
    for tree in found.values():
        tree.own(FLOOR)
    place = Place(TINY, found, {}, Pinning(frozenset(), frozenset()), 10)
    made = runner.new_report(place)
    targets = [target for target in found_targets() if target.name in DAEMONS]
    runner.Run(place, targets, levels.make("wire", place), CELLS, ERRANDS, made, runner.Silent()).all()
    yield made
    for tree in found.values():
        tree.remove()


def find(report: Report, who: str, cell: Cell) -> Result:
    return next(result for result in report.results if result.who == who and result.cell == cell)


@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda cell: f"{cell.workload}-{cell.setting.queues}-{cell.depth}"
)
@pytest.mark.parametrize("who", DAEMONS)
def test_a_workload_runs(report: Report, who: str, cell: Cell) -> None:
    result = find(report, who, cell)
    assert result.failed is None, result.failed
    if result.missing is not None:
        assert cell.setting.queues > 1 or WORKLOADS[cell.workload].xattr, result.missing
        return
    (sample,) = result.samples
    row = WORKLOADS[cell.workload]
    assert sample.ops > 0 and sample.elapsed > 0 and sample.requests >= sample.ops
    assert 0 < sample.p50 <= sample.p99 <= sample.p999 <= sample.max
    assert sample.daemon_cpu > 0
    assert sample.bytes == sample.ops * row.block * (not row.at_end) or cell.workload == "create"
    # A daemon that polls need not be kicked at all in so short a time.
    assert cell.setting.completions == "poll" or sample.calls > 0


@pytest.mark.parametrize("name", [name for name, row in WORKLOADS.items() if row.floor])
def test_a_workload_has_a_floor(report: Report, name: str) -> None:
    found = [row for row in report.results if row.who == FLOOR and row.cell.workload == name]
    # What moves data has one for each depth: its buffers are as many.
    depths = {cell.depth if WORKLOADS[name].block else 1 for cell in CELLS if cell.workload == name}
    assert {row.cell.depth for row in found} == depths
    for result in found:
        assert result.missing is None or WORKLOADS[name].xattr or WORKLOADS[name].direct, result.missing
        assert result.missing or (result.samples[0].ops > 0 and result.samples[0].daemon_cpu > 0)


def test_each_kind_of_floor_has_its_workload() -> None:
    assert set(KINDS) == {row.floor for row in WORKLOADS.values() if row.floor}


def test_errands_are_done(report: Report) -> None:
    for one in report.contestants:
        assert one.failures == []
        assert [found.count for found in one.inodes] == [TINY.known]
        assert [found.count for found in one.handles] == [TINY.opened]
    for found in report.blocking:
        assert found.failed is None
        assert found.missing is None or found.who == "c", found.missing
        assert found.missing or (found.ops > 0 and found.max > 0 and found.slow > 0)
    assert {(found.what, found.who) for found in report.blocking} == {
        (what, who) for what in ("fsync", "read", "lock") for who in DAEMONS
    }
    for caching in report.caching:
        assert caching.failed is None and caching.missing is None and caching.attr == 1.0


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_names_only_what_there_is(name: str) -> None:
    cells = plan.cells(PROFILES[name])
    assert len(set(cells)) == len(cells)
    assert {cell.workload for cell in cells} <= set(WORKLOADS)
    assert all(cell.depth % cell.setting.queues == 0 for cell in cells)
    if name == "full":
        assert {cell.workload for cell in cells} == set(WORKLOADS)


def test_the_page_style_is_packaged() -> None:
    assert (Path(runner.__file__).parent / "page.css").is_file()
