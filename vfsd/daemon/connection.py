"""One guest: its front end's messages, its queues, the file system it sees."""

import logging
import socket
from collections import Counter
from collections.abc import Callable
from mmap import PAGESIZE, mmap
from threading import Thread
from typing import NamedTuple

from vfsd.daemon.share import Share
from vfsd.fuse.abi import CONFIG, DAX_SHMID, Init
from vfsd.fuse.dispatch import Dispatch
from vfsd.fuse.init import Offer, Session
from vfsd.hostfs.fs import HostFs
from vfsd.queue._pool import Pool
from vfsd.queue._queue import Queue
from vfsd.queue._watcher import Watcher
from vfsd.state._journal import State
from vfsd.vhost.backend import Backend
from vfsd.vhost.shmem import SharedMemory

log = logging.getLogger("vfsd.daemon")

CLOSE_STEPS = 5  # more than there are in close(), each with its part of --stop-timeout

PAGE_SHIFT = PAGESIZE.bit_length() - 1

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


class Kept(NamedTuple):
    """Of a guest, what the next server finds when one has died."""

    fs: HostFs
    state: State


def keep_of(share: Share, shmem: SharedMemory | None = None) -> Kept:
    """Within the sandbox. OSError, MemoryError."""
    settings, sandbox = share.settings, share.sandbox
    fs = HostFs(
        share.root_fd, settings.policy, share.locks, shmem,
        proc_fd=sandbox.own_descriptors, labels_fd=sandbox.labels,
    )  # fmt: skip
    fs.set_budget(settings.fd_budget)
    return Kept(fs, State(1 + settings.num_request_queues))


class Connection:
    """One front end: the vhost-user device it drives and the file system behind it.

    latest: has the opcode of the request that began last. kept: of this guest, by a keeper. OSError,
    MemoryError, RuntimeError: a descriptor, memory or a thread can't be had.
    """

    def __init__(self, share: Share, sock: socket.socket, latest: mmap, kept: Kept | None = None) -> None:
        settings = share.settings
        self.queues_max = 1 + settings.num_request_queues
        self.inband = settings.inband
        self._close_s = settings.stop_timeout_s / CLOSE_STEPS
        self.config = None if settings.tag is None else CONFIG.pack(settings.tag, settings.num_request_queues)
        self._queues: dict[int, Queue] = {}
        self._told: Counter[str] = Counter()  # requests of sessions that have ended
        self.shmem: SharedMemory | None = None
        if settings.dax_window:
            self.shmem = SharedMemory(DAX_SHMID, settings.dax_window)
        self._fs, self._state = kept or keep_of(share, self.shmem)
        self._fs.start()
        self._dispatch = Dispatch(self._fs, memoryview(latest)[:4])
        self._pool = Pool("offload", settings.offload_threads)
        self._watcher = Watcher()
        self._poll_us = settings.poll_us
        self._fs.install(self._dispatch)
        self._session = Session(self._dispatch, self._offer, self._fs.agree, self._end_session, self._state)
        self.backend = Backend(sock, self)

    def make_queue(self, index: int) -> Queue:
        hiprio = index == 0
        name = "hiprio" if hiprio else f"requests.{index - 1}"
        # Nobody waits for a forget: hiprio need not poll, and gathers them.
        poll_us = 0 if hiprio else self._poll_us
        self._queues[index] = Queue(
            index, name, self._dispatch, self._pool, self._watcher, poll_us, hiprio, self._state
        )
        return self._queues[index]

    def reset(self) -> None:
        self._session.reset()

    def close(self) -> None:
        """Drop the guest's state: stop its queues, close its handles, forget its inodes.

        As far as that can be done in a moment: what a request that hangs still works with goes when the
        process does.
        """
        self.backend.close(self._close_s)
        self._watcher.close()
        self._dispatch.shut()
        if self._pool.close(self._close_s) and not any(queue.abandoned for queue in self._known_queues()):
            within(self._close_s, self._forget)

    def _forget(self) -> None:
        self._session.end()
        self._dispatch.close()
        self._fs.tables.close()

    def report(self) -> str:
        """FUSE version, requests and errors so far, for the control socket."""
        agreed = self._session.agreed
        requests, errors, _ = self._count()
        return f"{'-' if agreed is None else f'7.{agreed.minor}'} {requests} {errors}"

    def _count(self) -> tuple[int, int, Counter[str]]:
        """Requests, those answered with an error, and what went wrong with rings."""
        requests = errors = 0
        troubles: Counter[str] = Counter()
        for queue in self._known_queues():
            counters = queue.counters()
            ring = counters.pop("ring")
            troubles.update({k: n for k, n in ring.items() if n and k not in ("kicks", "calls")})
            requests += sum(op["requests"] for op in counters.values())
            errors += sum(op["errors"] for op in counters.values())
        return requests, errors, troubles

    def summary(self) -> str:
        """One line: requests and errors so far, and what went wrong with rings."""
        requests, errors, troubles = self._count()
        text = f"{requests} requests, {errors} answered with an error"
        left_out = self._fs.tables.counts()["names_left_out"]
        if left_out:
            text += f", {left_out} times a name too long for a guest was left out of a listing"
        return ", ".join([text, *(f"{what}: {n}" for what, n in troubles.items())])

    def _known_queues(self) -> list[Queue]:
        """As they are now: the front end may add one at any time."""
        return list(self._queues.values())

    def _end_session(self) -> None:
        """A session ends: nothing of what the guest held is valid any more."""
        requests: Counter[str] = Counter()
        for queue in self._known_queues():
            requests.update({op: n["requests"] for op, n in queue.counters().items() if op != "ring"})
        counts = [f"{op} {n}" for op, n in sorted((requests - self._told).items())]
        if counts:
            log.debug("the session had %s", ", ".join(counts))
        self._told = requests
        held = self._fs.tables.counts()
        self._fs.clear()
        if counts or held["inodes"]:
            log.debug("the session held %s, which leaves %s", tell(held), tell(self._fs.tables.counts()))

    def _offer(self) -> Offer:
        policy = self._fs.policy
        flags = INIT_FLAGS | policy.init_flags()
        sizes = [queue.num for queue in self._known_queues() if queue.index > 0 and queue.started]
        if self.shmem is not None and self.shmem.connected:
            flags |= Init.MAP_ALIGNMENT
        queue_size = min(sizes, default=0)
        return Offer(flags, queue_size, policy.identity.required(), PAGE_SHIFT, self._fs.settle)


def within(seconds: float, call: Callable[[], None]) -> None:
    """Have it called, by a thread that may be caught in a close(2): wait no longer than that."""
    thread = Thread(target=call, name="close", daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError):
        return
    thread.join(seconds)


def tell(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[what]} {what}" for what in ("inodes", "handles", "anchors"))
