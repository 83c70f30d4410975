"""A virtio-fs device behind a vhost-user socket: found, set up, reset and removed (virtio_fs_probe)."""

import contextlib
import fcntl
import itertools
import logging
import mmap
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable
from errno import EINVAL, EIO, ENAMETOOLONG, ENODEV, EOPNOTSUPP, ETIMEDOUT
from functools import partial
from typing import Self

from vfsd.errors import ProtocolError
from vfsd.fuse import abi
from vfsd.guest.driver._transport import RingPlace, Transport
from vfsd.guest.driver._window import WindowMemory
from vfsd.memory._regions import GuestMemory
from vfsd.vhost import messages
from vfsd.vhost.frontend import Frontend, RequestRefused, Setup, SharedRegion, TooFewQueues, Vring
from vfsd.vhost.messages import (
    BackendRequest,
    FrontendRequest,
    Message,
    PeerClosed,
    ProtocolFeature,
    Region,
    ShmemMap,
    VirtioFeature,
)
from vfsd.vhost.orders import ORDERS
from vfsd.virtqueue._driver_ring import RING_NUM_MAX

log = logging.getLogger("vfsd.guest")

HEADER_ELEMENTS = 4  # FUSE_HEADER_OVERHEAD: what a request has besides its pages
MAX_PAGES_LIMIT = 256  # sysctl fs.fuse.max_pages_limit, unless it was raised
RING_NUM_MIN = 8
MEMORY_GPA = 1 << 32  # the arena lies above the hole below 4 GiB, as in most guests
INDIRECT_MAX = 1024  # descriptors of one indirect table
KICK = (1).to_bytes(8, "little")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL  # memory that went away would be a SIGBUS here
CLOSED = "the daemon closed the connection"
BROKEN = (ProtocolError, PeerClosed, RequestRefused, TimeoutError)

_numbers = itertools.count()


