"""The bench's level dax in a Linux guest with a window, for a moment: `make test-dax` runs this."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the extra bench is not installed")

from vfsd_bench import levels, runner
from vfsd_bench.daemons import Pinning, found_targets
from vfsd_bench.fixture import Tree
from vfsd_bench.levels import daxguest
from vfsd_bench.levels.place import Place
from vfsd_bench.model import FLOOR
from vfsd_bench.profiles import MIB, PROFILES

pytestmark = pytest.mark.dax
TINY = replace(PROFILES["full"], rounds=1, seconds=0.2, warm=0.01, big=4 * MIB, large=300, known=300)


def test_a_guest_reads_and_maps_a_file(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--dax"):
        pytest.skip("make test-dax runs it")
    if why := daxguest.missing():
        pytest.skip(why)
    tree = Tree(tmp_path, TINY.big, TINY.large, TINY.known)
    tree.own(FLOOR)
    place = Place(TINY, {"memory": tree}, {}, Pinning(frozenset(), frozenset()), 10)
    report = runner.new_report(place)
    level = levels.make("dax", place)
    cells = [cell for cell in level.cells(TINY) if cell.setting == daxguest.SETTING]
    targets = [target for target in found_targets() if target.name == "vfsd"]
    runner.Run(place, targets, level, cells, [], report, runner.Silent()).all()
    found = {result.cell.workload: result for result in report.results if result.who == "vfsd"}
    assert set(found) == {"read-4k", "mapped-4k"}
    assert [result.failed or result.missing for result in found.values()] == [None, None]
    took = {name: result.samples[0].elapsed / result.samples[0].ops for name, result in found.items()}
    assert took["mapped-4k"] < took["read-4k"], "both were requests"
