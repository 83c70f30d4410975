"""The daemon's process: its socket, its front ends, signals and readiness.

One control thread with a selector does all of it; the queues have threads of their own.
"""

import errno
import fcntl
import logging
import os
import resource
import selectors
import signal
import socket
import stat
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from vfsd.daemon.share import Connection, Share, ShareSettings
from vfsd.errors import ConfigError, ProtocolError
from vfsd.hostfs.cache import CACHE_POLICIES, CachePolicy
from vfsd.hostfs.fs import Policy
from vfsd.hostfs.identity import IdentityPolicy, check_rights
from vfsd.hostfs.ops.mappings import DAX_POLICIES
from vfsd.hostfs.table._tables import file_handles_work
from vfsd.options.table import ServeOptions
from vfsd.sandbox import userns

log = logging.getLogger("vfsd")

BACKLOG = 8
RETRY_S = 0.1  # between two tries to accept where only time can help
# Of the process's descriptors, those for guests' inodes and open files; queues and memory need the rest.
BUDGET_SHARE = 0.75
BUDGET_SHARE_MAX = 0.9
# 8 bytes each of the kernel's memory.
TABLE_MAX = 1 << 16


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT. ConfigError before anything is made."""
    share = open_share(options)
    try:
        listener = listen(options.socket)
    except BaseException:
        share.close()
        raise
    grow_descriptor_table(share.settings.fd_budget)
    with Daemon(share, listener) as daemon:
        if options.uid_map or options.gid_map:
            userns.enter(options.uid_map, options.gid_map)
        drop_process_wide()
        notify_ready()
        if not os.path.isdir(options.shared_dir):
            log.warning("%s is a file: vfsd mount can mount it, Linux's virtiofs takes every root for a"
                        " directory and gives EIO", options.shared_dir)  # fmt: skip
        log.info("READY: %s is served on %s", options.shared_dir, options.socket)
        daemon.run()
    log.info("ended by a signal")


def open_share(options: ServeOptions) -> Share:
    check_rights()
    settings = ShareSettings(
        path=options.shared_dir,
        policy=policy_of(options),
        tag=options.tag,
        num_request_queues=options.num_request_queues,
        inband=options.inband_notifications,
        fd_budget=fd_budget(options.fd_budget),
        poll_us=options.poll_us,
        dax_window=options.dax_window or 0,
    )
    try:
        share = Share(settings)
    except OSError as problem:
        raise ConfigError(
            "--shared-dir", f"{options.shared_dir} can't be opened ({problem.strerror}); share another"
        ) from problem
    if options.inode_file_handles == "mandatory" and not file_handles_work(share.root_fd):
        share.close()
        raise ConfigError(
            "--inode-file-handles", f"file handles can't be opened in {options.shared_dir}; prefer them,"
            " run as root, or share a directory of a file system that has them",
        )  # fmt: skip
    return share


def fd_budget(wanted: int | None) -> int:
    """Of the process's descriptors, those for guests' inodes and open files. ConfigError."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted is None:
        return int(limit * BUDGET_SHARE)
    if wanted > limit * BUDGET_SHARE_MAX:
        raise ConfigError(
            "--fd-budget", f"{wanted} of {limit} descriptors leave too few for the rest; raise the limit"
            f" (ulimit -n) or use at most {int(limit * BUDGET_SHARE_MAX)}",
        )  # fmt: skip
    return wanted


def cache_policy(options: ServeOptions) -> CachePolicy:
    """The cache mode's, but for what is said in particular."""
    policy = CACHE_POLICIES[options.cache].with_timeouts(options.timeout, options.timeout, None)
    policy = policy.with_timeouts(options.entry_timeout, options.attr_timeout, options.negative_timeout)
    return replace(
        policy,
        readdirplus=policy.readdirplus and options.readdirplus,
        symlinks=policy.symlinks if options.symlink_cache == "auto" else options.symlink_cache == "always",
    )


