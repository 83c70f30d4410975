"""vfsd serve"""

from typing import Any

import click

from vfsd.daemon import logs, supervisor
from vfsd.options.o_list import Given, o_spellings, read_o
from vfsd.options.resolve import check_options
from vfsd.options.table import SERVE_OPTIONS


def with_options(command: click.Command) -> click.Command:
    """Give the command the options of the table; what they mean is checked there, not by click."""
    for option in SERVE_OPTIONS:
        default = "on" if option.on else option.default
        shown = f"{option.help}  [default: {default}]" if default else option.help
        name = f"{option.name}/--no-{option.name[2:]}" if option.on else option.name
        bare: dict[str, Any] = {"flag_value": option.bare} if option.bare else {}
        command.params.append(
            click.Option(
                [option.key, name, *option.aliases],
                help=shown + ("  [required]" if option.required else ""),
                metavar=option.metavar or None,
                default=None,
                multiple=option.multiple,
                is_flag=option.check is None,
                **bare,
            )
        )
    command.params.append(
        click.Option(
            ["o_lists", "-o"],
            multiple=True,
            metavar="NAME[=VALUE],...",
            help=f"The same options as libvirt and older daemons spell them: {', '.join(o_spellings())}."
            " Two commas stand for one in a value. May be repeated; an option by its own name outweighs it.",
        )
    )
    return command


@with_options
@click.command()
def serve(o_lists: tuple[str, ...], **given: Any) -> int:
    """Serve a directory to virtual machines as a vhost-user device.

    Stays in the foreground, logs to stderr, says READY when it listens, and listens again when a
    guest has gone. SIGTERM and SIGINT end it.
    """
    by_name = {
        option.key: Given(option.name, given[option.key])
        for option in SERVE_OPTIONS
        if given[option.key] not in (None, ())
    }
    o_list = read_o(o_lists)
    options = check_options({**o_list.given, **by_name})
    logs.start(options.log_level, "vfsd" if options.syslog else None)
    logs.note(o_list.notes)
    return supervisor.serve(options)
