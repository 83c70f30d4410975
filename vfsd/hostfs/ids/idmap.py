"""Rules that translate ids between guest and host: --translate-uid and --translate-gid.

The language is virtiofsd's: `TYPE:FROM:TO:COUNT` (`forbid-guest:FROM:COUNT`), where any character that
a type can't have separates. Each direction is a table of its own; an id that no rule names is itself.
"""

import re
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from vfsd.errors import ConfigError

ID_MAX = 0xFFFFFFFE  # the next one means "none" to Linux
SHIFT, SQUASH, FORBID = range(3)
RANGE = Struct("=IIII")  # id_range_t of _slots.pxd: first, last, to, how
TYPE = re.compile(r"[A-Za-z0-9_-]*")

# Fields after the type, and what they become: from which field, to which, how, whether for the guest's ids.
TYPES: dict[str, tuple[tuple[str, ...], tuple[tuple[int, int | None, int, bool], ...]]] = {
    "guest": (("guest id", "host id", "count"), ((0, 1, SHIFT, True),)),
    "host": (("host id", "guest id", "count"), ((0, 1, SHIFT, False),)),
    "squash-guest": (("guest id", "host id", "count"), ((0, 1, SQUASH, True),)),
    "squash-host": (("host id", "guest id", "count"), ((0, 1, SQUASH, False),)),
    "forbid-guest": (("guest id", "count"), ((0, None, FORBID, True),)),
    "map": (("guest id", "host id", "count"), ((0, 1, SHIFT, True), (1, 0, SHIFT, False))),
}


class Range(NamedTuple):
    """first to last become to, to + 1 and so on (SHIFT), all `to` (SQUASH), or an error (FORBID)."""

    first: int
    last: int
    to: int
    how: int


class IdMap(NamedTuple):
    """Both directions, each in order and without overlaps."""

    to_host: tuple[Range, ...] = ()
    to_guest: tuple[Range, ...] = ()


IDENTITY = IdMap()


def parse_rules(option: str, rules: Sequence[str]) -> IdMap:
    """ConfigError names the rule and the character of the first mistake, both counted from 1."""
    tables: tuple[list[Range], list[Range]] = ([], [])
    for number, rule in enumerate(rules, 1):
        for found, of_guest in parse_rule(option, number, rule):
            table = tables[0 if of_guest else 1]
            if any(found.first <= other.last and other.first <= found.last for other in table):
                ids = "guest" if of_guest else "host"
                raise mistake(option, number, 1, f"{rule!r} has {ids} ids of an earlier rule; name each once")
            table.append(found)
    return IdMap(tuple(sorted(tables[0])), tuple(sorted(tables[1])))


def parse_rule(option: str, number: int, rule: str) -> list[tuple[Range, bool]]:
    """The ranges of one rule, and whether each is for the guest's ids."""
    matched = TYPE.match(rule)
    assert matched is not None
    name = matched[0].lower()
    if name not in TYPES:
        raise mistake(option, number, 1, f"type {matched[0]!r} is unknown; use {', '.join(TYPES)}")
    fields, effects = TYPES[name]
    at = matched.end()
    form = ":".join([name, *(field.split()[0].upper() for field in fields)])
    values = []
    starts = []
    if at == len(rule):
        raise mistake(option, number, at + 1, f"the {fields[0]} is missing; write {form}")
    separator = rule[at]
    parts = rule[at + 1 :].split(separator)
    at += 2
    for i, part in enumerate(parts):
        if i == len(fields):
            raise mistake(option, number, at, f"{part!r} is too much; write {form}")
        if not part.isascii() or not part.isdigit() or int(part) > ID_MAX + 1:
            raise mistake(option, number, at, f"{part!r} is no {fields[i]}; give a number below 2^32")
        values.append(int(part))
        starts.append(at)
        at += len(part) + 1
    if len(parts) < len(fields):
        raise mistake(option, number, len(rule) + 1, f"the {fields[len(parts)]} is missing; write {form}")
    count = values[-1]
    if count == 0:
        return []  # as Incus has it where there is nothing to forbid
    ranges = []
    for source, target, how, of_guest in effects:
        to = 0 if target is None else values[target]
        ends = [(source, values[source] + count - 1)]
        if target is not None:
            ends.append((target, to + (count - 1 if how == SHIFT else 0)))
        for field, last in ends:
            if last > ID_MAX:
                text = f"{values[field]} and {count} ids pass the last one, {ID_MAX}; use fewer"
                raise mistake(option, number, starts[field], text)
        ranges.append((Range(values[source], values[source] + count - 1, to, how), of_guest))
    return ranges


def mistake(option: str, number: int, at: int, text: str) -> ConfigError:
    return ConfigError(option, f"rule {number}, character {at}: {text}")


def pack(ranges: Sequence[Range]) -> bytes:
    """As an array of id_range_t."""
    return b"".join(RANGE.pack(*it) for it in ranges)
