"""`-o name[=value],...`: the options as libvirt and the older daemons spell them."""

from __future__ import annotations

from vfsd.errors import ConfigError
from vfsd.options.table import SERVE_OPTIONS, Option

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

# What the C daemon knew and nothing here depends on, and why.
WITHOUT_EFFECT = {
    "max_idle_threads": "threads that wait for work cost nothing here",
    "allow_root": "the guest's root is served in any case",
}


class Given:
    """What one option was given, as it was spelled there: text, or a flag's value."""

    def __init__(self, spelled: str, value: Any) -> None:
        self.spelled = spelled
        self.value = value


class OList:
    """given: by Option.key, the last word for each. notes: a line for each word without effect."""

    def __init__(self, given: Mapping[str, Given], notes: Sequence[str]) -> None:
        self.given = given
        self.notes = notes


def o_spellings() -> dict[str, tuple[Option, str | bool | None]]:
    """Every word `-o` knows: the option, and the value it stands for (None: one follows after "=")."""
    known: dict[str, tuple[Option, str | bool | None]] = {}
    for option in SERVE_OPTIONS:
        for name in option.o_names:
            known[name] = (option, True if option.check is None else None)
            if option.check is None:
                known[f"no_{name}"] = (option, False)
        known.update({word: (option, value) for word, value in option.o_words.items()})
    return known


def split_o(text: str) -> list[str]:
    """The words of one `-o`: between commas, where two commas are one of the word itself."""
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",") if word]


def read_o(lists: Sequence[str]) -> OList:
    """What the lists give together. ConfigError."""
    known = o_spellings()
    given: dict[str, Given] = {}
    notes = []
    for word in (word for text in lists for word in split_o(text)):
        name, equals, value = word.partition("=")
        spelled = f"-o {name}"
        if name in WITHOUT_EFFECT:
            notes.append(f"{spelled} has no effect: {WITHOUT_EFFECT[name]}")
            continue
        if name not in known:
            raise ConfigError(spelled, f"is unknown; use {', '.join(known)}")
        option, stands_for = known[name]
        if equals and stands_for is not None:
            raise ConfigError(spelled, f"takes no value; leave out {equals + value!r}")
        if not equals and stands_for is None:
            raise ConfigError(spelled, f"needs a value; write {name}={option.metavar}")
        given[option.key] = Given(spelled, value if stands_for is None else stands_for)
    return OList(given, notes)
