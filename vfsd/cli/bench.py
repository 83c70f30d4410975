"""vfsd bench"""

import importlib
from types import ModuleType
from typing import Any

import click

from vfsd.errors import ConfigError

WANTED = "install vfsd with its extra bench: pip install 'vfsd[bench]'"


def suite() -> ModuleType:
    """The benchmark suite, which serving does without. ConfigError: a part of it is not installed."""
    try:
        return importlib.import_module("vfsd_bench.command")
    except ImportError as problem:
        raise ConfigError("vfsd bench", f"{problem.name or problem} is missing; {WANTED}") from problem


html_option = click.option(
    "--html", metavar="FILE", help="Write the report as a page that needs no other file."
)


@click.group(invoke_without_command=True)
@click.option("--profile", default="quick", metavar="quick|full", show_default=True,
              help="How much to measure: minutes, or for a report.")  # fmt: skip
@click.option("--daemon", "daemons", multiple=True, metavar="NAME=COMMAND",
              help="Measure this one too; {socket} and {dir} are where it listens and what it shares,"
              " {cache} if it is to be measured in more than one cache mode.")  # fmt: skip
@click.option("--found/--no-found", default=True, show_default=True,
              help="Measure vfsd and the virtiofsd that are installed.")  # fmt: skip
@click.option("--level", "levels", multiple=True, metavar="wire|slow|dax|mount|guest",
              help="Only this level, or these.  [default: all]")  # fmt: skip
@click.option("--guest", default="uml", metavar="uml|qemu", show_default=True,
              help="What the level guest boots: user-mode Linux, or QEMU without KVM.")  # fmt: skip
@click.option("--cache-table", is_flag=True, help="Only the table of cache modes.")
@click.option("--only", metavar="REGEX", help="Only cells like this, as 'getattr' or 'poll.*read-4k'.")
@click.option("--rounds", type=click.IntRange(1, 1000), help="How often each figure is taken.")
@click.option("--seconds", type=click.FloatRange(0.001, 3600), help="Time for each figure in each round.")
@click.option("--patience", type=click.FloatRange(0.1, 3600), default=10.0, show_default=True,
              help="Seconds a daemon may take to listen, or to answer, before it has failed.")  # fmt: skip
@click.option("--delay-us", type=click.IntRange(0, 10**7), default=1000, show_default=True,
              help="How long each operation of the file system of level slow takes.")  # fmt: skip
@click.option(
    "--memory-dir", default="/dev/shm", show_default=True, metavar="DIR", help="A directory in memory."
)
@click.option(
    "--disk-dir", default="/var/tmp", show_default=True, metavar="DIR", help="A directory on a disk."
)
@click.option("--json", metavar="FILE", help="Write the report, for compare and for programs.")
@html_option
@click.pass_context
def bench(context: click.Context, /, **given: Any) -> None:
    """Measure virtio-fs daemons side by side, and against bare system calls.

    Exit status 1 when a daemon failed at anything.
    """
    if context.invoked_subcommand is None:
        command = suite()
        context.exit(command.run(command.Words(**given)))


@bench.command()
@click.argument("old", metavar="OLD.json")
@click.argument("new", metavar="NEW.json")
@click.pass_context
def compare(context: click.Context, old: str, new: str) -> None:
    """Print what has changed between two reports, and what is within noise.

    Exit status 1 when something has become slower, or fails now.
    """
    context.exit(suite().compare(old, new))


@bench.command()
@click.argument("report", metavar="REPORT.json")
@click.option("--json", "summary", metavar="FILE", help="Write the medians alone, a small report to keep.")
@html_option
@click.pass_context
def summarize(context: click.Context, report: str, summary: str | None, html: str | None) -> None:
    """Print a report again, or write its medians or a page of it."""
    context.exit(suite().summarize(report, summary, html))
