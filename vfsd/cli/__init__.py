"""The command line: one file per command.

Exit status: 0 done, 2 the operator's mistake (one line on stderr), 70 a bug of ours (traceback).
"""

import importlib
import sys
import traceback

import click

from vfsd import __version__
from vfsd.errors import EXIT_BUG, EXIT_USAGE, ConfigError

COMMANDS = ("bench", "config", "ctl", "doctor", "guest", "mount", "serve")  # each in the module of its name


# Says the help. Debian 12's click (8.1) has it not: it prints the help itself.
WITHOUT_ARGUMENTS: tuple[type[click.ClickException], ...] = tuple(
    getattr(click.exceptions, name) for name in ("NoArgsIsHelpError",) if hasattr(click.exceptions, name)
)


class Commands(click.Group):
    """Imports a command only when it is asked for: the daemon loads nothing of the guest's."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"vfsd.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vfsd")
def vfsd() -> None:
    """virtio-fs for virtual machines."""


def main(arguments: list[str] | None = None) -> None:
    """The entry point of `vfsd`."""
    try:
        status = vfsd.main(arguments, prog_name="vfsd", standalone_mode=False)
    except ConfigError as problem:
        fail(str(problem))
    except click.ClickException as problem:
        if isinstance(problem, WITHOUT_ARGUMENTS):
            problem.show()
            sys.exit(EXIT_USAGE)
        fail(problem.format_message())
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_BUG)
    sys.exit(status or 0)


def fail(text: str) -> None:
    print(f"vfsd: {text}", file=sys.stderr)
    sys.exit(EXIT_USAGE)
