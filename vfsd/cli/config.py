"""vfsd config

Exit status: 2 when the file has a mistake (a line for each on stderr).
"""

import sys

import click

from vfsd.cli.output import echo, escaped
from vfsd.errors import EXIT_USAGE


@click.group()
def config() -> None:
    """Look at a configuration file of vfsd serve --config."""


@config.command()
@click.argument("file")
def check(file: str) -> None:
    """Say what is wrong with FILE, a line for each mistake, without serving anything.

    Directories, groups and the like are looked for on this host, as the user who runs it.
    """
    from vfsd.options.config_file import Reader

    reader = Reader(file)
    shares = reader.read({}).shares
    for mistake in reader.mistakes:
        click.echo(f"vfsd: {escaped(str(mistake))}", err=True)
    if reader.mistakes:
        sys.exit(EXIT_USAGE)
    echo(f"{escaped(file)}: {len(shares)} shares, no mistakes")
