"""What --help prints."""

import textwrap
from collections.abc import Iterator

from vfsd.options.o_list import WITHOUT_EFFECT, o_spellings
from vfsd.options.table import SERVE_OPTIONS
from vfsd.options.virtiofsd import OWN_OPTIONS, PROGRAM

ABOUT = f"""\
{PROGRAM} --shared-dir PATH --socket-path PATH [OPTION]...
{PROGRAM} --shared-dir PATH --fd N [OPTION]...

Serve a directory to one virtual machine, with the command line of virtiofsd 1.14. It ends when the
front end leaves (status 0), on SIGTERM and SIGHUP (1), when the host refuses something (1), on a wrong
command line (2), or by a bug (70).
"""


def usage() -> str:
    lines = [ABOUT]
    for names, text in described():
        lines.append(f"  {names}")
        lines += textwrap.wrap(text, 96, initial_indent=" " * 10, subsequent_indent=" " * 10)
    return "\n".join(lines)


def described() -> Iterator[tuple[str, str]]:
    """Every option: how it is written, and what it does."""
    for option in (*SERVE_OPTIONS, *OWN_OPTIONS):
        names = [option.name, *option.aliases]
        if option.on:
            names.append(f"--no-{option.name[2:]}")
        if option.bare is not None:
            form = f"[={option.metavar.strip('[]')}]"
        else:
            form = f" {option.metavar}" if option.metavar else ""
        text = option.help
        default = "on" if option.on else option.default
        if default:
            text += f" [default: {default}]"
        if option.name == "-o":
            text += f" {', '.join([*o_spellings(), *WITHOUT_EFFECT])}."
        yield f"{', '.join(names)}{form}", text
