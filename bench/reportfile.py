"""A report as JSON: written, and read back with every part checked."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from vfsd.errors import ConfigError

from . import model
from .model import Report

FORMAT = 1


class Malformed(Exception):
    """Where the file is not a report of this format, and why."""


def write(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report.plain(), indent=1) + "\n")


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