def policy_of(options: ServeOptions) -> Policy:
    negotiated = {options.posix_acl, options.security_label} != {"never"}
    return Policy(
        cache=cache_policy(options),
        xattr=options.xattr or negotiated or options.xattrmap is not None,
        noflush=not options.always_flush,
        parallel_writes=options.parallel_direct_writes,
        writeback=options.writeback,
        direct_io=options.allow_direct_io,
        mmap=options.allow_mmap,
        readonly=options.readonly,
        zero_open=options.zero_message_open,
        dax=None if options.dax_window is None else options.dax_policy or DAX_POLICIES["always"],
        flock=options.flock,
        posix_lock=options.posix_lock,
        submounts=options.announce_submounts,
        file_handles=options.inode_file_handles != "never",
        identity=IdentityPolicy(
            posix_acl=options.posix_acl,
            security_label=options.security_label,
            killpriv_v2=options.killpriv_v2,
            uids=options.translate_uid,
            gids=options.translate_gid,
            xattr_rules=options.xattrmap or (),
        ),
    )


def raise_descriptor_limit() -> None:
    """As many descriptors as the operator's hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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
    if os.geteuid() == 0 and Path("/proc/self/setgroups").read_text().strip() == "allow":
        os.setgroups([])


def listen(path: str) -> socket.socket:
    """The listening socket; a stale one at that path is replaced, a live or foreign file is not."""
    remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o077)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as problem:
        listener.close()
        raise ConfigError(
            "--socket", f"can't listen on {path} ({problem.strerror}); choose another path"
        ) from problem
    finally:
        os.umask(mask)
    listener.setblocking(False)
    return listener


def remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError("--socket", f"{path} is no socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A daemon whose backlog is full is alive too.
        probe.setblocking(False)
        problem = probe.connect_ex(path)
    if problem != errno.ECONNREFUSED:
        raise ConfigError("--socket", f"a daemon listens on {path}; stop it or choose another path")
    os.unlink(path)


def notify_ready() -> None:
    """Tell systemd, if it asked (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.connect(address)
            notify.sendall(b"READY=1")
        except OSError as problem:
            log.warning("NOTIFY_SOCKET %s: %s", address, problem.strerror)


class Daemon:
    """The control loop. Closing it ends every connection and removes the socket."""

    def __init__(self, share: Share, listener: socket.socket) -> None:
        self._share = share
        self._listener = listener
        self._path: str = listener.getsockname()
        self._inode = os.lstat(self._path).st_ino
        self._selector = selectors.DefaultSelector()
        self._signalled, self._wakeup = socket.socketpair()
        self._connections: set[Connection] = set()
        self._accepting = True

    def __enter__(self) -> Self:
        self._wakeup.setblocking(False)
        self._signalled.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ignore)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._signalled, selectors.EVENT_READ)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in list(self._connections):
            self._end(connection, "the daemon stops")
        signal.set_wakeup_fd(-1)
        self._selector.close()
        # Another daemon may have taken the path after this socket was unlinked by hand.
        try:
            if os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass
        except PermissionError:
            # Root of a user namespace, who is not the user that made it.
            log.warning("%s stays: its directory is not this daemon's", self._path)
        for sock in (self._listener, self._signalled, self._wakeup):
            sock.close()
        self._share.close()

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._signalled:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(key.data)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as problem:
            log.error("a front end can't be accepted: %s", problem.strerror)
            self._stop_accepting()
            return
        try:
            connection = self._share.connect(sock)
        except OSError as problem:
            log.error("a front end can't be served: %s", problem.strerror)
            sock.close()
            self._stop_accepting()
            return
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        log.info("a front end has connected")

    def _stop_accepting(self) -> None:
        """Out of descriptors: the next front ends wait in the backlog until one of these leaves."""
        if self._connections and self._accepting:
            self._selector.unregister(self._listener)
            self._accepting = False
        elif not self._connections:
            time.sleep(RETRY_S)  # nobody will leave: the machine itself is short of them

    def _serve(self, connection: Connection) -> None:
        try:
            if not connection.backend.on_readable():
                self._end(connection, "the front end has left")
        except (ProtocolError, OSError) as problem:
            self._end(connection, f"the front end broke the protocol: {problem}", logging.WARNING)

    def _end(self, connection: Connection, why: str, level: int = logging.INFO) -> None:
        self._selector.unregister(connection.backend)
        self._connections.discard(connection)
        connection.close()
        if not self._accepting:
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._accepting = True
        log.log(level, "%s; %s", why, connection.summary())


def ignore(_number: int, _frame: FrameType | None) -> None:
    """The wakeup descriptor has told the control loop already."""
