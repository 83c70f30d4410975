"""One vring as far as the front end has described it, and the queue that runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from vfsd._ring import RING_NUM_MAX
from vfsd.errors import ProtocolError
from vfsd.memory._regions import GuestMemory
from vfsd.vhost.memory import MemoryTable
from vfsd.vhost.messages import VirtioFeature, VringAddr


class VirtQueue(Protocol):
    """What a ring needs of `vfsd.queue._queue.Queue`; that stub says what each method does."""

    def start(
        self,
        memory: GuestMemory,
        num: int,
        desc: int,
        avail: int,
        used: int,
        base: int,
        event_idx: bool,
    ) -> None: ...
    def use_memory(self, memory: GuestMemory) -> None: ...
    def begin_stop(self) -> None: ...
    def stop(self, timeout_s: float) -> int: ...
    def set_kick(self, fd: int) -> None: ...
    def set_call(self, fd: int, message: bytes | None = None) -> None: ...
    def set_err(self, fd: int) -> None: ...
    def kick(self) -> None: ...
    @property
    def abandoned(self) -> bool: ...
    def close(self, timeout_s: float) -> None: ...


class Vring:
    """Its parts, each set by one message, and whether the queue runs.

    ProtocolError: a value that cannot be, or that changes while the queue runs; the text names the queue."""

    def __init__(self, index: int, queue: VirtQueue) -> None:
        self.index = index
        self.queue = queue
        self.calls_by_fd = False
        self.running = False  # the queue is started
        self.forget()

    def forget(self) -> None:
        """As before the first message, but for the descriptors."""
        self.num = 0
        self.addr: VringAddr | None = None
        self.base = 0  # next available index while the queue does not run
        self.kicked = False  # started, in the words of the specification
        self.enabled = False  # by SET_VRING_ENABLE

    # ---- what is described

    def set_num(self, num: int) -> None:
        """SET_VRING_NUM: elements."""
        if num & (num - 1) or not 0 < num <= RING_NUM_MAX:
            why = "no power of two" if num & (num - 1) else f"not 1 to {RING_NUM_MAX}"
            raise ProtocolError(f"queue {self.index}: size {num} is {why}")
        self._refuse_if_changed("size", self.num, num)
        self.num = num

    def set_addr(self, addr: VringAddr) -> None:
        """SET_VRING_ADDR: user addresses."""
        if self.addr is not None:
            for part in ("desc", "used", "avail"):
                self._refuse_if_changed(f"{part} address", getattr(self.addr, part), getattr(addr, part))
        self.addr = addr

    def set_base(self, base: int) -> None:
        """SET_VRING_BASE: the next available index."""
        if base > 0xFFFF:
            raise ProtocolError(f"queue {self.index}: index {base} of a split ring has 16 bits")
        self._refuse_if_changed("index", self.base, base)
        self.base = base

    def _refuse_if_changed(self, what: str, old: int, new: int) -> None:
        # Sent again with the same value by QEMU, to turn the dirty log on and off.
        if self.running and old != new:
            raise ProtocolError(f"queue {self.index}: {what} changes from {old:#x} to {new:#x} while it runs")

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """Around giving the queue a descriptor: a regular file, for one, cannot be waited on."""
        try:
            yield
        except OSError as error:
            raise ProtocolError(f"queue {self.index}: unusable descriptor: {error}") from error

    # ---- whether it runs

    def start_if_ready(self, memory: MemoryTable, features: VirtioFeature) -> None:
        """Start the queue if it does not run and all parts are there; features: as acknowledged."""
        enabled = self.enabled or VirtioFeature.PROTOCOL_FEATURES not in features
        ready = self.kicked and enabled and self.num and len(memory)
        if self.running or not ready or self.addr is None:
            return
        addr, event_idx = self.addr, VirtioFeature.EVENT_IDX in features
        try:
            self.queue.start(memory.guest, self.num, addr.desc, addr.avail, addr.used, self.base, event_idx)
        except ValueError as error:
            raise ProtocolError(f"queue {self.index}: {error}") from error
        self.running = True

    def use_memory(self, memory: MemoryTable) -> None:
        """The memory has changed: the queue, if it runs, goes on with it at once."""
        if self.running:
            try:
                self.queue.use_memory(memory.guest)
            except ValueError as error:
                raise ProtocolError(f"queue {self.index}: {error}") from error

    def stop(self, timeout_s: float) -> None:
        """Stop the queue, if it runs, and keep where it was."""
        if self.running:
            self.base = self.queue.stop(timeout_s)
            self.running = False
