"""The level dax, really run, for a moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vfsd_bench import levels, page, reportfile, runner, terminal
from vfsd_bench.daemons import Pinning, found_targets
from vfsd_bench.fixture import Tree
from vfsd_bench.levels.place import Place
from vfsd_bench.model import FLOOR
from vfsd_bench.profiles import MIB, PROFILES

TINY = replace(PROFILES["quick"], rounds=1, seconds=0.004, warm=0.002, big=4 * MIB, large=300, known=300)


def test_every_cell_has_a_figure_and_the_page_cache_is_not_copied(tmp_path: Path) -> None:
    tree = Tree(tmp_path, TINY.big, TINY.large, TINY.known)
    tree.own(FLOOR)
    place = Place(TINY, {"memory": tree}, {}, Pinning(frozenset(), frozenset()), 10)
    report = runner.new_report(place)
    targets = [target for target in found_targets() if target.name == "vfsd"]
    level = levels.make("dax", place)
    runner.Run(place, targets, level, level.cells(TINY), level.errands(TINY), report, runner.Silent()).all()
    assert not report.contestants[0].failures
    for result in report.results:
        assert result.missing is None and result.failed is None and result.samples[0].ops > 0, result
    assert {result.cell.workload for result in report.results} == {"read-4k", "mapped-4k", "mapped-1m"}
    (found,) = report.pagecache
    assert (found.size, found.copied, found.own, found.shared) == (TINY.big, TINY.big, 0, TINY.big)
    assert reportfile.parse(report.plain()) == report
    assert terminal.page_cache(report).row_count == 1
    shown = page.page(report)
    assert "<h2>In a DAX window: " in shown
    assert "<td>4.2</td><td>4.2</td><td>0.0</td><td>2 -&gt; 1</td>" in shown
