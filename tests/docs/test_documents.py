"""What the documents name is there: links, headings, files, commands, options, targets of make."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vfsd.cli import vfsd
from vfsd.options.table import SERVE_OPTIONS
from vfsd.options.virtiofsd import OWN_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES]
# Of other programs, where nothing says so.
FOREIGN = {"--nomount", "--verify", "--direct", "--fs", "--memory", "--vhost-user"}

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
CODE = re.compile(r"(`+)(.+?)\1", re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"--[a-z][a-z0-9-]*")
OURS = re.compile(r"(bench|docs|man|packaging|tests|tools|vfsd)/[\w./@*-]*")

every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def inline(text: str) -> list[str]:
    """Code within the prose."""
    return [" ".join(code.split()) for _, code in CODE.findall(prose(text))]


def command_lines(text: str) -> Iterator[str]:
    """Of the blocks for a shell."""
    for language, block in FENCE.findall(text):
        if language == "sh":
            yield from block.replace("\\\n", " ").splitlines()


def headings(path: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", LINK.sub("", text)).strip().lower().replace(" ", "-") for text in found}


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(CODE.sub("", prose(path.read_text()))):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


def test_the_index_has_each_page() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in PAGES if page.name != "README.md"} <= linked


@every_document
def test_files_are_there(path: Path) -> None:
    for code in inline(path.read_text()):
        name = code.partition("::")[0]
        if OURS.fullmatch(name):
            assert any(ROOT.glob(name.rstrip("/"))), name


@every_document
def test_make_has_the_targets(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    asked = [code for code in (*inline(text), *command_lines(text)) if re.match(r"make \w", code)]
    for code in asked:
        words = shlex.split(code, comments=True)[1:]
        assert {word for word in words if "=" not in word} <= targets, code


def spellings(command: click.Command) -> set[str]:
    found = {"--help"}
    for parameter in command.params:
        found.update(parameter.opts, parameter.secondary_opts)
    return found


def commands(group: click.Group, name: str = "vfsd") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        yield f"{name} {word}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {word}")


COMMANDS = {"vfsd": vfsd, **dict(commands(vfsd))}
IN_PLACE = {word for one in (*SERVE_OPTIONS, *OWN_OPTIONS) for word in (one.name, *one.aliases)}
IN_PLACE |= {f"--no-{one.name[2:]}" for one in SERVE_OPTIONS if one.on} | {"--help", "--version"}
ALL_OPTIONS = IN_PLACE.union(*map(spellings, COMMANDS.values()))


def options_of(words: str) -> set[str]:
    """Those of the command of ours that a line begins with."""
    if words.startswith("vfsd-virtiofsd"):
        return IN_PLACE
    names = re.match(r"vfsd(?: [a-z]+){0,2}", words)
    assert names is not None
    name = names[0]
    while name not in COMMANDS:
        name = name.rpartition(" ")[0]
    assert name != "vfsd" or not re.match(r"vfsd [a-z]", words), f"there is no command {words!r}"
    return spellings(COMMANDS[name])


@every_document
def test_commands_and_their_options_are_there(path: Path) -> None:
    text = path.read_text()
    for line in (*inline(text), *command_lines(text)):
        words = re.sub(r"^\s*(\S*/bin/)?", "", line)
        if re.match(r"vfsd(-virtiofsd)?( |$)", words):
            without_values = re.sub(r'"[^"]*"|#.*', "", words)
            unknown = set(OPTION.findall(without_values)) - options_of(words)
            assert not unknown, line


@every_document
def test_options_that_stand_alone_are_there(path: Path) -> None:
    for code in inline(path.read_text()):
        if code.startswith("--"):
            unknown = (
                set(re.findall(r"(?:^|[ |])(--[a-z][a-z0-9-]*)(?![\w*-])", code)) - ALL_OPTIONS - FOREIGN
            )
            assert not unknown, code
