"""Rules that rename, hide and refuse extended attributes (--xattrmap), in virtiofsd's language.

A rule is `:TYPE:SCOPE:KEY:PREPEND:`; its first character that is no white space separates its fields.
A guest's name goes by the first rule of the client's scope whose KEY it begins with, a host's name by
the first of the server's scope whose PREPEND it begins with; without one it is refused or hidden.
`:map:KEY:PREPEND:` stands for a set of rules and is the last.
"""

import os
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from vfsd.errors import ConfigError

NAME_MAX = 255  # XATTR_NAME_MAX of linux/limits.h
RULE = Struct("=BBHH256s256s")  # xattr_rule_t of _slots.pxd
CAPABILITY = b"security.capability"


class Kind(IntEnum):
    PREFIX = 0
    OK = 1
    BAD = 2
    UNSUPPORTED = 3


class Scope(IntFlag):
    CLIENT = 1
    SERVER = 2
    ALL = 3


class Rule(NamedTuple):
    kind: Kind
    scope: Scope
    key: bytes
    prepend: bytes


def parse_map(option: str, text: str) -> tuple[Rule, ...]:
    """ConfigError names the character of the first mistake, counted from 1."""
    scan = Scan(option, text)
    rules: list[Rule] = []
    while scan.next_rule():
        word, start = scan.field("type")
        if word == "map":
            rules += rules_of_map(*scan.names(Kind.PREFIX))
            if scan.next_rule():
                raise scan.mistake(scan.next, "a rule follows a map rule; put that one last")
            break
        if word.upper() not in Kind.__members__ or not word.islower():
            raise scan.mistake(start, f"type {word!r} is unknown; use prefix, ok, bad, unsupported or map")
        scope, start = scan.field("scope")
        if scope.upper() not in Scope.__members__ or not scope.islower():
            raise scan.mistake(start, f"scope {scope!r} is unknown; use client, server or all")
        kind = Kind[word.upper()]
        rules.append(Rule(kind, Scope[scope.upper()], *scan.names(kind)))
    if not rules:
        raise scan.mistake(1, "there is no rule; give one, or leave the option out")
    return tuple(rules)


def rules_of_map(key: bytes, prepend: bytes) -> list[Rule]:
    """What `map` stands for: names of the host are never the guest's by another way."""
    rules = [Rule(Kind.PREFIX, Scope.ALL, key, prepend)]
    if not key:
        return [*rules, Rule(Kind.BAD, Scope.ALL, b"", b"")]
    return [
        *rules,
        Rule(Kind.BAD, Scope.SERVER, b"", key),
        Rule(Kind.BAD, Scope.CLIENT, prepend, b""),
        Rule(Kind.OK, Scope.ALL, b"", b""),
    ]


class Scan:
    """Reads the fields of rules, one after another."""

    def __init__(self, option: str, text: str) -> None:
        self.option = option
        self.text = text
        self.next = 0  # index of the character to be read
        self.separator = ""

    def mistake(self, at: int, text: str) -> ConfigError:
        return ConfigError(self.option, f"character {at}: {text}")

    def next_rule(self) -> bool:
        """To the first field of the next rule, behind its separator. False at the end."""
        while self.text[self.next : self.next + 1].isspace():
            self.next += 1
        self.separator = self.text[self.next : self.next + 1]
        self.next += 1
        return bool(self.separator)

    def field(self, what: str) -> tuple[str, int]:
        """The next field, and the character it begins at."""
        start = self.next
        end = self.text.find(self.separator, start)
        if end < 0:
            raise self.mistake(
                len(self.text) + 1, f"the {what} does not end; put a {self.separator!r} behind it"
            )
        self.next = end + 1
        return self.text[start:end], start + 1

    def names(self, kind: Kind) -> tuple[bytes, bytes]:
        """The last two fields of every rule: key and prepend."""
        key = self.name("key")
        start = self.next + 1
        prepend = self.name("prepend")
        if kind is Kind.PREFIX:
            # The shortest name it is for, and the one that the daemon itself looks for (host_capability).
            names = [key, *([CAPABILITY] if prepend and CAPABILITY.startswith(key) else [])]
            longest = len(prepend) + max(map(len, names))
            if longest > NAME_MAX:
                raise self.mistake(
                    start, f"with the prepend a name has {longest} bytes, at most {NAME_MAX} are allowed;"
                    " make it shorter",
                )  # fmt: skip
        return key, prepend

    def name(self, what: str) -> bytes:
        text, start = self.field(what)
        name = os.fsencode(text)
        if len(name) > NAME_MAX:
            raise self.mistake(start, f"the {what} has {len(name)} bytes; a name has at most {NAME_MAX}")
        return name


def host_capability(rules: tuple[Rule, ...]) -> bytes:
    """Where the guest's security.capability lies if the kernel does not know it: it is then for the
    daemon to remove with a write. Empty: it is what the kernel thinks, or the guest has none."""
    for rule in rules:
        if rule.scope & Scope.CLIENT and CAPABILITY.startswith(rule.key):
            return rule.prepend + CAPABILITY if rule.kind is Kind.PREFIX and rule.prepend else b""
    return b""


def pack(rules: tuple[Rule, ...]) -> bytes:
    """As an array of xattr_rule_t."""
    return b"".join(
        RULE.pack(rule.kind, rule.scope, len(rule.key), len(rule.prepend), rule.key, rule.prepend)
        for rule in rules
    )
