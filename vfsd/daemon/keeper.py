"""The process between a guest's front end and its server, which a new server follows when it dies.

It has the front end's socket and one table of descriptors with its server, so that of a server that is killed
every open file, lock and descriptor of the rings is still there; what the server knew of them lies in memory
that both have (`vfsd.state`). It works on no request.
"""

import logging
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Final, NoReturn

from vfsd.daemon import server
from vfsd.daemon._clone import fork_sharing_descriptors
from vfsd.daemon._prctl import die_with_parent, set_name
from vfsd.daemon.channel import Kind
from vfsd.daemon.connection import keep_of
from vfsd.daemon.ending import ending, latest_request
from vfsd.daemon.process import STOP_SIGNALS, Signals
from vfsd.errors import EXIT_BUG, ProtocolError
from vfsd.vhost import messages
from vfsd.vhost.conversation import Conversation
from vfsd.vhost.messages import (
    NEED_REPLY,
    U64,
    FrontendRequest,
    Message,
    MessageReader,
    PeerClosed,
    ProtocolFeature,
)

log = logging.getLogger("vfsd.daemon")

# Servers that die of what they do, or are killed before they have done anything: so many of them within that
# time, and the keeper gives up.
CRASHES_MAX: Final = 3
KILLS_MAX: Final = 50
FAILURES_S: Final = 10.0
MESSAGES_PER_TURN: Final = 64


