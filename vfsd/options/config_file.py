"""A file of many shares (TOML): [share.NAME], what holds for all of them ([defaults]), and for the process.

Keys are the options' names without the dashes; the values go through the options' own checks.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final, NamedTuple

from vfsd.errors import ConfigError
from vfsd.options.checks import socket_place
from vfsd.options.o_list import Given
from vfsd.options.resolve import check_options, check_value
from vfsd.options.table import SERVE_OPTIONS, Option, ServeOptions

FILE_MAX: Final = 1 << 20  # bytes
SHARE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TABLES: Final = ("daemon", "defaults", "share")
TWICE: Final = re.compile(r"(?:Cannot (?:overwrite|declare|mutate)|Duplicate).* \(at line (\d+)")

OPTIONS: Final = {option.name[2:]: option for option in SERVE_OPTIONS if option.name != "--fd"}
OF_PROCESS: Final = {key: option for key, option in OPTIONS.items() if option.of_process}
OF_SHARE: Final = {key: option for key, option in OPTIONS.items() if not option.of_process}


class ShareTable(NamedTuple):
    """One share: what the file says of it, by Option.key, and the checked options."""

    given: Mapping[str, Any]
    options: ServeOptions


class Config(NamedTuple):
    """A file without mistakes: its shares by name."""

    of_process: Mapping[str, Any]
    shares: Mapping[str, ShareTable]


def read_config(path: str, outweighing: Mapping[str, Given] | None = None) -> Config:
    """ConfigError: with the first mistake. outweighing: options of the process from the command line."""
    reader = Reader(path)
    config = reader.read(outweighing or {})
    if reader.mistakes:
        more = len(reader.mistakes) - 1
        problem = str(reader.mistakes[0]).removeprefix(f"{path}: ")
        raise ConfigError(path, f"{problem} (and {more} more: vfsd config check {path})" if more else problem)
    return config


class Reader:
    """mistakes: one for each, once it has read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.mistakes: list[ConfigError] = []

    def read(self, outweighing: Mapping[str, Given]) -> Config:
        """Whole only when there are no mistakes."""
        tables = self._parse()
        for name in tables.keys() - set(TABLES):
            if name in OPTIONS:
                remedy = f"is in no table; put it into [{'daemon' if name in OF_PROCESS else 'defaults'}]"
            else:
                remedy = unknown(name, TABLES, "table")
            self._mistake("", name, remedy)
        of_process = self._options("[daemon]", tables.get("daemon", {}), OF_PROCESS)
        defaults = self._options("[defaults]", tables.get("defaults", {}), OF_SHARE)
        named = tables.get("share", {})
        if not isinstance(named, dict) or not named:
            if not self.mistakes:
                self._mistake("", "share", "there is no share; add a table [share.NAME]")
            named = {}
        shares = {}
        for name, table in named.items():
            share = self._share(name, table, {**of_process, **outweighing}, defaults)
            if share is not None:
                shares[name] = share
        self._check_sockets(shares)
        return Config({key: given.value for key, given in of_process.items()}, shares)

    def _parse(self) -> dict[str, Any]:
        text = ""
        try:
            text = read_text(self.path)
            return tomllib.loads(text, parse_float=str)
        except tomllib.TOMLDecodeError as problem:
            self.mistakes.append(ConfigError(self.path, syntax(str(problem), text)))
        except UnicodeDecodeError:
            self.mistakes.append(ConfigError(self.path, "is not UTF-8; save it as such"))
        except RecursionError:
            self.mistakes.append(ConfigError(self.path, "is nested too deeply; write [share.NAME] and keys"))
        except OSError as problem:
            why = problem.strerror or str(problem)
            self.mistakes.append(ConfigError(self.path, f"can't be read ({why}); name a readable file"))
        # No second mistake for what could not be read.
        return {}

    def _share(
        self, name: str, table: Any, of_process: Mapping[str, Given], defaults: Mapping[str, Given]
    ) -> ShareTable | None:
        where = f"[share.{name}]" if SHARE_NAME.fullmatch(name) else f"[share.{name!r}]"
        if not SHARE_NAME.fullmatch(name):
            self._mistake(where, "", "a share's name has letters, digits, '.', '_' and '-'; choose another")
            return None
        before = len(self.mistakes)
        given = {**defaults, **self._options(where, table, OF_SHARE)}
        for key, example in (("socket", "/run/vfsd/NAME.sock"), ("shared-dir", "/srv/NAME")):
            wrong = isinstance(table, dict) and key in table
            if OPTIONS[key].key not in given and not wrong:
                value = example.replace("NAME", name)
                self._mistake(where, key, f'is missing; add {key} = "{value}"')
        if len(self.mistakes) > before:
            return None
        try:
            options = check_options({**of_process, **given})
        except ConfigError as problem:
            self._told(where, problem)
            return None
        return ShareTable({key: value.value for key, value in given.items()}, options)

    def _options(self, where: str, table: Any, known: Mapping[str, Option]) -> dict[str, Given]:
        """By Option.key, those without a mistake."""
        if not isinstance(table, dict):
            self._mistake(where, "", f"is {a_kind(table)}; make it a table")
            return {}
        found = {}
        for key, value in table.items():
            option = known.get(key)
            if option is None:
                self._mistake(where, key, elsewhere(key, known))
                continue
            problem = wrong_type(option, value)
            if problem:
                self._mistake(where, key, problem)
                continue
            given = Given(option.name, as_text(option, value))
            try:
                check_value(option, given)
            except ConfigError as mistake:
                self._told(where, mistake)
            else:
                found[option.key] = given
        return found

    def _check_sockets(self, shares: Mapping[str, ShareTable]) -> None:
        taken: dict[str, str] = {}
        for name, share in shares.items():
            assert share.options.socket is not None
            place = socket_place(share.options.socket)
            other = taken.setdefault(place, name)
            if other != name:
                self._mistake(
                    f"[share.{name}]", "socket", f"is that of [share.{other}] too; give each share its own"
                )

    def _mistake(self, where: str, key: str, problem: str) -> None:
        place = " ".join(part for part in (where, key) if part)
        self.mistakes.append(ConfigError(f"{self.path}: {place}", problem))

    def _told(self, where: str, mistake: ConfigError) -> None:
        self.mistakes.append(in_file(self.path, where, mistake))


