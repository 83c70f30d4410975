"""The entry point of vfsd-virtiofsd."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vfsd.errors import ConfigError, HostError
from vfsd.options.o_list import Given
from vfsd.options.resolve import check_options
from vfsd.options.table import ServeOptions
from vfsd.options.virtiofsd import PROGRAM, CommandLine, parse

EXIT_ENDED = 0
EXIT_FAILED = 1  # the host refused something, or a signal ended it
EXIT_USAGE = 2
EXIT_BUG = 70

# What is true of this daemon, of what management software may ask for. libvirt takes the word
# separate-options for a daemon without locks, and would refuse its <lock>; it gives -o lists else.
CAPABILITIES = ("posix-acl-negotiation-mode", "security-label-negotiation-mode")
RUST_LEVELS = {"warn": "warning", "trace": "debug"}


def main(words: Sequence[str] | None = None) -> NoReturn:
    try:
        status = run(sys.argv[1:] if words is None else words)
    except ConfigError as problem:
        print(f"{PROGRAM}: {problem}", file=sys.stderr)
        status = EXIT_FAILED if isinstance(problem, HostError) else EXIT_USAGE
    except Exception:
        import traceback

        traceback.print_exc()
        status = EXIT_BUG
    sys.exit(status)


def run(words: Sequence[str]) -> int:
    """The exit status. ConfigError."""
    line = parse(words)
    if not words or "help" in line.own:
        from vfsd.virtiofsd.usage import usage

        print(usage(), file=sys.stdout if words else sys.stderr)
        return EXIT_ENDED if words else EXIT_USAGE
    if "version" in line.own:
        from vfsd import __version__

        print(f"{PROGRAM} {__version__} (command line of virtiofsd 1.14.0)")
        return EXIT_ENDED
    if "print_capabilities" in line.own:
        import json

        print(json.dumps({"type": "fs", "features": list(CAPABILITIES)}, indent=2))
        return EXIT_ENDED
    from vfsd.virtiofsd.life import live

    return live(read(line), line)


def read(line: CommandLine) -> ServeOptions:
    """The options; RUST_LOG of the environment outweighs --log-level, as for virtiofsd."""
    given = dict(line.given)
    if level := rust_log(os.environ.get("RUST_LOG", "")):
        given["log_level"] = Given("RUST_LOG", level)
    return check_options(given)


def rust_log(text: str) -> str | None:
    """The level that env_logger would read for the daemon: the last that is for all, or for virtiofsd."""
    from vfsd.options.table import LOG_LEVELS

    found = None
    for directive in text.split(","):
        target, equals, level = directive.strip().rpartition("=")
        level = RUST_LEVELS.get(level.lower(), level.lower())
        if level in LOG_LEVELS and (not equals or target == "virtiofsd"):
            found = level
    return found
