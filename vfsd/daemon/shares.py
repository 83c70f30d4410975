"""The shares of a configuration file: opened together, and changed when it is read again."""

import logging
import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Final, NamedTuple

from vfsd.daemon._prctl import die_with_parent
from vfsd.daemon.process import (
    STOP_SIGNALS,
    Signals,
    drop_process_wide,
    grow_descriptor_table,
    set_descriptor_limit,
)
from vfsd.daemon.share import Share, open_root, open_share
from vfsd.daemon.sockets import Listener, check_all_used, open_control, open_socket
from vfsd.daemon.supervisor import Supervisor
from vfsd.daemon.systemd import notify_ready, notify_reloading, sockets_handed_over
from vfsd.errors import ConfigError
from vfsd.options.checks import socket_place
from vfsd.options.config_file import Config, ShareTable, in_file, read_config
from vfsd.options.o_list import Given

log = logging.getLogger("vfsd")

TRY_S: Final = 5.0  # for a file, and what it names, to be read


class Trying(NamedTuple):
    """A process that reads the file. ended: a descriptor that can be read when it has."""

    pid: int
    ended: int


class Served(NamedTuple):
    """One share that is listened for."""

    table: ShareTable
    listener: Listener
    share: Share


def serve(path: str, config: Config, outweighing: Mapping[str, Given]) -> int:
    """Serve them until a stop signal: the exit status. SIGHUP has the file read again.

    ConfigError before anything is made. outweighing: as of read_config().
    """
    first = next(iter(config.shares.values())).options
    set_descriptor_limit(first.rlimit_nofile)
    shares = Shares(path, config, outweighing)
    try:
        control = open_control(first)
    except BaseException:
        shares.close()
        raise
    with (
        Signals(signal.SIGCHLD, signal.SIGHUP) as caught,
        Supervisor(
            shares.pairs(), caught, on_hangup=lambda: shares.reload(supervisor), control=control
        ) as supervisor,
    ):
        drop_process_wide()
        shares.tell_ready()
        notify_ready()
        supervisor.run()
    log.info("ended by a signal")
    return supervisor.status


class Shares:
    """By name. Who serves them closes them."""

    def __init__(self, path: str, config: Config, outweighing: Mapping[str, Given]) -> None:
        self._path = path
        self._of_process = config.of_process
        self._outweighing = outweighing
        self._handed = sockets_handed_over()
        check_all_used(self._handed, [table.options for table in config.shares.values()])
        self._served = open_shares(path, config, {}, self._handed)
        self._trying: Trying | None = None
        self._again = False  # once that has ended

    def pairs(self) -> list[tuple[Listener, Share]]:
        return [(one.listener, one.share) for one in self._served.values()]

    def close(self) -> None:
        for listener, share in self.pairs():
            listener.close()
            share.close()

    def tell_ready(self) -> None:
        for name in self._served:
            self._tell(name)

    def reload(self, supervisor: Supervisor) -> None:
        """Read the file again. If anything is wrong with it, all stays.

        A process of its own does so first: a file system that does not answer would hold the supervisor.
        """
        self._again = self._trying is not None
        if self._again:
            return
        notify_reloading()
        try:
            self._trying = try_file(self._path, self._outweighing)
        except OSError as problem:
            self._stay(f"{self._path} can't be read now ({problem.strerror})")
            return
        supervisor.wait_for(self._trying.ended, TRY_S, partial(self._on_tried, supervisor))

    def _on_tried(self, supervisor: Supervisor, in_time: bool) -> None:
        assert self._trying is not None
        os.close(self._trying.ended)
        if in_time:
            self._follow(supervisor)
        else:
            os.kill(self._trying.pid, signal.SIGKILL)  # the supervisor reaps it
            self._stay(f"{self._path}: what it names does not answer within {TRY_S:g} s")
        self._trying = None
        if self._again:
            self.reload(supervisor)

    def _stay(self, why: str) -> None:
        log.error("%s; everything stays as it is", why)
        notify_ready()

    def _follow(self, supervisor: Supervisor) -> None:
        # A process forked to try a sandbox would take them for the supervisor.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._change(supervisor)
        except ConfigError as problem:
            self._stay(str(problem))
        except (OSError, MemoryError) as problem:
            self._stay(f"{self._path} can't be followed now ({problem})")
        else:
            notify_ready()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _change(self, supervisor: Supervisor) -> None:
        config = read_config(self._path, self._outweighing)
        before, self._served = self._served, open_shares(self._path, config, self._served, self._handed)
        supervisor.change(self.pairs())
        for name in before.keys() - self._served.keys():
            log.info("the share %s is removed; its guests keep it until they leave", name)
        for name, one in self._served.items():
            if one is not before.get(name):
                self._tell(name)
        if config.of_process != self._of_process:
            log.warning("%s: [daemon] is followed from the next start on", self._path)

    def _tell(self, name: str) -> None:
        options = self._served[name].table.options
        log.info("READY: %s is served on %s (share %s)", options.shared_dir, options.socket, name)


def try_file(path: str, outweighing: Mapping[str, Given]) -> Trying:
    """Read it and open what it names, in a process forked for it. OSError."""
    ended, end = os.pipe()
    supervisor = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            try:
                die_with_parent(supervisor)
                for table in read_config(path, outweighing).shares.values():
                    os.close(open_root(table.options.shared_dir))
            finally:
                os._exit(0)
    except OSError:
        os.close(ended)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        os.close(end)
    return Trying(pid, ended)


def open_shares(
    path: str, config: Config, running: Mapping[str, Served], handed: Mapping[str, int]
) -> dict[str, Served]:
    """All of a file's, or ConfigError and nothing has changed. Those of the same words stay as they run.

    handed: as of open_socket().
    """
    stay = {
        name: running[name] for name, table in config.shares.items()
        if name in running and running[name].table.given == table.given
    }  # fmt: skip
    sockets = {address(one.table): one.listener for one in running.values()}
    by_place = {place: listener for (place, _), listener in sockets.items()}
    served = {}
    with ExitStack() as undo:
        opened = {}
        for name, table in config.shares.items():
            if name not in stay:
                try:
                    opened[name] = open_share(table.options)
                    undo.callback(opened[name].close)
                    opened[name].prepare()
                except ConfigError as problem:
                    raise in_file(path, f"[share.{name}]", problem) from problem
        for name, table in config.shares.items():
            if name in stay:
                served[name] = stay[name]
                continue
            listener = sockets.get(address(table))
            if listener is None:
                try:
                    listener = open_socket(table.options, by_place.get(address(table)[0]), handed)
                except ConfigError as problem:
                    raise in_file(path, f"[share.{name}]", problem) from problem
                undo.callback(listener.close)
            served[name] = Served(table, listener, opened[name])
        for share in opened.values():
            grow_descriptor_table(share.settings.fd_budget)
        undo.pop_all()
    return served


def address(table: ShareTable) -> tuple[str, int | None]:
    """Where it is listened for, and for whom."""
    assert table.options.socket is not None
    return socket_place(table.options.socket), table.options.socket_group
