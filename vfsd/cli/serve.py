"""vfsd serve"""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from vfsd.daemon import logs, supervisor
from vfsd.errors import ConfigError
from vfsd.options.o_list import Given, o_spellings, read_o
from vfsd.options.resolve import check_options, check_value
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
            ["config", "--config"],
            metavar="FILE",
            help="Serve all shares of this file (vfsd.toml(5)), and read it again at SIGHUP. Only options"
            f" of the process may be given too: {', '.join(o.name for o in SERVE_OPTIONS if o.of_process)}.",
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
def serve(o_lists: tuple[str, ...], config: str | None, **given: Any) -> int:
    """Serve a directory to virtual machines as a vhost-user device.

    Stays in the foreground, logs to stderr, says READY when it listens, and listens again when a
    guest has gone. SIGTERM and SIGINT end it; SIGHUP too, without --config.
    """
    by_name = {
        option.key: Given(option.name, given[option.key])
        for option in SERVE_OPTIONS
        if given[option.key] not in (None, ())
    }
    if config is not None:
        return serve_config(config, by_name, o_lists)
    o_list = read_o(o_lists)
    options = check_options({**o_list.given, **by_name})
    logs.start(options.log_level, options.log_format, "vfsd" if options.syslog else None)
    logs.note(o_list.notes)
    return supervisor.serve(options)


def serve_config(path: str, given: Mapping[str, Given], o_lists: Sequence[str]) -> int:
    """Serve the shares of a file. given: options of the process, which outweigh the file's."""
    for option in SERVE_OPTIONS:
        if option.key in given and not option.of_process:
            raise ConfigError("--config", f"there is {option.name} too; put it into {path}")
        if option.key in given:
            check_value(option, given[option.key])
    if o_lists:
        raise ConfigError("--config", f"there is -o too; put its options into {path}")
    # What one share alone has no need of.
    from vfsd.daemon import shares
    from vfsd.options.config_file import read_config

    file = read_config(path, given)
    first = next(iter(file.shares.values())).options
    logs.start(first.log_level, first.log_format, "vfsd" if first.syslog else None)
    return shares.serve(path, file, given)
