"""Writes the manual pages of the commands and their completions for shells: manpages.py FOLDER.

Everything is what the commands say of themselves; man/ has the pages that no command could say.
FOLDER/COMMAND.1, FOLDER/vfsd.toml.5, FOLDER/bash/vfsd, FOLDER/zsh/_vfsd, FOLDER/fish/vfsd.fish.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from vfsd import __version__, cli
from vfsd.options import config_file
from vfsd.options.table import Option
from vfsd.options.virtiofsd import PROGRAM
from vfsd.virtiofsd import usage

COMPLETIONS = {"bash": "vfsd", "zsh": "_vfsd", "fish": "vfsd.fish"}
WRITTEN = ("vfsd-xattrmap(7)",)  # in man/
FILE_ABOUT = """
A TOML file with a table [share.NAME] for each share, which needs shared-dir and a socket of its own; a table
[defaults] for all shares, which a share's own keys outweigh; and a table [daemon] for the whole process. Keys
are the options of vfsd serve without the dashes.

SIGHUP has the file read again: new shares are served, removed ones take no more guests, changed ones are for
guests that connect from then on. If anything is wrong, one line in the log says so and everything stays.
"vfsd config check FILE" names each mistake.
"""
FILE_EXAMPLE = """
[defaults]
cache = "metadata"

[share.projects]
shared-dir = "/srv/projects"
socket = "/run/vfsd/projects.sock"
"""
EXIT_STATUS = re.compile(r"^Exit status.*?(?=\n\n|\Z)", re.M | re.S)


def escaped(text: str) -> str:
    """For roff: no character of it is an order."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha").replace("~", "\\(ti")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.M)


def spelled(words: str) -> str:
    """Options and commands bold, what stands for something else slanted."""
    parts = re.split(r"([\s,/|\[\]=.]+)", words)
    fonts = {True: "\\fI{}\\fR", False: "\\fB{}\\fR"}
    return "".join(
        fonts[part.isupper()].format(escaped(part)) if index % 2 == 0 and part else escaped(part)
        for index, part in enumerate(parts)
    )


def paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def prose(parts: Iterable[str]) -> str:
    return "\n.PP\n".join(map(escaped, parts))


def contexts(command: click.Command, parent: click.Context | None, name: str) -> Iterator[click.Context]:
    """Of the command and of those below it, each with its full name."""
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from contexts(found, context, below)


def synopsis(context: click.Context) -> str:
    pieces = context.command.collect_usage_pieces(context)
    return f"\\fB{escaped(context.command_path)}\\fR {spelled(' '.join(pieces))}"


def options(context: click.Context) -> Iterator[str]:
    for parameter in context.command.params:
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            yield f".TP\n{spelled(record[0])}\n{escaped(' '.join(record[1].split()))}"


def exit_status(name: str) -> Iterator[str]:
    """What the modules of the command say, the general one first."""
    modules = [cli, *([importlib.import_module(f"vfsd.cli.{name}")] if name else [])]
    for module in modules:
        for found in EXIT_STATUS.findall(module.__doc__ or ""):
            yield re.sub(r"^Exit status:? ", "", " ".join(found.split()))


def reference(name: str) -> str:
    return f"\\fB{escaped(name[:-3])}\\fR{name[-3:]}"


def header(name: str, does: str, section: int = 1) -> str:
    stamp = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    date = time.strftime("%Y-%m-%d", stamp)
    return (
        f'.TH {escaped(name.upper())} {section} "{date}" "vfsd {__version__}" vfsd\n'
        f".SH NAME\n{escaped(name)} \\- {escaped(does[:1].lower() + does[1:].rstrip('.'))}"
    )


def see_also(name: str, others: Iterable[str]) -> str:
    listed = ",\n".join(reference(other) for other in (*others, *WRITTEN) if other[:-3] != name)
    return f".SH SEE ALSO\n{listed}\n"


