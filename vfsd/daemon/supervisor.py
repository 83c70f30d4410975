"""The daemon's first process: it listens, forks a server for each front end, and tells what becomes of them.

One thread, which waits for its descriptors and for nothing else. It touches no guest's data: of what a
front end says it sees how long the first message is.
"""

import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping
from errno import ENOMEM
from fcntl import ioctl
from functools import partial
from mmap import PAGESIZE, mmap
from termios import FIONREAD
from typing import Final, Self

from vfsd.daemon import forked, server
from vfsd.daemon.channel import Channel, Kind, pair
from vfsd.daemon.ending import ending, latest_request
from vfsd.daemon.process import (
    STOP_SIGNALS,
    Signals,
    drop_process_wide,
    grow_descriptor_table,
    set_descriptor_limit,
)
from vfsd.daemon.share import Share, open_share
from vfsd.daemon.sockets import Listener, check_all_used, open_control, open_socket
from vfsd.daemon.systemd import feed_watchdog, notify_ready, notify_status, sockets_handed_over, watchdog_s
from vfsd.errors import EXIT_BUG
from vfsd.options.table import ServeOptions
from vfsd.sandbox.seccomp import name_of
from vfsd.state._journal import CHECKED
from vfsd.vhost.messages import HEADER, PAYLOAD_MAX

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from vfsd.daemon.controlled import Controlled

log = logging.getLogger("vfsd")

EXIT_LEFT_BEHIND: Final = 1
EXIT_SIGNALLED: Final = 1  # where the front end's leaving is the end that is looked for; virtiofsd's
ACCEPTS_PER_TURN: Final = 64
SILENT_MAX: Final = 128  # front ends that have not said their first message
SILENT_S: Final = 300.0  # until it begins: a VMM connects before it has all of its memory
PARTIAL_S: Final = 10.0  # for the rest of it
STARTING_MAX: Final = 16  # servers that have not answered it yet
STARTING_S: Final = 10.0
KILLED_S: Final = 1.0  # for one to be gone after that
PAUSE_S: Final = 0.1  # before the next try to accept or fork where something can't be had


def serve(
    options: ServeOptions, listener: Listener | None = None, *, once: bool = False,
    ready: Callable[[], None] = notify_ready,
) -> int:  # fmt: skip
    """Serve until a stop signal, or once until the front end has left: the exit status.

    ConfigError before anything is made. listener: opened already. ready: called when it is served.
    """
    set_descriptor_limit(options.rlimit_nofile)
    share = open_share(options)
    try:
        share.prepare()
        if listener is None:
            handed = sockets_handed_over() if options.fd is None else {}
            check_all_used(handed, [options])
            listener = open_socket(options, handed=handed)
    except BaseException:
        share.close()
        raise
    grow_descriptor_table(share.settings.fd_budget)
    once = once or listener.connected
    try:
        control = open_control(options)
    except BaseException:
        listener.close()
        share.close()
        raise
    with (
        Signals(signal.SIGCHLD) as caught,
        Supervisor([(listener, share)], caught, once, control=control) as supervisor,
    ):
        drop_process_wide()
        ready()
        if not os.path.isdir(options.shared_dir):
            log.warning("%s is a file: vfsd mount can mount it, Linux's virtiofs takes every root for a"
                        " directory and gives EIO", options.shared_dir)  # fmt: skip
        where = options.socket or f"descriptor {options.fd}"
        log.info("READY: %s is served on %s", options.shared_dir, where)
        supervisor.run()
        signalled = caught.stops > 0
    log.info("ended by a signal" if signalled else "ended, as the front end has left")
    return supervisor.status or (EXIT_SIGNALLED if once and signalled else 0)


class Silent:
    """A front end that has not said its first message yet."""

    def __init__(self, sock: socket.socket, share: Share, until: float | None) -> None:
        self.sock = sock
        self.share = share
        self.until = until
        self.begun = False  # a part of the message has come
        self.whole = False  # all of it has, it waits for a server