class Layout:
    """Where rings, indirect tables and requests lie in the guest's memory, in bytes from its start."""

    def __init__(self, queues: int, num: int, slots: int, max_pages: int, indirect: bool) -> None:
        self._end = 0
        self.rings = []
        for _ in range(queues):
            desc = self._take(16 * num)
            avail = self._take(6 + 2 * num)
            used = self._take(6 + 8 * num)
            tables = self._take(16 * num * min(num, INDIRECT_MAX)) if indirect else None
            self.rings.append((desc, avail, used, tables))
        self.arena = self._take(Transport.arena_bytes(slots, max_pages, num))
        self.size = self._end

    def _take(self, size: int) -> int:
        start = self._end
        self._end = (start + size + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
        return start


class Device:
    """One device. `transport` has its queues, until `remove()`.

    gone: why there is no device any more, None while there is one. on_gone is called once when the
    other side goes, in a thread of the device's own.
    """

    def __init__(
        self, frontend: Frontend, sock: socket.socket, order: str, queues: int, queue_size: int,
        indirect: bool, event_idx: bool, scramble: int, slots: int, poll: bool, max_pages_limit: int,
    ) -> None:  # fmt: skip
        self.frontend = frontend
        self.order = order
        self.name = f"virtio{next(_numbers)}"
        self.tag = ""
        self.num_request_queues = queues
        self.queue_size = queue_size
        self.gone: str | None = None
        self.window: WindowMemory | None = None  # for DAX, of a daemon and an order that have it
        self.on_gone: Callable[[], None] | None = None
        self._sock = sock
        self._event_idx = event_idx
        self._scramble = scramble
        self._slots = slots
        self._poll = poll
        self._lock = threading.RLock()
        self._removed = False
        self.max_pages = min(max_pages_limit, queue_size - HEADER_ELEMENTS)  # of a request
        self._layout = Layout(1 + queues, queue_size, slots, self.max_pages, indirect)
        self._memory = GuestMemory()
        self._memory_fd = self._wake = -1
        self._kicks: list[int] = []
        self._calls: list[int] = []
        self._fds: list[int] = []  # all of them
        self._trouble: str | None = None  # what the watcher is woken for
        self._path: str | os.PathLike[str]
        self._inband = False
        self._watcher: threading.Thread | None = None
        self.transport: Transport

    @classmethod
    def connect(
        cls, path: str | os.PathLike[str], *, order: str = "qemu", queues: int = 1,
        queue_size: int = 1024, inband: bool = False, event_idx: bool = True, indirect: bool = True,
        scramble: int = 0, slots: int = 256, poll: bool = False, max_pages_limit: int = MAX_PAGES_LIMIT,
        timeout_s: float = 10.0,
    ) -> Self:  # fmt: skip
        """Find the device, as a front end of that order does, and bring it up.

        queues: request queues. queue_size: a power of two from 8 up. scramble: not 0 for odd
        element borders. slots: requests at a time. poll: look for completions all the time, at the
        cost of a CPU for each request queue. max_pages_limit: of a request, if its queue holds as many.
        OSError when there is no daemon, it lacks what
        is asked for, or it answers what can't be.
        """
        if not RING_NUM_MIN <= queue_size <= RING_NUM_MAX or queue_size & (queue_size - 1):
            why = f"queue size {queue_size} is no power of two from {RING_NUM_MIN} to {RING_NUM_MAX}"
            raise OSError(EINVAL, why)
        if queues < 1 or slots < 1:
            raise OSError(EINVAL, f"{queues} queues and {slots} slots: there must be one of each")
        if order not in ORDERS:
            raise OSError(EINVAL, f"order {order!r} is not known; there are {', '.join(ORDERS)}")
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(open_socket(path, timeout_s))
            frontend = Frontend(sock, timeout_s)
            device = cls(frontend, sock, order, queues, queue_size, indirect, event_idx, scramble, slots,
                         poll, max_pages_limit)
            device._path = path
            device._inband = inband
            undo.callback(device.remove)
            try:
                device._probe()
            except BROKEN as problem:
                raise broken_off(problem, path) from problem
            undo.pop_all()
            return device

    def _probe(self) -> None:
        self._open()
        os.ftruncate(self._memory_fd, self._layout.size)
        fcntl.fcntl(self._memory_fd, fcntl.F_ADD_SEALS, SEALS)
        self._memory.add(self._memory_fd, MEMORY_GPA, self._layout.size, MEMORY_GPA, 0)
        features = VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES
        if self._event_idx:
            features |= VirtioFeature.EVENT_IDX
        if self._layout.rings[0][3] is not None:
            features |= VirtioFeature.INDIRECT_DESC
        without = messages.NO_FEATURE if self._inband else ProtocolFeature.INBAND_NOTIFICATIONS
        region = Region(MEMORY_GPA, self._layout.size, MEMORY_GPA, 0)
        self._setup = Setup([SharedRegion(region, self._memory_fd)], [], features, without)
        self._attach()

    def _attach(self) -> None:
        """What every new connection begins with."""
        self.frontend.on_request = partial(answer, weakref.ref(self))
        with contextlib.suppress(TooFewQueues):
            self.frontend.handshake(self.order, self._with_vrings())
        self._make_window()
        self._check_queues(self.frontend.queues_max - 1)
        if self._inband and ProtocolFeature.INBAND_NOTIFICATIONS not in self.frontend.protocol_features:
            why = f"no in-band notifications with this daemon in the order of {self.order}"
            raise OSError(EOPNOTSUPP, why)
        self._bring_up()
        self._read_tag()
        self._start_watcher()

    def _make_window(self) -> None:
        """virtio_fs_setup_dax: as large as the daemon says."""
        size = self.frontend.shmem.get(abi.DAX_SHMID, 0)
        if self.window is not None:
            self.window.clear()
            if self.window.size == size:
                return
            self.window.close()
        if size % mmap.PAGESIZE:
            raise ProtocolError(f"a DAX window of {size} bytes, which are no pages")
        self.window = WindowMemory(size) if size else None

    def _open(self) -> None:
        self._memory_fd = os.memfd_create("vfsd-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fds.append(self._memory_fd)
        for _ in range(3 + 2 * self.num_request_queues):
            self._fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._wake, *notifiers = self._fds[1:]
        self._kicks, self._calls = notifiers[::2], notifiers[1::2]

    def _check_queues(self, there: int) -> None:
        if there < self.num_request_queues:
            why = f"the daemon has {there} request queues, not {self.num_request_queues}"
            raise OSError(EINVAL, why)

    def _with_vrings(self) -> Setup:
        inband = ProtocolFeature.INBAND_NOTIFICATIONS in self.frontend.protocol_features
        vrings = [
            Vring(index, self.queue_size, MEMORY_GPA + desc, MEMORY_GPA + avail, MEMORY_GPA + used,
                  None if inband else self._kicks[index], None if inband else self._calls[index])
            for index, (desc, avail, used, _) in enumerate(self._layout.rings)
        ]  # fmt: skip
        return Setup(self._setup.memory, vrings, self._setup.features, self._setup.without)

    def _bring_up(self) -> None:
        """Rings anew, empty, and the device started on them."""
        offered = self.frontend.offered
        event_idx = self._event_idx and VirtioFeature.EVENT_IDX in offered
        indirect = VirtioFeature.INDIRECT_DESC in offered
        inband = ProtocolFeature.INBAND_NOTIFICATIONS in self.frontend.protocol_features
        places = [
            RingPlace(
                self.queue_size, MEMORY_GPA + desc, MEMORY_GPA + avail, MEMORY_GPA + used,
                None if tables is None or not indirect else MEMORY_GPA + tables,
                self._sock.fileno() if inband else self._kicks[index],
                messages.encode(FrontendRequest.VRING_KICK, messages.VRING_STATE.pack(index, 0))
                if inband else KICK,
                self._calls[index],
            )
            for index, (desc, avail, used, tables) in enumerate(self._layout.rings)
        ]  # fmt: skip
        self.transport = Transport(
            self._memory, places, MEMORY_GPA + self._layout.arena, self._slots, self.max_pages,
            event_idx, self._scramble, self._poll,
        )  # fmt: skip
        self.transport.on_broken = partial(broken, weakref.ref(self))
        self.frontend.start(self.order, self._with_vrings())
        self.transport.start()

    def _read_tag(self) -> None:
        """virtio_fs_read_tag. A front end that has a tag of its own never asks."""
        if ProtocolFeature.CONFIG not in self.frontend.protocol_features:
            return
        text, queues = abi.CONFIG.unpack(self.frontend.config or self.frontend.get_config(0, abi.CONFIG.size))
        tag = text.split(b"\0")[0]
        if not tag or b"\n" in tag:
            raise OSError(EINVAL, f"the device's tag {tag!r} is empty or has a newline")
        self.tag = os.fsdecode(tag)
        if queues == 0:
            raise OSError(EINVAL, "the device has no request queue")
        self._check_queues(queues)

    def reset(self) -> None:
        """What a reboot of the guest does: everything in flight is lost, the rings start empty."""
        with self._lock:
            if self._removed or self.gone:
                raise OSError(ENODEV, self.gone or "the device was removed")
            self._stop_watcher()  # some orders open a new back-end channel
            self.transport.close()
            self._trouble = None  # of the rings that are no more
            try:
                self.frontend.stop(self.order, self._with_vrings())
                if self.window is not None:
                    self.window.clear()
                self._bring_up()
                self._start_watcher()
            except BaseException as problem:
                self.gone = "a reset failed"
                if isinstance(problem, BROKEN):
                    self.gone = f"the daemon broke off a reset: {reason(problem)}"
                self.transport.close()
                self.frontend.close()
                if isinstance(problem, BROKEN):
                    raise OSError(EIO, self.gone) from problem
                raise

    def reconnect(self) -> None:
        """Once the daemon has gone, connect to its socket again; the rings start empty.

        What was in flight has failed, and the FUSE session is a new one: INIT comes first. OSError
        as for connect(); the device then stays gone.
        """
        with self._lock:
            if self._removed or self.gone is None:
                raise OSError(ENODEV, "the device was removed" if self._removed else "it is there already")
            sock = open_socket(self._path, self.frontend.timeout_s)
            why = self.gone
            try:
                self._stop_watcher()
                self.transport.close()
                self.frontend.close()
                self._sock = sock
                self.frontend = Frontend(sock, self.frontend.timeout_s)
                self._trouble = None
                self.gone = None
                self._attach()
            except BaseException as problem:
                self.gone = why
                self.transport.close()
                self.frontend.close()
                sock.close()
                if isinstance(problem, BROKEN):
                    raise broken_off(problem, self._path) from problem
                raise

    def remove(self) -> None:
        """virtio_fs_remove: no new requests, wait for those in flight, stop the device. Idempotent."""
        with contextlib.ExitStack() as last:  # whatever fails before
            last.callback(messages.close_all, self._fds)
            last.callback(self._close_connection)
            last.callback(self._stop_watcher)
            with self._lock:
                if self._removed:
                    last.pop_all()
                    return
                self._removed = True
                if hasattr(self, "transport"):
                    last.callback(self.transport.close)
                    if self.gone is None:
                        self.transport.disconnect()
                        self.transport.drain()
                        with contextlib.suppress(OSError, *BROKEN):
                            self.frontend.stop(self.order, self._with_vrings())

    def _close_connection(self) -> None:
        self.frontend.close()
        if self.window is not None:
            self.window.close()

    def _start_watcher(self) -> None:
        watcher = threading.Thread(
            target=watch, args=(weakref.ref(self), self._sock, self._wake, self.frontend.channel),
            name=f"{self.name}-watch", daemon=True,
        )  # fmt: skip
        watcher.start()
        self._watcher = watcher

    def _stop_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        os.eventfd_write(self._wake, 1)
        if watcher is not threading.current_thread():
            watcher.join()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _lost(self, why: str) -> None:
        """The other side has gone: nobody may wait for it any longer, remove() included."""
        if self.gone:
            return
        self.gone = why
        removed = self._removed
        if not removed:
            log.error("%s: %s", self.name, why)
        self.transport.abort(EIO)
        if self.on_gone is not None and not removed:
            self.on_gone()

    def _call(self, index: int) -> None:
        if index < len(self._calls):
            os.eventfd_write(self._calls[index], 1)


def broken(device: "weakref.ref[Device]", why: str) -> None:
    """A queue has been given up: the watcher ends the device, as for any other reason."""
    this = device()
    if this is not None:
        this._trouble = why
        os.eventfd_write(this._wake, 1)


def open_socket(path: str | os.PathLike[str], timeout_s: float) -> socket.socket:
    """Connected. OSError with the path."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(os.fspath(path))
    except OSError as problem:
        sock.close()
        missing = ETIMEDOUT if isinstance(problem, TimeoutError) else ENAMETOOLONG
        why = problem.strerror or str(problem)
        raise OSError(problem.errno or missing, why, os.fspath(path)) from problem
    return sock


def broken_off(problem: Exception, path: str | os.PathLike[str]) -> OSError:
    return OSError(EIO, f"the daemon broke off the handshake: {reason(problem)}", os.fspath(path))


def reason(problem: Exception) -> str:
    return "it closed the connection" if isinstance(problem, PeerClosed) else str(problem)


def watch(
    device: "weakref.ref[Device]", sock: socket.socket, wake: int, channel: socket.socket | None
) -> None:
    """Notice that the daemon goes, and serve its requests on the back-end channel."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(sock, select.POLLRDHUP)
    if channel is not None:
        poll.register(channel, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        this = device()
        if this is None:
            return
        if wake in ready:
            if this._trouble is not None:
                this._lost(this._trouble)
            return
        if sock.fileno() in ready:
            this._lost(CLOSED)
            return
        try:
            this.frontend.serve_channel()
        except PeerClosed:
            this._lost(CLOSED)
            return
        except (ProtocolError, OSError) as problem:
            this._lost(f"the back-end channel broke: {problem}")
            return
        del this


def answer(device: "weakref.ref[Device]", message: Message) -> int:
    """What the daemon asks on the back-end channel; 0, or an errno for it."""
    this = device()
    if this is None:
        return ENODEV
    if message.request == BackendRequest.VRING_CALL:
        index, _ = messages.VRING_STATE.unpack(message.payload)
        this._call(index)
        return 0
    if message.request in (BackendRequest.SHMEM_MAP, BackendRequest.SHMEM_UNMAP):
        return map_shared(this.window, message)
    return EOPNOTSUPP


def map_shared(window: WindowMemory | None, message: Message) -> int:
    asked = ShmemMap._make(messages.SHMEM_MAP.unpack(message.payload))
    if window is None or asked.shmid != abi.DAX_SHMID:
        return EINVAL
    try:
        if message.request == BackendRequest.SHMEM_UNMAP:
            window.unmap(asked.shm_offset, asked.size)
        elif not message.fds:
            return EINVAL
        else:
            writable = bool(asked.flags & messages.SHMEM_MAP_RW)
            window.map(message.fds[0], asked.fd_offset, asked.shm_offset, asked.size, writable)
    except OSError as problem:
        log.warning("%s of %d bytes at %#x: %s", messages.backend_name(message.request), asked.size,
                    asked.shm_offset, problem.strerror)  # fmt: skip
        return problem.errno or EIO
    return 0
