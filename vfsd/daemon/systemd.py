"""What systemd hands over, and is told: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3)."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Final

from vfsd.errors import ConfigError
from vfsd.options.checks import socket_place

log = logging.getLogger("vfsd")

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
HEARD_S: Final = 1.0  # for systemd to take what decides over the unit; news alone is not waited with


def notify_ready() -> None:
    notify(b"READY=1", HEARD_S)


def notify_reloading() -> None:
    """To be followed by notify_ready() (Type=notify-reload of systemd.service(5))."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notify(b"RELOADING=1\nMONOTONIC_USEC=%d" % now, HEARD_S)


def notify_status(text: str) -> None:
    """For the line "Status:" of systemctl status."""
    notify(f"STATUS={text}".encode())


def notify(state: bytes, within_s: float = 0) -> None:
    """Tell systemd, if it asked."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.settimeout(within_s)
        try:
            told.connect(address)
            told.sendall(state)
        except BlockingIOError:
            return  # news: the next one counts
        except OSError as problem:
            log.warning("NOTIFY_SOCKET %s: %s", address, problem.strerror or problem)


def watchdog_s() -> float | None:
    """How often WATCHDOG=1 is to be said: half of WatchdogSec=. None: systemd does not watch this process."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or int(usec) == 0 or os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())):
        return None
    return int(usec) / 2e6


def feed_watchdog() -> None:
    notify(b"WATCHDOG=1")


def sockets_handed_over() -> dict[str, int]:
    """Descriptors of the listening sockets that LISTEN_FDS hands to this process, by socket_place().

    Only once: nothing is there for who asks again. ConfigError: one has no path, so no share can be meant.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count.isdigit() or pid != str(os.getpid()):
        return {}
    found = {}
    for fd in range(FIRST_FD, FIRST_FD + int(count)):
        path = path_of(fd)
        if not path:
            raise ConfigError(
                "LISTEN_FDS", f"descriptor {fd} is no socket with a path; give the unit ListenStream=/run/..."
            )
        os.set_inheritable(fd, False)
        found[socket_place(path)] = fd
    return found


def path_of(fd: int) -> str:
    """Of a listening socket; "" if it is none, or has none."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family != socket.AF_UNIX or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return ""
            name = sock.getsockname()
    except OSError:
        return ""
    return name if isinstance(name, str) else ""