class Keeper:
    """Of one front end.

    keep: descriptors that it and its servers need besides the share's and those of these objects. OSError,
    MemoryError: something can't be had.
    """

    def __init__(self, assigned: server.Assignment, caught: Signals, keep: set[int]) -> None:
        self._assigned = assigned
        self._caught = caught
        share, sock, channel = assigned.share, assigned.sock, assigned.channel
        ours = {sys.stderr.fileno(), sock.fileno(), channel.fileno(), *keep}
        share.sandbox.enter_keeper(ours, (channel.fileno(), f"{Kind.REFUSED} ".encode()))
        self._kept = keep_of(share)
        self._said = Conversation()
        self._from_front_end = MessageReader(sock, messages.check_frontend_request, messages.frontend_name)
        self._reply_acks = False
        self._pid = 0  # of the server
        self._taken = 0  # requests, when it was started
        self._failures: dict[bool, list[float]] = {True: [], False: []}  # whether they crashed
        self._unanswered: Message | None = None  # what the front end waits for
        self._open = True  # the front end is there
        self._all = share.sandbox.open_descriptors()
        self._connect()

    def run(self) -> None:
        """Until a server has ended by itself, or too many have died."""
        while True:
            self._start()
            status = self._relay()
            if status == 0:
                return
            if self._caught.stops or not self._open:
                self._assigned.channel.tell(Kind.ENDING, f"its server {ending(status)}")
                return
            if not self._may_go_on(status):
                return
            self._recover()
            self._connect()

    # ---- the server

    def _connect(self) -> None:
        """A new socket to the server: of what one has read that died, nobody knows how much."""
        self._to_server, self._of_server = socket.socketpair()
        self._to_server.setblocking(False)
        self._from_server = MessageReader(
            self._to_server, messages.check_frontend_reply, messages.frontend_name
        )

    def _start(self) -> None:
        again = self._kept.state.generation > 0
        keeper = os.getpid()
        # A signal before the server has handlers of its own would come here.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._pid = fork_sharing_descriptors()
            if self._pid == 0:
                self._be_server(keeper, again)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._taken = self._kept.state.taken
        if again:
            state = self._kept.state
            at = {i: state.next_avail(i) for i in self._said.rings()}
            for data, fds in self._said.again({i: n for i, n in at.items() if n is not None}):
                messages.send(self._to_server, data, fds)
            if self._unanswered is not None:
                self._pass_on(self._unanswered)

    def _be_server(self, keeper: int, again: bool) -> NoReturn:
        """What is closed here is closed for the keeper, too."""
        status = EXIT_BUG
        try:
            if die_with_parent(keeper):
                set_name(b"vfsd-server")
                caught = Signals(signal.SIGHUP)
                if again:
                    self._kept.fs.regain_locks(self._assigned.share.sandbox.fdinfo)
                self._assigned.share.sandbox.enter_server()
                self._kept.fs.tables.set_proc(self._assigned.share.sandbox.own_descriptors)
                assigned = replace(self._assigned, sock=self._of_server)
                server.run(assigned, caught, set(), self._kept)
            status = 0
        except BaseException:
            log.critical("the server of a guest ends", exc_info=True)
        finally:
            os._exit(status)

    def _recover(self) -> None:
        """Make the tables whole, and close what a server had open that nobody knows of. MemoryError.

        Before there is another one, which would open and receive descriptors meanwhile.
        """
        self._to_server.close()
        self._of_server.close()
        tables = self._kept.fs.tables
        tables.recover(self._kept.state)
        unanswered = set() if self._unanswered is None else set(self._unanswered.fds)
        tables.close_others(self._all | self._said.descriptors() | unanswered)

    def _may_go_on(self, status: int) -> bool:
        """After the death of a server. False: nobody would be served any better."""
        now = time.monotonic()
        crashed = status != -signal.SIGKILL
        what = f"{ending(status)}, its last request was {latest_request(self._assigned.latest)}"
        if crashed or self._kept.state.taken == self._taken:
            recent = [at for at in self._failures[crashed] if now - at < FAILURES_S]
            self._failures[crashed] = [*recent, now]
        n = len(self._failures[crashed])
        if n >= (CRASHES_MAX if crashed else KILLS_MAX):
            why = f"{n} servers of a guest have ended within {FAILURES_S:g} s; the last one {what}"
            self._assigned.channel.tell(Kind.FAULT, why)
            return False
        log.error("the server of a guest %s; another one goes on", what)
        self._kept.state.next_server(crashed)
        return True

    # ---- between the two

    def _relay(self) -> int:
        """Until the server has ended: its exit status, or minus the signal's number."""
        poll = select.poll()
        poll.register(self._caught, select.POLLIN)
        sock = self._assigned.sock.fileno()
        poll.register(self._to_server, select.POLLIN)
        listening = False
        replies = True
        while True:
            wanted = self._open and self._unanswered is None
            if wanted and not listening:
                poll.register(sock, select.POLLIN)
            elif listening and not wanted:
                poll.unregister(sock)  # it would be told of a hang-up again and again
            listening = wanted
            ready = {fd for fd, _ in poll.poll()}
            if self._caught.fileno() in ready:
                self._heed_signals()
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                if pid:
                    return os.waitstatus_to_exitcode(status)
            if replies and self._to_server.fileno() in ready:
                replies = self._answer()
                if not replies:
                    poll.unregister(self._to_server)
            if wanted and sock in ready:
                self._listen()

    def _heed_signals(self) -> None:
        before = self._caught.stops
        self._caught.take()
        if self._caught.stops > before:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)

    def _listen(self) -> None:
        """What the front end says, up to what has to be answered."""
        try:
            for _ in range(MESSAGES_PER_TURN):
                message = self._from_front_end.read()
                if message is None:
                    return
                self._pass_on(message)
                if self._is_answered(message):
                    self._unanswered = message
                    return
                self._said.heard(message)
        except (PeerClosed, ProtocolError, OSError) as problem:
            self._end_of_front_end(problem)

    def _end_of_front_end(self, problem: Exception, request: str = "") -> None:
        """It has left, or can't be understood: then its server is to end."""
        if not isinstance(problem, PeerClosed):
            text = f"{request}: {problem}" if request else str(problem)
            self._assigned.channel.tell(Kind.FAULT, f"the front end broke the protocol: {text}")
        self._open = False
        self._to_server.shutdown(socket.SHUT_WR)

    def _pass_on(self, message: Message) -> None:
        if message.request == FrontendRequest.SET_VRING_BASE:
            self._kept.state.set_up_anew(int.from_bytes(message.payload[:4], "little"))
        data = messages.encode(message.request, message.payload, message.flags & ~messages.VERSION_MASK)
        # One that has died meanwhile is told again.
        with suppress(PeerClosed):
            messages.send(self._to_server, data, message.fds)

    def _is_answered(self, message: Message) -> bool:
        shape = messages.FRONTEND_SHAPES.get(message.request)
        if message.request == FrontendRequest.SET_PROTOCOL_FEATURES:
            (bits,) = U64.unpack(message.payload)
            self._reply_acks = ProtocolFeature.REPLY_ACK in ProtocolFeature(bits)
        asked = message.flags & NEED_REPLY and self._reply_acks
        return bool((shape is not None and shape.reply is not None) or asked)

    def _answer(self) -> bool:
        """Pass on what the server has answered. False: it has hung up."""
        try:
            reply = self._from_server.read()
        except (PeerClosed, ProtocolError):
            self._hang_up()
            return False
        message = self._unanswered
        if reply is None or message is None:
            return True
        self._unanswered = None
        if reply.request == FrontendRequest.GET_VRING_BASE:
            self._said.stopped(reply.payload)
        self._said.heard(message)
        try:
            flags = reply.flags & ~messages.VERSION_MASK
            messages.send(self._assigned.sock, messages.encode(reply.request, reply.payload, flags))
        except (PeerClosed, ProtocolError) as problem:
            self._end_of_front_end(problem, messages.frontend_name(reply.request))
        return True

    def _hang_up(self) -> None:
        """The server will answer no more: the front end is to see so at once."""
        self._open = False
        with suppress(OSError):
            self._assigned.sock.shutdown(socket.SHUT_RDWR)
