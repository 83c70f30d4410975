"""The entry point of vfsd-virtiofsd: it listens first, and imports the daemon then."""

from __future__ import annotations

import os
import sys

from vfsd.daemon.sockets import open_socket
from vfsd.errors import EXIT_BUG, EXIT_USAGE, ConfigError, HostError
from vfsd.options.o_list import Given
from vfsd.options.resolve import check_options
from vfsd.options.virtiofsd import PROGRAM, parse
from vfsd.virtiofsd.pidfile import PidFile

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from vfsd.options.table import ServeOptions
    from vfsd.options.virtiofsd import CommandLine

EXIT_FAILED = 1  # the host refused something

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

        show(usage(), 1 if words else 2)
        return 0 if words else EXIT_USAGE
    if "version" in line.own:
        from vfsd import __version__

        show(f"{PROGRAM} {__version__} (command line of virtiofsd 1.14.0)", 1)
        return 0
    if "print_capabilities" in line.own:
        import json

        show(json.dumps({"type": "fs", "features": CAPABILITIES}, indent=2), 1)
        return 0
    return serve(read(line), line)


def show(text: str, fd: int) -> None:
    """Also to a reader that has had enough."""
    try:
        os.write(fd, f"{text}\n".encode())
    except BrokenPipeError:
        return


def serve(options: ServeOptions, line: CommandLine) -> int:
    """The exit status: 0 when the front end has left. ConfigError; nothing that was made is left then."""
    listening = None
    if "daemonize" in line.own:
        from vfsd.virtiofsd.background import go_to_background

        listening = go_to_background()
    pid_file = None if options.socket is None else PidFile("--socket-path", options.socket)
    listener = None
    try:
        listener = open_socket(options)
        from vfsd.virtiofsd.life import live

        return live(options, line.notes, listener, listening)
    finally:
        if listener is not None:
            listener.close()
        if pid_file is not None:
            pid_file.close()


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
