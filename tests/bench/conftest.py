"""A small report, made by hand: figures are known."""

from __future__ import annotations

import pytest

pytest.importorskip("rich", reason="the extra bench is not installed")
pytest.importorskip("vfsd_bench._load", reason="the benchmark suite is not built")

from vfsd_bench.model import (
    FLOOR,
    Blocking,
    Caching,
    Cell,
    Contestant,
    Memory,
    Report,
    Result,
    Sample,
    Setting,
    Staleness,
    Start,
)


def sample(us: float, ops: int = 1000, foreign: float = 0.0) -> Sample:
    """One round in which an operation took so long."""
    ns = us * 1e3
    return Sample(
        ops, us * ops / 1e6, 4096 * ops, ops, ops, 3, us * ops / 2e6, foreign, ns, 2 * ns, 3 * ns, 4 * ns
    )


def result(who: str, cell: Cell, *us: float) -> Result:
    return Result(cell, who, [sample(one) for one in us])


@pytest.fixture
def report() -> Report:
    """Two daemons, one of which failed somewhere, and the floor."""
    getattr_, read = Cell(Setting(), "getattr"), Cell(Setting(), "read-4k", 32)
    made = Report("2026-01-02T03:04:05+00:00", ["vfsd", "bench"], "quick", 3, 0.1, {"cpu": "a <cpu> & more"})
    made.results = [
        result("vfsd", getattr_, 2.0, 2.1, 1.9),
        result("c", getattr_, 4.0, 4.2, 3.9),
        result(FLOOR, getattr_, 0.5, 0.5, 0.6),
        result("vfsd", read, 3.0, 3.1, 2.9),
        Result(read, "c", failed="READ answered EIO, not success"),
    ]
    made.contestants = [
        Contestant(
            "vfsd",
            "1.0",
            {"wire": ["vfsd", "serve"]},
            [Start("wire", 0.2, 20_000_000)],
            [Memory(1000, 10**6)],
            [Memory(100, 10**5)],
        ),
        Contestant("c", "<b>2.0</b>", failures=["read-4k: READ answered EIO, not success"]),
    ]
    made.blocking = [
        Blocking("wire", "fsync", "vfsd", 1.0, 2e3, 3e3, 1e9, 1e9, 17),
        Blocking("wire", "fsync", "c", missing="there is no disk"),
    ]
    made.caching = [Caching("auto", "vfsd", 1.0, 1.0), Caching("auto", "c", failed="died")]
    always = Setting("mount", completions="event", cache="always")
    untar, find = Cell(Setting("mount", completions="event"), "untar"), Cell(always, "find-again")
    made.results += [
        result("vfsd", untar, 50.0, 51.0, 49.0),
        result(FLOOR, untar, 10.0, 10.0, 10.0),
        result("vfsd", find, 5.0, 5.0, 5.0),
        Result(find, "c", missing="has no cache mode always"),
    ]
    made.staleness = [
        Staleness(always, "vfsd", 2.0, 1.5, None, 0.004, 0.25),
        Staleness(Setting("guest", completions="event", guest="uml"), "c", failed="hung"),
    ]
    made.skipped = [{"level": "guest", "reason": "there is no user-mode Linux"}]
    return made
