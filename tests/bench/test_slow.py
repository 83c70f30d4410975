"""The slow file system, and the level that measures daemons on it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vfsd_bench import levels, runner
from vfsd_bench.daemons import Pinning, Target
from vfsd_bench.fixture import Tree
from vfsd_bench.levels.place import Place
from vfsd_bench.levels.slow import setting
from vfsd_bench.model import Cell
from vfsd_bench.slowmount import SlowMount, slow_mount

from .test_wire import TINY

DELAY_S = 0.05

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"
)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[SlowMount]:
    with slow_mount(tmp_path / "source", tmp_path / "mount", 0) as mount:
        yield mount


def test_it_is_the_source(mount: SlowMount) -> None:
    (mount.directory / "d").mkdir()
    (mount.directory / "d" / "f").write_text("data")
    os.rename(mount.directory / "d" / "f", mount.directory / "g")
    assert (mount.source / "g").read_text() == "data"
    assert sorted(os.listdir(mount.directory)) == ["d", "g"]
    assert os.listdir(mount.source / "d") == []


def test_an_operation_is_delayed_alone(mount: SlowMount) -> None:
    (mount.source / "f").touch()
    mount.set_delay("SETATTR", int(DELAY_S * 1e6))
    began = time.monotonic()
    os.chmod(mount.directory / "f", 0o600)
    assert time.monotonic() - began >= DELAY_S
    assert (mount.source / "f").stat().st_mode & 0o777 == 0o600


def test_the_level_measures(mount: SlowMount) -> None:
    tree = Tree(mount.directory, TINY.big, TINY.large, TINY.known, mount.source)
    place = Place(TINY, {"slow": tree}, {}, Pinning(frozenset(), frozenset()), 10)
    made = runner.new_report(place)
    cells = [Cell(setting(), name, 4) for name in ("getattr", "create", "write-4k", "readdirplus-1000-new")]
    runner.Run(
        place, [Target("vfsd", "vfsd")], levels.make("slow", place), cells, [], made, runner.Silent()
    ).all()
    assert made.contestants[0].failures == []
    found = {result.cell: result for result in made.results if result.who == "vfsd"}
    assert all(found[cell].samples[0].ops > 0 for cell in cells)