def in_file(path: str, where: str, mistake: ConfigError) -> ConfigError:
    """What an option's check said, with its place in the file."""
    problem = str(mistake).removeprefix(f"{mistake.option}: ")
    return ConfigError(f"{path}: {where} {mistake.option.removeprefix('--')}", problem)


def read_text(path: str) -> str:
    """Of a regular file: no other one is waited for. OSError, UnicodeDecodeError."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no regular file")
        text = file.read(FILE_MAX + 1)
    if len(text) > FILE_MAX:
        raise OSError(f"it has more than {FILE_MAX >> 20} MiB")
    return text.decode()


def syntax(problem: str, text: str) -> str:
    """What TOML's parser says, with the remedy."""
    twice = TWICE.match(problem)
    lines = text.split("\n")
    if twice and int(twice[1]) <= len(lines):
        number = int(twice[1])
        what = lines[number - 1].split("=")[0].strip()
        return f"line {number}: {what} is there twice; leave one of them out"
    return f"{problem}; mend it there (TOML)"


def unknown(key: str, known: Mapping[str, Option] | tuple[str, ...], what: str) -> str:
    close = get_close_matches(key.replace("_", "-").removeprefix("--"), known, 1)
    remedy = f"did you mean {close[0]}?" if close else f"use {', '.join(known)}"
    return f"is an unknown {what}; {remedy}"


def elsewhere(key: str, known: Mapping[str, Option]) -> str:
    """What is wrong with a key that is none of those."""
    if key == "fd":
        return "is for the command line alone; give a socket"
    for name, option in known.items():
        if f"--{key}" in option.aliases:
            return f"is an unknown key; did you mean {name}?"
    if key in OPTIONS:
        return f"is not for this table; put it into {'[daemon]' if key in OF_PROCESS else '[share.NAME]'}"
    return unknown(key, known, "key")


def a_kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", str: "a text", list: "a list", dict: "a table"}
    return kinds.get(type(value), "a date or time")


def wrong_type(option: Option, value: Any) -> str:
    """What is wrong with a value's type, else nothing."""
    key = option.name[2:]
    if option.check is None:
        return "" if isinstance(value, bool) else f"is {a_kind(value)}; write {key} = true or false"
    if option.multiple and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ""
    # bool is an int to Python; fractions come as they were written.
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return ""
    example = f'{key} = ["{option.metavar}"]' if option.multiple else f'{key} = "{option.metavar}"'
    return f"is {a_kind(value)}; write {example}"


def as_text(option: Option, value: Any) -> Any:
    """As the check takes it."""
    if option.check is None:
        return value
    if option.multiple:
        return tuple(value) if isinstance(value, list) else (str(value),)
    return str(value)
