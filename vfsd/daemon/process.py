"""What a command that stays in the foreground has to do as a process: limits and signals."""

import fcntl
import os
import resource
import signal
import socket
from types import FrameType
from typing import Self

from vfsd.errors import ConfigError, HostError

# Of a process's descriptors, those for its guest's inodes and open files; queues and memory need the rest.
GUEST_SHARE = 0.75
GUEST_SHARE_MAX = 0.9
# 8 bytes each of the kernel's memory.
TABLE_MAX = 1 << 16
NOFILE_USUAL = 1_000_000  # virtiofsd's
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def raise_descriptor_limit() -> None:
    """As many descriptors as the operator's hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def set_descriptor_limit(wanted: int | None) -> None:
    """--rlimit-nofile; unless given, virtiofsd's limit, or the hard one where no more is allowed.

    HostError: what was asked for is not allowed.
    """
    if wanted == 0:
        return
    with open("/proc/sys/fs/nr_open") as file:
        nr_open = int(file.read())
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = min(NOFILE_USUAL, nr_open) if wanted is None else wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, max(soft, hard) if wanted is None else soft))
    except (OSError, ValueError) as problem:
        if wanted is None:
            raise_descriptor_limit()
            return
        raise HostError(
            "--rlimit-nofile", f"{wanted} is more than is allowed ({hard}, or {nr_open} as root); ask for"
            " less, or raise the hard limit",
        ) from problem  # fmt: skip


def guest_descriptors(wanted: int | None) -> int:
    """Of a server's descriptors, those for its guest's inodes and open files. ConfigError."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted is None:
        return int(limit * GUEST_SHARE)
    if wanted > limit * GUEST_SHARE_MAX:
        raise ConfigError(
            "--fd-budget", f"{wanted} of {limit} descriptors leave too few for the rest; raise the limit"
            f" (ulimit -n) or use at most {int(limit * GUEST_SHARE_MAX)}",
        )  # fmt: skip
    return wanted


def grow_descriptor_table(budget: int) -> None:
    """Have the table of descriptors as large as it will be, while there is but one thread.

    With more of them each doubling is a synchronize_rcu() in the middle of an open(2): 5 to 30 ms
    (expand_fdtable of fs/file.c), six of them in the first walk through 3,000 files.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as some:
        os.close(fcntl.fcntl(some, fcntl.F_DUPFD_CLOEXEC, min(budget, TABLE_MAX, limit) - 1))


def drop_process_wide() -> None:
    """What would show through in files made for guests: the umask and root's supplementary groups."""
    os.umask(0)
    # A user namespace with one group, made without privilege, keeps what its maker had.
    if os.geteuid() != 0:
        return
    with open("/proc/self/setgroups") as file:
        allowed = file.read().strip() == "allow"
    if allowed:
        os.setgroups([])


class Signals:
    """Tells of the stop signals that have come; fileno() can be read when there is something to take().

    others: further signals to wake up for; SIGHUP among them is then no stop signal. A context manager:
    handlers are as before at its end.
    """

    def __init__(self, *others: signal.Signals) -> None:
        self.stops = 0
        self.hangup = False  # SIGHUP, where it does not stop
        self._stopping = set(STOP_SIGNALS) - set(others)
        self._stop = False
        self._reader, self._wakeup = socket.socketpair()
        self._reader.setblocking(False)
        self._wakeup.setblocking(False)
        numbers = {*STOP_SIGNALS, *others}
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def descriptors(self) -> set[int]:
        """All that this object has open."""
        return {self._reader.fileno(), self._wakeup.fileno()}

    def take(self) -> None:
        """Count what has come; another thread may have taken a signal whose handler has not run yet."""
        try:
            while numbers := self._reader.recv(4096):
                self.stops += sum(number in self._stopping for number in numbers)
                self.hangup |= signal.SIGHUP in numbers and signal.SIGHUP not in self._stopping
        except BlockingIOError:
            self.stops = max(self.stops, int(self._stop))

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._reader.close()
        self._wakeup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """The wakeup descriptor tells what has come, unless other signals have filled it."""
        self._stop |= number in self._stopping
