"""Names of files on a terminal and in messages."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "\\": r"\\"}


def escaped(name: str) -> str:
    """As `ls -b` writes it: what can't be printed, and bytes that are no UTF-8, as \\ooo."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(ESCAPES.get(letter) or escape(letter) for letter in name)


def escape(letter: str) -> str:
    if letter.isprintable():
        return letter
    return "".join(f"\\{byte:03o}" for byte in letter.encode("utf-8", "surrogateescape"))


def shown(name: str) -> str:
    """For standard output: escaped on a terminal, else as it is."""
    return escaped(name) if sys.stdout.isatty() else name


def echo(line: str) -> None:
    """A line of standard output, with the bytes of names as they are."""
    click.echo(os.fsencode(line))


class Complaints:
    """What could not be done, a line each on standard error; the rest goes on."""

    def __init__(self) -> None:
        self.any = False
        self.hopeless: Callable[[], bool] = lambda: False  # whether nothing can be done any more

    def tell(self, path: str, reason: str) -> None:
        self.any = True
        where = f"{escaped(path)}: " if path else ""
        click.echo(f"vfsd: {where}{escaped(reason)}", err=True)

    def tell_error(self, problem: OSError, path: str = "") -> None:
        if self.hopeless():
            self.hopeless = lambda: False
            raise problem
        name = os.fsdecode(problem.filename) if problem.filename else path
        self.tell(name, problem.strerror or str(problem))

    @contextmanager
    def each(self, path: str) -> Iterator[None]:
        """One of several: an error is told. BrokenPipeError: of standard output, ends the command."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as problem:
            self.tell_error(problem, path)
