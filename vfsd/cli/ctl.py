"""vfsd ctl

Exit status: 1 when the daemon does not answer, or can't do it (one line on stderr).
"""

import json
import sys
from typing import Any

import click

from vfsd.cli.output import Complaints
from vfsd.control.client import call
from vfsd.control.methods import METHODS, Method, Param
from vfsd.control.rpc import RpcError
from vfsd.errors import ConfigError

EXIT_FAILED = 1


@click.group()
@click.option("--socket", metavar="PATH", help="The daemon's --control-socket.  [required]")
@click.pass_context
def ctl(context: click.Context, socket: str | None) -> None:
    """Ask a running daemon, and tell it what to do; it prints JSON.

    The daemon listens at its --control-socket for its own user and root. Programs may use the socket as
    well: it speaks JSON-RPC 2.0, a line for each message, with these methods.
    """
    context.obj = socket


def option_of(param: Param) -> click.Option:
    kind: Any = click.Choice(param.choices) if param.choices else param.kind
    return click.Option([param.name, f"--{param.name}"], type=kind, required=param.required, help=param.help)


def command_of(name: str, method: Method) -> click.Command:
    @click.pass_obj
    def ask(socket: str | None, /, **given: Any) -> None:
        if socket is None:  # not asked for --help
            raise ConfigError("--socket", "is missing; add --socket PATH before the command")
        complaints = Complaints()
        try:
            answer = call(socket, name, {key: value for key, value in given.items() if value is not None})
        except OSError as problem:
            why = problem.strerror or str(problem)
            complaints.tell(socket, f"{why}; name the --control-socket of a daemon that runs")
            sys.exit(EXIT_FAILED)
        except RpcError as problem:
            complaints.tell("", str(problem))
            sys.exit(EXIT_FAILED)
        click.echo(json.dumps(answer, indent=2))

    params: list[click.Parameter] = [option_of(param) for param in method.params]
    return click.Command(name, callback=ask, params=params, help=method.help)


for one, described in METHODS.items():
    ctl.add_command(command_of(one, described))
