"""One process for one front end, as virtiofsd lives: it begins, says so, and ends with it."""

import contextlib
import logging
import os
from collections.abc import Callable
from typing import NoReturn

from vfsd.daemon import logs, supervisor
from vfsd.daemon.process import notify_ready
from vfsd.options.table import ServeOptions
from vfsd.options.virtiofsd import PROGRAM, CommandLine
from vfsd.virtiofsd.pidfile import PidFile

log = logging.getLogger("vfsd.virtiofsd")

# Launchers of Kata's wait for this text on stderr.
WAITING = "Waiting for vhost-user socket connection..."


def live(options: ServeOptions, line: CommandLine) -> int:
    """The exit status: 0 when the front end has left. ConfigError."""
    listening = go_to_background() if "daemonize" in line.own else None
    logs.start(options.log_level, PROGRAM if options.syslog or listening else None)
    logs.note(line.notes)

    def ready() -> None:
        log.info(WAITING)
        notify_ready()
        if listening is not None:
            listening()

    with contextlib.ExitStack() as stack:
        if options.socket is not None:
            stack.enter_context(PidFile("--socket-path", options.socket))
        return supervisor.serve(options, once=True, ready=ready)


def go_to_background() -> Callable[[], None]:
    """Go on in a new session; the process that was started ends when the function is called, with status
    0, or with this one and its status."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        wait_for(child, reader)
    os.close(reader)
    os.setsid()

    def listening() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)
        os.close(null)
        os.write(writer, b"1")
        os.close(writer)

    return listening


def wait_for(child: int, reader: int) -> NoReturn:
    if os.read(reader, 1):
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