def key_entry(key: str, option: Option) -> str:
    """What a configuration file's key stands for."""
    value = "true|false" if option.check is None else f'"{option.metavar}"'
    shown = f"[{value}, ...]" if option.multiple else value
    default = ("true" if option.on else "false") if option.check is None else option.default
    text = f"{option.help}  [default: {default}]" if default else option.help
    return f".TP\n\\fB{escaped(key)}\\fR = {escaped(shown)}\n{escaped(text)}"


def file_page(others: list[str]) -> str:
    """The configuration file's, from the table of options."""
    return "\n".join(
        [
            header("vfsd.toml", "shares of vfsd serve --config", 5),
            f".SH DESCRIPTION\n{prose(paragraphs(FILE_ABOUT))}",
            ".SH EXAMPLE\n.nf",
            escaped(FILE_EXAMPLE.strip()),
            ".fi",
            ".SH KEYS OF SHARES AND DEFAULTS",
            *(key_entry(key, option) for key, option in config_file.OF_SHARE.items()),
            ".SH KEYS OF DAEMON",
            *(key_entry(key, option) for key, option in config_file.OF_PROCESS.items()),
            see_also("vfsd.toml", others),
        ]
    )


def page(context: click.Context, below: list[click.Context], others: list[str]) -> str:
    """One page: a command, and in sections of its own those below it that have no page."""
    name = context.command_path.replace(" ", "-")
    first, *rest = paragraphs(context.command.help or "")
    lines = [
        header(name, first),
        f".SH SYNOPSIS\n{synopsis(context)}",
        f".SH DESCRIPTION\n{prose([first, *rest])}",
        ".SH OPTIONS",
        *options(context),
    ]
    if below:
        lines.append(".SH COMMANDS")
    for inner in below:
        lines += [f".SS {escaped(inner.info_name or '')}", synopsis(inner)]
        lines += [f".PP\n{prose(paragraphs(inner.command.help or ''))}", *options(inner)]
    lines.append(f".SH EXIT STATUS\n{prose(exit_status(name.partition('-')[2]))}")
    lines.append(see_also(name, others))
    return "\n".join(lines)


def virtiofsd_page(others: list[str]) -> str:
    """The one program that is not of click: it has virtiofsd's grammar."""
    forms, about = usage.ABOUT.strip().split("\n\n")
    return "\n".join(
        [
            header(PROGRAM, paragraphs(about)[0].split(". ")[0]),
            ".SH SYNOPSIS\n" + "\n.br\n".join(spelled(form) for form in forms.splitlines()),
            f".SH DESCRIPTION\n{prose(paragraphs(about))}",
            ".SH OPTIONS",
            *(f".TP\n{spelled(names)}\n{escaped(text)}" for names, text in usage.described()),
            see_also(PROGRAM, others),
        ]
    )


def pages() -> dict[str, str]:
    """By file name: `vfsd`, a page for each of its commands, and the program in virtiofsd's place."""
    whole, *inner = contexts(cli.vfsd, None, "vfsd")
    commands = [context for context in inner if context.parent is whole]
    names = [f"{context.command_path.replace(' ', '-')}(1)" for context in (whole, *commands)]
    names += [f"{PROGRAM}(1)", "vfsd.toml(5)"]
    made = {"vfsd.1": page(whole, [], names), f"{PROGRAM}.1": virtiofsd_page(names)}
    made["vfsd.toml.5"] = file_page(names)
    for command in commands:
        below = [context for context in inner if context.parent is command]
        made[f"{command.command_path.replace(' ', '-')}.1"] = page(command, below, names)
    return made


def completion(shell: str) -> str:
    """What a shell reads once; it asks `vfsd` for the words."""
    kind = get_completion_class(shell)
    assert kind is not None
    return str(kind.source_template % kind(cli.vfsd, {}, "vfsd", "_VFSD_COMPLETE").source_vars())


def main(folder: Path) -> None:
    """Write all of it below the folder."""
    files = {Path(name): text for name, text in pages().items()}
    files |= {Path(shell, name): completion(shell) for shell, name in COMPLETIONS.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: manpages.py FOLDER")
    main(Path(sys.argv[1]))