class Guest:
    """A server process, as its supervisor knows it."""

    def __init__(
        self, pid: int, share: Share, partition: int, latest: mmap, channel: Channel, until: float | None
    ) -> None:
        self.pid = pid
        self.share = share
        self.partition = partition  # of the share's locks
        self.latest = latest  # opcode of the request that began last
        self.channel = channel
        self.until = until  # what it is to have done by then, else SIGKILL
        self.starting = True
        self.killed = False
        self.reported = False  # that it could not be ended
        self.since = time.time()
        self.report = ""  # what it has done, once it was asked
        self.why: tuple[int, str] | None = None  # its own words for its end, with their level
        self.summary = ""
        self.refused = ""  # what it was ended for by seccomp


class Supervisor:
    """Closing it ends every server.

    once: it takes one front end, waits for it as long as that takes, and ends when it leaves.
    on_hangup: called for SIGHUP, unless that stops. control: what --control-socket listens on.
    """

    def __init__(
        self, shares: list[tuple[Listener, Share]], caught: Signals, once: bool = False,
        on_hangup: Callable[[], None] | None = None, control: Listener | None = None,
    ) -> None:  # fmt: skip
        self.status = 0
        self._on_hangup = on_hangup
        self._once = once
        self._met = False  # a front end, once
        self._shares = shares
        self._removed: list[Share] = []  # which still have servers
        self._awaited: dict[int, tuple[float, Callable[[bool], None]]] = {}  # by descriptor
        self._caught = caught
        self._epoll = select.epoll()
        self._sources: dict[int, Callable[[], None]] = {}
        self._silent: dict[int, Silent] = {}  # by descriptor, oldest first
        self._guests: dict[int, Guest] = {}  # by process id
        self._paused_until: float | None = None
        self._short_of = ""  # what could not be had, until it could again
        self._watchdog_s = watchdog_s()
        self._fed_at = 0.0  # the watchdog, time.monotonic()
        self.watch(caught.fileno(), self._on_signals)
        self._controlled: Controlled | None = None
        if control is not None:
            from vfsd.daemon import controlled  # most daemons have no use for it

            self._controlled = controlled.Controlled(self, control)
        for listener, share in shares:
            if listener.connected:
                self._meet(listener.sock.dup(), share)
                listener.stop()
            else:
                self._listen_on(listener, share)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop_listening()
        if self._controlled is not None:
            self._controlled.close()
        self._epoll.close()
        for share in self._all_shares():
            share.close()

    @property
    def guests(self) -> Mapping[int, Guest]:
        """By the process id of their server."""
        return self._guests

    @property
    def shares(self) -> Collection[tuple[Listener, Share]]:
        return self._shares

    def end_guest(self, pid: int) -> None:
        """End its server."""
        self._end(self._guests[pid])

    def change(self, shares: list[tuple[Listener, Share]]) -> None:
        """Have these shares from now on. Servers of others go on until their guests leave."""
        before, self._shares = self._shares, shares
        inherited = dict(shares)
        heirs = {share: inherited.get(listener) for listener, share in before}
        for listener, share in before:
            self.unwatch(listener.sock.fileno())
            if listener not in inherited:
                listener.close()
            if all(share is not kept for _, kept in shares):
                self._removed.append(share)
        for listener, share in shares:
            self._listen_on(listener, share)
        for silent in list(self._silent.values()):
            heir = heirs[silent.share]
            if heir is None:
                self._drop(silent)
            else:
                silent.share = heir
        self._close_removed()

    def wait_for(self, fd: int, seconds: float, then: Callable[[bool], None]) -> None:
        """Have it called once: whether that descriptor can be read within that time."""
        self._awaited[fd] = (time.monotonic() + seconds, then)
        self.watch(fd, partial(self._call_awaited, fd, True))

    def _call_awaited(self, fd: int, ready: bool) -> None:
        self.unwatch(fd)
        self._awaited.pop(fd)[1](ready)

    def run(self) -> None:
        """Until a stop signal or the end of the one front end; then until every server has ended or can't
        be ended."""
        gc.collect()
        gc.freeze()  # a server's collections leave these pages shared
        while not self._caught.stops and not self._is_over():
            self._turn()
        self._stop_listening()
        for guest in self._guests.values():
            self._end(guest)
        while any(not guest.reported for guest in self._guests.values()):
            if self._caught.stops > 1:
                for guest in self._guests.values():
                    self._kill(guest)
            self._turn()
        if self._guests:
            self.status = EXIT_LEFT_BEHIND

    # ---- one turn

    def _turn(self) -> None:
        for fd, _ in self._epoll.poll(self._timeout()):
            source = self._sources.get(fd)  # gone, when another one of this turn has closed it
            if source is not None:
                source()
        self._look_at_deadlines(time.monotonic())

    def _is_over(self) -> bool:
        there = self._silent or any(not guest.reported for guest in self._guests.values())
        return self._once and self._met and not there

    def _timeout(self) -> float | None:
        deadlines = [s.until for s in self._silent.values() if not s.whole and s.until is not None]
        deadlines += [guest.until for guest in self._guests.values() if guest.until is not None]
        deadlines += [until for until, _ in self._awaited.values()]
        if self._paused_until is not None:
            deadlines.append(self._paused_until)
        if self._controlled is not None and (until := self._controlled.deadline()) is not None:
            deadlines.append(until)
        if self._watchdog_s is not None:
            deadlines.append(self._fed_at + self._watchdog_s)
        return max(0, min(deadlines) - time.monotonic()) if deadlines else None

    def _listen_on(self, listener: Listener, share: Share) -> None:
        events = select.EPOLLIN if self._paused_until is None else 0
        self.watch(listener.sock.fileno(), partial(self._accept, listener, share), events)

    def _all_shares(self) -> list[Share]:
        return [*(share for _, share in self._shares), *self._removed]

    def _close_removed(self) -> None:
        for share in self._removed[:]:
            if all(guest.share is not share for guest in self._guests.values()):
                self._removed.remove(share)
                share.close()

    def watch(self, fd: int, source: Callable[[], None], events: int = select.EPOLLIN) -> None:
        self._epoll.register(fd, events)
        self._sources[fd] = source

    def unwatch(self, fd: int) -> None:
        if self._sources.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _look_at_deadlines(self, now: float) -> None:
        if self._watchdog_s is not None and now >= self._fed_at + self._watchdog_s:
            self._fed_at = now
            feed_watchdog()
        if self._controlled is not None:
            self._controlled.look(now)
        if self._paused_until is not None and now >= self._paused_until:
            self._resume()
        for silent in [s for s in self._silent.values() if not s.whole]:
            if silent.until is None or now < silent.until:
                continue
            self._drop(silent)
            if silent.begun:
                log.warning("a front end said half a message for %g s, its connection is closed", PARTIAL_S)
            else:
                log.warning("a front end said nothing for %g s, its connection is closed", SILENT_S)
        for fd in [fd for fd, (until, _) in self._awaited.items() if now >= until]:
            self._call_awaited(fd, False)
        for guest in [g for g in self._guests.values() if g.until is not None and now >= g.until]:
            self._too_late(guest)

    def _on_signals(self) -> None:
        self._caught.take()
        self._reap()
        if self._caught.hangup and self._on_hangup is not None and not self._caught.stops:
            self._caught.hangup = False
            self._on_hangup()

    # ---- front ends

    def _accept(self, listener: Listener, share: Share) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as problem:
                self._pause("a front end can't be accepted", problem)
                return
            self._meet(sock, share)
            if self._once:
                self.unwatch(listener.sock.fileno())
                listener.stop()
                return

    def _meet(self, sock: socket.socket, share: Share) -> None:
        """A front end has connected."""
        sock.setblocking(False)
        self._met = True
        self._make_room()
        # The only one is waited for.
        silent = Silent(sock, share, None if self._once else time.monotonic() + SILENT_S)
        self._silent[sock.fileno()] = silent
        # Edge triggered: half a message is looked at once.
        look = partial(self._listen_to, silent)
        self.watch(sock.fileno(), look, select.EPOLLIN | select.EPOLLET)
        self._listen_to(silent)

    def _make_room(self) -> None:
        """The oldest that has said nothing makes way: an honest front end speaks at once."""
        if len(self._silent) < SILENT_MAX:
            return
        oldest = next((s for s in self._silent.values() if not s.whole), None)
        self._drop(oldest or next(iter(self._silent.values())))
        log.warning("over %d front ends have said nothing, the oldest's connection is closed", SILENT_MAX)

    def _listen_to(self, silent: Silent) -> None:
        there = heard(silent.sock)
        if there is None:
            self._drop(silent)
            log.info("%s without a word", server.LEFT)
        elif there:
            silent.whole = True
            self._start_servers()
        elif not silent.begun and pending(silent.sock):
            silent.begun = True
            silent.until = time.monotonic() + PARTIAL_S

    def _drop(self, silent: Silent) -> None:
        del self._silent[silent.sock.fileno()]
        self.unwatch(silent.sock.fileno())
        silent.sock.close()

    def _pause(self, what: str, problem: OSError | MemoryError) -> None:
        """Take no more front ends for a moment: they wait in the backlog."""
        reason = problem.strerror if isinstance(problem, OSError) else os.strerror(ENOMEM)
        if f"{what}: {reason}" != self._short_of:
            self._short_of = f"{what}: {reason}"
            log.error("%s", self._short_of)
        for listener, _ in self._shares if self._paused_until is None else ():
            if listener.sock.fileno() in self._sources:
                self._epoll.modify(listener.sock.fileno(), 0)
        self._paused_until = time.monotonic() + PAUSE_S

    def _resume(self) -> None:
        self._paused_until = None
        for listener, _ in self._shares:
            if listener.sock.fileno() in self._sources:
                self._epoll.modify(listener.sock.fileno(), select.EPOLLIN)
        self._start_servers()

    def _stop_listening(self) -> None:
        """Idempotent. What would change the shares is not waited for any more."""
        self._paused_until = None
        for fd in self._awaited:
            self.unwatch(fd)
        self._awaited.clear()
        for listener, _ in self._shares:
            self.unwatch(listener.sock.fileno())
            listener.close()
        for silent in list(self._silent.values()):
            self._drop(silent)

    # ---- servers

    def _start_servers(self) -> None:
        """For who waits for one, in the order they came."""
        if self._paused_until is not None or self._caught.stops:
            return
        starting = sum(guest.starting for guest in self._guests.values())
        waiting = [silent for silent in self._silent.values() if silent.whole]
        for silent in waiting[: max(0, STARTING_MAX - starting)]:
            try:
                self._fork(silent)
            except (OSError, MemoryError) as problem:
                self._drop(silent)
                self._pause("a front end can't be served", problem)
                return
            self._short_of = ""

    def _fork(self, silent: Silent) -> None:
        """OSError, MemoryError."""
        latest = mmap(-1, PAGESIZE)
        ours, theirs = pair()
        segment = silent.share.locks.segment
        partition = segment.reserve()
        assigned = server.Assignment(silent.share, silent.sock, theirs, partition, latest, os.getpid())
        # A signal before the server has handlers of its own would come here.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid = silent.share.sandbox.fork()
            if pid == 0:
                forked.main(assigned, partial(self._close_in_server, silent, ours))
        except BaseException:
            segment.release(partition)
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            theirs.close()
        guest = Guest(pid, silent.share, partition, latest, ours, time.monotonic() + STARTING_S)
        self._guests[pid] = guest
        self.watch(ours.fileno(), partial(self._hear, guest))
        self._drop(silent)
        self._tell_status()

    def _close_in_server(self, served: Silent, own: Channel) -> None:
        """In the process forked for a front end: what is the supervisor's."""
        own.close()
        if self._controlled is not None:
            self._controlled.socket.close_in_server()
        self._epoll.close()
        self._caught.close()
        for listener, _ in self._shares:
            listener.sock.close()
        for share in self._all_shares():
            if share is not served.share:
                share.close()
                del share.locks  # the memory that its servers have in common
        for guest in self._guests.values():
            guest.channel.close()
            guest.latest.close()
        for silent in self._silent.values():
            if silent is not served:
                silent.sock.close()

    def _hear(self, guest: Guest) -> None:
        try:
            for kind, text in guest.channel.told():
                self._note(guest, kind, text)
        except EOFError:
            self.unwatch(guest.channel.fileno())

    def _note(self, guest: Guest, kind: Kind, text: str) -> None:
        if kind is Kind.SERVED and guest.starting:
            guest.starting = False
            if guest.why is None and not self._caught.stops:
                guest.until = None
            log.info("a front end has connected, its server is %d", guest.pid)
            self._start_servers()
        elif kind in (Kind.ENDING, Kind.FAULT) and guest.why is None:
            guest.why = (logging.INFO if kind is Kind.ENDING else logging.WARNING, text)
            if guest.until is None:
                guest.until = time.monotonic() + guest.share.settings.stop_timeout_s
        elif kind is Kind.ENDED:
            guest.summary = text
        elif kind is Kind.REPORT and self._controlled is not None:
            guest.report = text
            self._controlled.on_report(guest.pid)
        elif kind is Kind.REFUSED and text.isascii() and text.isdigit():
            call = name_of(int(text))
            guest.refused = f" when it made a system call that --seccomp refuses: {call}"
            if guest.share.settings.keeper:  # which tells of the rest
                log.error("the server of a guest made a system call that --seccomp refuses: %s", call)

    def _end(self, guest: Guest) -> None:
        os.kill(guest.pid, signal.SIGTERM)
        guest.until = time.monotonic() + guest.share.settings.stop_timeout_s

    def _kill(self, guest: Guest) -> None:
        if not guest.killed:
            os.kill(guest.pid, signal.SIGKILL)
            guest.killed = True
            guest.until = time.monotonic() + KILLED_S

    def _too_late(self, guest: Guest) -> None:
        if not guest.killed:
            what = "answer its front end" if guest.starting and guest.why is None else "end"
            log.warning("the server %d of a guest does not %s, it is killed", guest.pid, what)
            self._kill(guest)
            return
        guest.until = None
        guest.reported = True
        log.error("the server %d of a guest can't be killed: the host's file system does not answer it;"
                  " it is left behind", guest.pid)  # fmt: skip

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            guest = self._guests.pop(pid, None)
            if guest is not None:
                self._bury(guest, os.waitstatus_to_exitcode(status))

    def _bury(self, guest: Guest, status: int) -> None:
        """A server has ended: say why."""
        self._hear(guest)
        self.unwatch(guest.channel.fileno())
        guest.channel.close()
        guest.share.locks.segment.release(guest.partition)
        self._close_removed()
        if self._controlled is not None:
            self._controlled.on_report(guest.pid)
        self._tell_end(guest, status)
        self._tell_status()
        guest.latest.close()
        if CHECKED and status in (EXIT_BUG, -signal.SIGABRT):
            self.status = EXIT_BUG
        if self._paused_until is not None:
            self._resume()  # what it had can be had again
        else:
            self._start_servers()

    def _tell_status(self) -> None:
        notify_status(f"guests: {len(self._guests)}, shares: {len(self._shares)}")

    def _tell_end(self, guest: Guest, status: int) -> None:
        if status == 0 and guest.why is not None:
            level, why = guest.why
            log.log(level, "%s", f"{why}; {guest.summary}" if guest.summary else why)
        else:
            log.error("the server %d of a guest %s%s, its last request was %s; other guests go on", guest.pid,
                      ending(status), guest.refused, latest_request(guest.latest))  # fmt: skip
            self.status = self.status or int(self._once)


def pending(sock: socket.socket) -> int:
    """Bytes that have come."""
    return int.from_bytes(ioctl(sock, FIONREAD, bytes(4)), "little")


def heard(sock: socket.socket) -> bool | None:
    """Whether a server would not have to wait for the first message; None when nobody will send one."""
    try:
        head = sock.recv(HEADER.size, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return None
    if not head:
        return None
    # What can't be whole is for the server to refuse: also where the front end has left in the middle.
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if poll.poll(0):
        return True
    size = pending(sock)
    if len(head) < HEADER.size:
        return size >= HEADER.size
    payload: int = HEADER.unpack(head)[2]
    return payload > PAYLOAD_MAX or size >= HEADER.size + payload
