"""The suite's own modules: in which direction they import each other, and that all of them are packaged."""

from __future__ import annotations

import ast
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


def module(path: Path) -> str:
    parts = path.relative_to(BENCH).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, modules: set[str]) -> set[str]:
    """What a module imports of ours, also for types only."""
    package = path.relative_to(BENCH).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            origin = ".".join(part for part in base if part)
            names = {".".join(filter(None, (origin, alias.name))) for alias in node.names}
            found |= (names & modules) or {origin}
    return found - {module(path), ""}


def test_imports_go_round_in_no_circle() -> None:
    paths = sorted(BENCH.rglob("*.py"))
    modules = {module(path) for path in paths}
    graph = {module(path): imported(path, modules) for path in paths}
    assert graph["levels.wire"] >= {"model", "levels.session", "levels.blocking"}
    list(TopologicalSorter(graph).static_order())  # CycleError


def test_all_packages_are_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {f"vfsd_bench.{module(path)}".rstrip(".") for path in BENCH.rglob("__init__.py")}
    assert there <= set(listed)
