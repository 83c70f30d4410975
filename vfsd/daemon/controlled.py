"""What the control socket can do with a supervisor."""

import os
import re
import select
import signal
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol

from vfsd.control.server import ControlSocket
from vfsd.daemon import logs
from vfsd.daemon.channel import Channel, Kind
from vfsd.daemon.share import Share
from vfsd.daemon.sockets import Listener

# "FUSE version, requests, errors" of Connection.report(): of a process that a guest may have taken over.
REPORT: Final = re.compile(r"(-|7\.\d{1,3}) (\d{1,20}) (\d{1,20})")


class ServedGuest(Protocol):
    """Of the supervisor's guests."""

    pid: int
    share: Share
    channel: Channel
    since: float
    report: str


class Supervisor(Protocol):
    """Of vfsd.daemon.supervisor, what is needed here."""

    @property
    def guests(self) -> Mapping[int, ServedGuest]: ...
    @property
    def shares(self) -> Collection[tuple[Listener, Share]]: ...
    def watch(self, fd: int, source: Callable[[], None], events: int = select.EPOLLIN) -> None: ...
    def unwatch(self, fd: int) -> None: ...
    def end_guest(self, pid: int) -> None: ...


class Asked:
    """Servers that have not said yet what they have done, for one who asks."""

    def __init__(self, pids: set[int], until: float, then: Callable[[], None]) -> None:
        self.pids = pids
        self.until = until
        self.then = then


class Controlled:
    """A supervisor, as the methods see it (vfsd.control.methods.Daemon), with the socket it is asked by."""

    def __init__(self, supervisor: Supervisor, listener: Listener) -> None:
        self._supervisor = supervisor
        self._began = time.time()
        self._asked: list[Asked] = []
        self.socket = ControlSocket(listener, self, supervisor)

    def close(self) -> None:
        self._asked.clear()
        self.socket.close()

    def deadline(self) -> float | None:
        """When to look() (time.monotonic())."""
        deadlines = [asked.until for asked in self._asked]
        silent = self.socket.deadline()
        return min(deadlines if silent is None else [*deadlines, silent], default=None)

    def look(self, now: float) -> None:
        """At who has not answered in time."""
        self.socket.look(now)
        self._tell_asked(now)

    def on_report(self, pid: int) -> None:
        """A server has said what it has done, or has ended."""
        for asked in self._asked:
            asked.pids.discard(pid)
        self._tell_asked(time.monotonic())

    def _tell_asked(self, now: float) -> None:
        for asked in [asked for asked in self._asked if not asked.pids or now >= asked.until]:
            self._asked.remove(asked)
            asked.then()

    # ---- for the methods

    def describe(self) -> dict[str, Any]:
        guests = self._supervisor.guests.values()
        return {
            "pid": os.getpid(),
            "since": round(self._began),
            "shares": [
                {
                    "shared_dir": share.settings.path, "socket": listener.path,
                    "guests": sum(guest.share is share for guest in guests),
                }
                for listener, share in self._supervisor.shares
            ],
            "guests": [self._describe(guest) for guest in guests],
        }  # fmt: skip

    def _describe(self, guest: ServedGuest) -> dict[str, Any]:
        told: dict[str, Any] = {"fuse": None, "requests": None, "errors": None}
        if report := REPORT.fullmatch(guest.report):
            fuse = None if report[1] == "-" else report[1]
            told = {"fuse": fuse, "requests": int(report[2]), "errors": int(report[3])}
        return {
            "server": guest.pid, "shared_dir": guest.share.settings.path, "since": round(guest.since), **told
        }  # fmt: skip

    def ask_reports(self, within_s: float, then: Callable[[], None]) -> None:
        guests = self._supervisor.guests.values()
        for guest in guests:
            guest.report = ""
            guest.channel.tell(Kind.REPORT)
        self._asked.append(Asked({guest.pid for guest in guests}, time.monotonic() + within_s, then))
        self._tell_asked(time.monotonic())

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def stop_guest(self, pid: int) -> bool:
        there = pid in self._supervisor.guests
        if there:
            self._supervisor.end_guest(pid)
        return there

    def set_log_level(self, level: str) -> None:
        logs.set_level(level)
        for guest in self._supervisor.guests.values():
            guest.channel.tell(Kind.LOG_LEVEL, level)
