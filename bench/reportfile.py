"""A report as JSON: written, and read back with every part checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from statistics import median
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from vfsd.errors import ConfigError

from . import model
from .figures import figure
from .model import Report, Start

FORMAT = 1


class Malformed(Exception):
    """Where the file is not a report of this format, and why."""


def write(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report.plain(), indent=1) + "\n")


def write_summary(report: Report, path: Path) -> None:
    """Medians in the place of samples: one line for each result, without what is its default."""
    lines = []
    for key, value in {"format": FORMAT, **without_defaults(summarized(report))}.items():
        text = json.dumps(value, separators=(",", ":"))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(json.dumps(one, separators=(",", ":")) for one in value) + "\n]"
        lines.append(f'"{key}":{text}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def summarized(report: Report) -> Report:
    """The same tables, without samples, single starts, and the commands by setting."""
    results = [replace(one, samples=[], summary=figure(one, 1)) for one in report.results]
    contestants = [replace(one, commands={}, starts=medians(one.starts)) for one in report.contestants]
    return replace(report, results=results, contestants=contestants)


def medians(starts: Sequence[Start]) -> list[Start]:
    """One for each setting."""
    found: dict[str, list[Start]] = {}
    for start in starts:
        found.setdefault(start.setting, []).append(start)
    return [
        Start(setting, median(one.listening for one in some), int(median(one.resident for one in some)))
        for setting, some in found.items()
    ]


def without_defaults(value: Any) -> Any:
    """As JSON has it, but for fields that have their defaults; numbers with four digits that count."""
    if is_dataclass(value):
        return {
            one.name: without_defaults(getattr(value, one.name))
            for one in fields(value)
            if getattr(value, one.name) != default(one)
        }
    if isinstance(value, dict):
        return {key: without_defaults(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_defaults(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def default(one: Field[Any]) -> Any:
    """MISSING: it has none."""
    return one.default if one.default_factory is MISSING else one.default_factory()


def read(option: str, path: Path) -> Report:
    """ConfigError: it can't be read, or is none."""
    try:
        document = json.loads(path.read_text())
    except OSError as problem:
        raise ConfigError(option, f"{path}: {problem.strerror}") from problem
    except ValueError as problem:
        raise ConfigError(option, f"{path} is no JSON: {problem}") from problem
    try:
        return parse(document)
    except Malformed as problem:
        raise ConfigError(option, f"{path} is no report of vfsd bench: {problem}") from problem


def parse(document: Any) -> Report:
    """Malformed."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Malformed(f"there is no format {FORMAT}")
    report = build(Report, {key: value for key, value in document.items() if key != "format"}, "report")
    assert isinstance(report, Report)
    return report


def build(kind: Any, value: Any, where: str) -> Any:
    """A value of a type, from JSON. Malformed."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None else build(next(a for a in args if a is not type(None)), value, where)
    if origin is list:
        expect(value, list, where)
        return [build(args[0], one, f"{where}[{at}]") for at, one in enumerate(value)]
    if origin is dict:
        expect(value, dict, where)
        return {key: build(args[1], one, f"{where}.{key}") for key, one in value.items()}
    if is_dataclass(kind):
        return instance(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expect(value, kind, where)
    return value


def instance(kind: Any, value: Any, where: str) -> Any:
    expect(value, dict, where)
    hints = get_type_hints(kind, vars(model))
    known = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in known:
            raise Malformed(f"{where}.{key} is not known")
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise Malformed(f"{where}.{name} is missing")
    return kind(**{key: build(hints[key], one, f"{where}.{key}") for key, one in value.items()})


def expect(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Malformed(f"{where} is {type(value).__name__}, not {kind.__name__}")
