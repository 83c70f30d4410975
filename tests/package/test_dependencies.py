"""What the sources import is declared in pyproject.toml, and what is declared is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"vfsd", "vfsd_bench"}
# Modules that need an extra, by the extra's name; all others do with the dependencies alone.
EXTRAS = {"fsspec": ["vfsd/guest/face/fsspec.py"], "bench": ["bench"]}
OF_THE_CHECKOUT = {"guests"}  # tools/guests, which bench/harness.py finds in a checkout
CYTHON = {"libc", "posix", "cpython", "cython"}  # what `cimport` has of its own
STATEMENT = re.compile(r"^([ ]*)(?:from (\w+)[\w.]* c?import|import (\w+)[\w., ]*$)", re.M)


class Import(NamedTuple):
    path: str
    module: str  # the top-level package
    lazy: bool  # within a function


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s<>=!~\[;]", requirement)[0]) for requirement in requirements}


def is_for_types(node: ast.If) -> bool:
    test = node.test
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def of_python(path: str, body: list[ast.stmt], lazy: bool = False) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, alias.name.split(".")[0], lazy)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield Import(path, (node.module or "").split(".")[0], lazy)
        else:
            deeper = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field, value in ast.iter_fields(node):
                if field == "body" and isinstance(node, ast.If) and is_for_types(node):
                    continue
                if isinstance(value, list):
                    for item in value:
                        if isinstance(item, ast.stmt):
                            yield from of_python(path, [item], deeper)
                        elif isinstance(item, ast.ExceptHandler | ast.match_case):
                            yield from of_python(path, item.body, deeper)


def imports() -> Iterator[Import]:
    """Of all that runs: stubs are for type checkers alone."""
    for folder in ("vfsd", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".py":
                yield from of_python(name, ast.parse(path.read_text()).body)
            elif path.suffix == ".pyx":
                for indent, of, plain in STATEMENT.findall(path.read_text()):
                    if of + plain not in CYTHON:
                        yield Import(name, of + plain, bool(indent))


def foreign() -> list[Import]:
    scripts = {path.stem for path in (ROOT / "bench").rglob("*.py*")}  # import one another in a guest
    inside = OURS | OF_THE_CHECKOUT | sys.stdlib_module_names | scripts
    return [found for found in imports() if found.module not in inside]


def distribution(module: str) -> str:
    names = packages_distributions().get(module)
    assert names, f"no distribution has a module {module}"
    return normal(names[0])


def extra_of(path: str) -> str | None:
    for extra, places in EXTRAS.items():
        if any(path == place or path.startswith(f"{place}/") for place in places):
            return extra
    return None


def test_what_is_imported_is_declared() -> None:
    always = declared(PROJECT["dependencies"])
    missing = []
    for found in foreign():
        allowed = set(always)
        extra = extra_of(found.path)
        if extra is not None:
            allowed |= declared(PROJECT["optional-dependencies"][extra])
        if found.module in packages_distributions() and distribution(found.module) in allowed:
            continue
        missing.append(f"{found.path}: {found.module} ({'lazily' if found.lazy else 'when imported'})")
    assert missing == []


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_what_is_declared_is_imported(extra: str | None) -> None:
    used = {distribution(found.module) for found in foreign() if extra in (None, extra_of(found.path))}
    wanted = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    unused = declared(wanted) - used
    if extra is None and unused == {"posix-ipc"}:
        pytest.xfail("posix_ipc is declared for what the guests of a share have in common, which is to come")
    assert unused == set()
