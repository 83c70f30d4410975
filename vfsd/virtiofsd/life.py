"""One process tree for one front end, as virtiofsd lives: it begins, says so, and ends with it."""

import logging
from collections.abc import Callable, Sequence

from vfsd.daemon import logs, supervisor
from vfsd.daemon.sockets import Listener
from vfsd.daemon.systemd import notify_ready
from vfsd.options.table import ServeOptions
from vfsd.options.virtiofsd import PROGRAM

log = logging.getLogger("vfsd.virtiofsd")

# Launchers of Kata's wait for this text on stderr.
WAITING = "Waiting for vhost-user socket connection..."


def live(
    options: ServeOptions, notes: Sequence[str], listener: Listener, listening: Callable[[], None] | None
) -> int:
    """The exit status: 0 when the front end has left. ConfigError.

    listening: told when it is there, in the background: it logs to syslog then.
    """
    logs.start(options.log_level, options.log_format, PROGRAM if options.syslog or listening else None)
    logs.note(notes)

    def ready() -> None:
        log.info(WAITING)
        notify_ready()
        if listening is not None:
            listening()

    return supervisor.serve(options, listener, once=True, ready=ready)
