"""One shared directory, and the guests that have it mounted.

Each connection is a guest of its own: inodes, handles, negotiated features and queues are never
shared between two.
"""

import logging
import os
import socket
import stat
from collections import Counter
from dataclasses import dataclass
from errno import EINVAL
from mmap import PAGESIZE

from vfsd._dax import load_numpy
from vfsd.fuse.abi import CONFIG, DAX_SHMID, Init
from vfsd.fuse.dispatch import Dispatch
from vfsd.fuse.init import Offer, Session
from vfsd.hostfs.fs import HostFs, Policy
from vfsd.hostfs.lock._locks import Locks
from vfsd.queue._pool import Pool
from vfsd.queue._queue import Queue
from vfsd.vhost.backend import Backend
from vfsd.vhost.shmem import SharedMemory

log = logging.getLogger("vfsd.daemon.share")

PAGE_SHIFT = PAGESIZE.bit_length() - 1
OFFLOAD_THREADS_MAX = 64  # per guest; they come only as requests block

INIT_FLAGS = (
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.AUTO_INVAL_DATA
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.HAS_IOCTL_DIR
    | Init.MAX_PAGES
    | Init.INIT_EXT
)


@dataclass(frozen=True)
class ShareSettings:
    """What does not change while the share is served.

    tag: None leaves the config space, and so the tag, to the front end.
    dax_window: bytes, 0 for none.
    fd_budget: descriptors that all guests' inodes and open files together may have.
    poll_us: the longest a request queue polls before it sleeps.
    """

    path: str
    policy: Policy
    tag: bytes | None
    num_request_queues: int
    inband: bool
    fd_budget: int
    poll_us: int
    dax_window: int = 0


def open_root(path: str) -> int:
    """A readable descriptor of a directory or regular file. OSError, EINVAL for what is neither.

    Anything else is not opened at all: that might act on a device.
    """
    anchor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(anchor).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise OSError(EINVAL, "it is neither a directory nor a regular file", path)
        return os.open(f"/proc/self/fd/{anchor}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(anchor)


def tell(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[what]} {what}" for what in ("inodes", "handles", "anchors"))


class Share:
    """A directory, or one regular file, to serve. OSError when it can't be opened."""

    def __init__(self, settings: ShareSettings) -> None:
        self.settings = settings
        if settings.dax_window:
            load_numpy()  # once, before the first front end
        self.root_fd = open_root(settings.path)
        self.locks = Locks()
        self._connections: set[Connection] = set()

    def connect(self, sock: socket.socket) -> "Connection":
        """A guest's front end has connected."""
        connection = Connection(self, sock)
        self._connections.add(connection)
        self._divide_budget()
        return connection

    def disconnect(self, connection: "Connection") -> None:
        """It has left."""
        self._connections.discard(connection)
        self._divide_budget()

    def _divide_budget(self) -> None:
        """The same for each guest, so that none can take what others need."""
        for connection in self._connections:
            connection.set_budget(self.settings.fd_budget // len(self._connections))

    def close(self) -> None:
        self.locks.close()
        os.close(self.root_fd)


class Connection:
    """One front end: the vhost-user device it drives and the file system behind it."""

    def __init__(self, share: Share, sock: socket.socket) -> None:
        settings = share.settings
        self._share = share
        self.queues_max = 1 + settings.num_request_queues
        self.inband = settings.inband
        self.config = (
            None if settings.tag is None else CONFIG.pack(settings.tag, settings.num_request_queues)
        )
        self._queues: dict[int, Queue] = {}
        self._told: Counter[str] = Counter()  # requests of sessions that have ended
        self.shmem: SharedMemory | None = None
        if settings.dax_window:
            self.shmem = SharedMemory(DAX_SHMID, settings.dax_window)
        self._fs = HostFs(share.root_fd, settings.policy, share.locks, self.shmem)
        self._dispatch = Dispatch(self._fs)
        self._pool = Pool("offload", OFFLOAD_THREADS_MAX)
        self._poll_us = settings.poll_us
        self._fs.install(self._dispatch)
        self._session = Session(self._dispatch, self._offer, self._fs.agree, self._end_session)
        self.backend = Backend(sock, self)

    def make_queue(self, index: int) -> Queue:
        hiprio = index == 0
        name = "hiprio" if hiprio else f"requests.{index - 1}"
        # Nobody waits for a forget: hiprio need not poll, and gathers them.
        poll_us = 0 if hiprio else self._poll_us
        self._queues[index] = Queue(index, name, self._dispatch, self._pool, poll_us, hiprio)
        return self._queues[index]

    def set_budget(self, descriptors: int) -> None:
        self._fs.set_budget(descriptors)

    def reset(self) -> None:
        self._session.end()

    def close(self) -> None:
        """Drop the guest's state: stop its queues, close its handles, forget its inodes."""
        self._share.disconnect(self)
        self.backend.close()
        self._pool.close()
        self._session.end()
        self._dispatch.close()
        self._fs.tables.close()
        # Both refer back to this object: it shall go now, not at a garbage collection.
        del self.backend, self._session

    def summary(self) -> str:
        """One line: requests and errors so far, and what went wrong with rings."""
        requests = errors = 0
        troubles: Counter[str] = Counter()
        for queue in self._queues.values():
            counters = queue.counters()
            ring = counters.pop("ring")
            troubles.update({k: n for k, n in ring.items() if n and k not in ("kicks", "calls")})
            requests += sum(op["requests"] for op in counters.values())
            errors += sum(op["errors"] for op in counters.values())
        text = f"{requests} requests, {errors} answered with an error"
        left_out = self._fs.tables.counts()["names_left_out"]
        if left_out:
            text += f", {left_out} times a name too long for a guest was left out of a listing"
        return ", ".join([text, *(f"{what}: {n}" for what, n in troubles.items())])

    def _end_session(self) -> None:
        """A session ends: nothing of what the guest held is valid any more."""
        requests: Counter[str] = Counter()
        for queue in self._queues.values():
            requests.update({op: n["requests"] for op, n in queue.counters().items() if op != "ring"})
        counts = [f"{op} {n}" for op, n in sorted((requests - self._told).items())]
        if counts:
            log.debug("the session had %s", ", ".join(counts))
        self._told = requests
        held = self._fs.tables.counts()
        self._fs.clear()
        if counts:
            log.debug("the session held %s, which leaves %s", tell(held), tell(self._fs.tables.counts()))

    def _offer(self) -> Offer:
        policy = self._fs.policy
        flags = INIT_FLAGS | policy.init_flags()
        sizes = [queue.num for index, queue in self._queues.items() if index > 0 and queue.started]
        if self.shmem is not None and self.shmem.connected:
            flags |= Init.MAP_ALIGNMENT
        queue_size = min(sizes, default=0)
        return Offer(flags, queue_size, policy.identity.required(), PAGE_SHIFT, policy.settle)
