"""The process that the supervisor forks for a front end, from fork to end: a server, or its keeper."""

import logging
import os
import signal
from collections.abc import Callable
from typing import NoReturn

from vfsd.daemon import logs, server
from vfsd.daemon._prctl import die_with_parent, set_name
from vfsd.daemon.channel import Kind
from vfsd.daemon.keeper import Keeper
from vfsd.daemon.process import STOP_SIGNALS, Signals
from vfsd.errors import EXIT_BUG, ProtocolError

log = logging.getLogger("vfsd.daemon")


def main(assigned: server.Assignment, close_inherited: Callable[[], None]) -> NoReturn:
    """Serve that front end in this process, which was forked for it, and end.

    The stop signals are blocked. close_inherited: closes what is the supervisor's.
    """
    status = EXIT_BUG
    try:
        close_inherited()
        if die_with_parent(assigned.supervisor):
            # Who hangs up means the supervisor, which ends its servers or goes on.
            keeper = assigned.share.settings.keeper
            with Signals(signal.SIGHUP, *([signal.SIGCHLD] if keeper else [])) as caught:
                keep = logs.become_server() | caught.descriptors()
                assigned.share.locks.join(assigned.partition)
                set_name(b"vfsd-keeper" if keeper else b"vfsd-server")
                if keeper:
                    keep_serving(assigned, caught, keep)
                else:
                    server.run(assigned, caught, keep)
        status = 0
    except BaseException:
        log.critical("the server of a guest ends", exc_info=True)
    finally:
        os._exit(status)


def keep_serving(assigned: server.Assignment, caught: Signals, keep: set[int]) -> None:
    """By a server that another one follows when it dies."""
    try:
        keeper = Keeper(assigned, caught, keep)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        keeper.run()
    except (OSError, MemoryError) as problem:
        assigned.channel.tell(Kind.FAULT, f"a front end can't be served: {server.lacking(problem)}")
    except ProtocolError as problem:
        assigned.channel.tell(Kind.FAULT, f"the server of a guest does not listen: {problem}")
