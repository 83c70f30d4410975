"""The command line of virtiofsd 1.14: its grammar over the table of options, and what only it has.

As clap reads it: `--name value` or `--name=value`, short ones together (`-df`, `-oxattr`), the last one
counts where an option is repeated. A value of `-o` outweighs the option's own name. An option that has a
bare form takes a value only after "=". All of vfsd's own options are known too.
"""

from __future__ import annotations

from vfsd.errors import ConfigError
from vfsd.options.checks import check_choice
from vfsd.options.o_list import Given, read_o
from vfsd.options.table import SERVE_OPTIONS, Option

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

PROGRAM = "vfsd-virtiofsd"
NO_MIGRATION = "vfsd does not migrate, and the front end is told so"

# What vfsd serve does not have.
OWN_OPTIONS = (
    Option("--help", "Print this text and end.", aliases=("-h",)),
    Option("--version", "Print the version and end.", aliases=("-V",)),
    Option(
        "--print-capabilities", "Print as JSON what management software may ask for, and end."
    ),
    Option("--daemonize", "Go to the background once it listens, as the C daemon does; implies --syslog."),
    Option(
        "-o", "The same options as libvirt and the C daemon spell them.", lambda _, text: text,
        "NAME[=VALUE],...", multiple=True,
    ),
    Option("-d", "As --log-level debug."),
    Option("-f", "Stay in the foreground, as it does anyway."),
    Option(
        "--migration-mode", "Accepted without effect: " + NO_MIGRATION + ".",
        check_choice("find-paths", "file-handles"), "find-paths|file-handles",
    ),
    Option(
        "--migration-on-error", "The same.", check_choice("abort", "guest-error"), "abort|guest-error",
    ),
    Option("--migration-verify-handles", "The same."),
    Option("--migration-confirm-paths", "The same."),
)  # fmt: skip


class CommandLine:
    """given: by Option.key what the table's options were given. own: values of OWN_OPTIONS by
    Option.key, those that were given. notes: a line for each option without effect."""

    def __init__(self, given: Mapping[str, Given], own: Mapping[str, Any], notes: Sequence[str]) -> None:
        self.given = given
        self.own = own
        self.notes = notes


def spellings() -> dict[str, tuple[Option, bool]]:
    """Every option as it is written: the option, and the value that a flag has then."""
    known = {}
    for option in (*SERVE_OPTIONS, *OWN_OPTIONS):
        for name in (option.name, *option.aliases):
            known[name] = (option, True)
        if option.on:
            known[f"--no-{option.name[2:]}"] = (option, False)
    return known


def parse(words: Sequence[str]) -> CommandLine:
    """ConfigError names the word and what to write instead."""
    found: dict[str, list[Given]] = {}
    known = spellings()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and word != "--":
            spelled, equals, value = word.partition("=")
            text = value if equals else None
        elif word.startswith("-") and word not in ("-", "--"):
            spelled, text = word[:2], word[2:].removeprefix("=") or None
        else:
            raise ConfigError(word, f"is no option; see {PROGRAM} --help")
        if spelled not in known:
            raise ConfigError(spelled, f"is unknown; see {PROGRAM} --help")
        option, flag = known[spelled]
        if option.check is None and text is not None:
            if word.startswith("--"):
                raise ConfigError(spelled, f"takes no value; leave out {'=' + text!r}")
            rest.insert(0, f"-{text}")  # the next of several short ones
        given = flag if option.check is None else take(option, spelled, text, rest)
        found.setdefault(option.key, []).append(Given(spelled, given))
    return sort_out(found)


def take(option: Option, spelled: str, text: str | None, rest: list[str]) -> str:
    """The value of an option, from the word itself or the next one."""
    if text is not None:
        return text
    if option.bare is not None:
        return option.bare
    if not rest or (rest[0].startswith("-") and rest[0] != "-"):
        joint = "=" if spelled.startswith("--") else " "
        raise ConfigError(spelled, f"needs a value; write {spelled}{joint}{option.metavar}")
    return rest.pop(0)


def sort_out(found: Mapping[str, Sequence[Given]]) -> CommandLine:
    given, own, notes = {}, {}, []
    for option in SERVE_OPTIONS:
        if several := found.get(option.key):
            values = [one.value for one in several]
            given[option.key] = Given(several[-1].spelled, values if option.multiple else values[-1])
    for option in OWN_OPTIONS:
        if several := found.get(option.key):
            spelled, value = several[-1].spelled, several[-1].value
            own[option.key] = value if option.check is None else option.check(spelled, value)
            if option.key.startswith("migration"):
                notes.append(f"{spelled} has no effect: {NO_MIGRATION}")
    if own.get("migration_mode") == "file-handles" and own.keys() & {
        "migration_verify_handles", "migration_confirm_paths",
    }:  # fmt: skip
        raise ConfigError("--migration-mode", "file-handles has nothing to verify or confirm; leave that out")
    if "d" in own:
        given["log_level"] = Given("-d", "debug")
    o_list = read_o([one.value for one in found.get("o", ())])
    return CommandLine({**given, **o_list.given}, own, [*notes, *o_list.notes])
