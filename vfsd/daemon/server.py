"""The process that serves one guest, from its fork to its end."""

import logging
import select
import signal
import socket
import sys
from dataclasses import dataclass
from errno import EMFILE, ENFILE, ENOMEM
from mmap import mmap

from vfsd.daemon import logs
from vfsd.daemon.channel import Channel, Kind
from vfsd.daemon.connection import Connection, Kept
from vfsd.daemon.process import STOP_SIGNALS, Signals
from vfsd.daemon.share import Share
from vfsd.errors import ProtocolError

log = logging.getLogger("vfsd.daemon")

LEFT = "the front end has left"
SHORTAGES = (EMFILE, ENFILE, ENOMEM)
NO_THREAD = "can't start new thread"  # of a RuntimeError of CPython's


class CannotServe(Exception):
    """Memory, a thread or a descriptor can't be had."""


@dataclass(frozen=True)
class Assignment:
    """What a server is forked for.

    partition: of what the share's servers tell each other of locks. latest: shared memory for the opcode of
    the request that began last. supervisor: its process id.
    """

    share: Share
    sock: socket.socket
    channel: Channel
    partition: int
    latest: mmap
    supervisor: int


def run(assigned: Assignment, caught: Signals, keep: set[int], kept: Kept | None = None) -> None:
    """Once in its sandbox it opens nothing by path but what the guest asks for, beneath the share.

    keep: descriptors that it needs besides the share's and those of these objects. kept: by a keeper; then
    it is in its sandbox.
    """
    channel = assigned.channel
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    connection: Connection | None = None
    kind = Kind.ENDING
    try:
        connection = connect(assigned, keep, kept)
        why = serve(connection, caught, channel)
    except (ProtocolError, OSError) as problem:
        kind, why = Kind.FAULT, f"the front end broke the protocol: {problem}"
    except CannotServe as problem:
        kind, why = Kind.FAULT, f"a front end can't be served: {problem}"
    channel.tell(kind, why)
    if connection is not None:
        connection.close()
        channel.tell(Kind.ENDED, connection.summary())


def connect(assigned: Assignment, keep: set[int], kept: Kept | None) -> Connection:
    share, sock, channel = assigned.share, assigned.sock, assigned.channel
    try:
        if kept is None:
            ours = {sys.stderr.fileno(), sock.fileno(), channel.fileno(), *keep}
            share.sandbox.enter(ours, (channel.fileno(), f"{Kind.REFUSED} ".encode()))
        return Connection(share, sock, assigned.latest, kept)
    except (OSError, MemoryError, RuntimeError) as problem:
        raise CannotServe(lacking(problem)) from problem


def serve(connection: Connection, caught: Signals, channel: Channel) -> str:
    """Until the connection ends: why. ProtocolError, OSError: the front end's fault."""
    poll = select.poll()
    for source in (connection.backend, caught, channel):
        poll.register(source, select.POLLIN)
    served = False
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if caught.fileno() in ready:
            caught.take()
            if caught.stops:
                return "the daemon stops"
        if channel.fileno() in ready and not heed(channel, connection):
            return "the supervisor has ended"
        if connection.backend.fileno() in ready:
            try:
                if not connection.backend.on_readable():
                    return LEFT
            except (MemoryError, RuntimeError) as problem:
                raise CannotServe(lacking(problem)) from problem
            except (ProtocolError, OSError) as problem:
                if shortage := shortage_behind(problem):
                    raise CannotServe(lacking(shortage)) from problem
                raise
            if not served:
                channel.tell(Kind.SERVED)
                served = True


def heed(channel: Channel, connection: Connection) -> bool:
    """What the supervisor asks for. False: it has ended."""
    try:
        for kind, text in channel.told():
            if kind is Kind.REPORT:
                channel.tell(Kind.REPORT, connection.report())
            elif kind is Kind.LOG_LEVEL:
                logs.set_level(text)
    except EOFError:
        return False
    return True


def shortage_behind(problem: BaseException | None) -> OSError | None:
    """What was not the front end's fault."""
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in SHORTAGES:
            return problem
        problem = problem.__cause__
    return None


def lacking(problem: OSError | MemoryError | RuntimeError) -> str:
    """What can't be had. Raises what is no lack of anything."""
    if isinstance(problem, OSError):
        return problem.strerror or str(problem)
    if isinstance(problem, RuntimeError) and str(problem) != NO_THREAD:
        raise problem
    return str(problem) or "out of memory"
