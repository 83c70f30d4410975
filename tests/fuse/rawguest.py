"""A guest made of raw rings: a vhost-user front end, guest memory in a memfd, virtqueues in it.

Requests are laid out in elements as Linux does (fs/fuse/virtio_fs.c) or otherwise; each reply is
checked as Linux 7.3 does. A queue may also be written to directly, descriptor by descriptor.
Every wait is for the call descriptor, so a call that is lost fails a test.
"""

import itertools
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vfsd.fuse.opcodes import NUMBER
from vfsd.memory._regions import GuestMemory
from vfsd.vhost.frontend import Frontend, Setup, SharedRegion, Vring
from vfsd.vhost.messages import Region, VirtioFeature
from vfsd.virtqueue._driver_ring import DriverRing

from . import wire
from .ops import Operations
from .wire import Reply

NEXT, WRITE, INDIRECT = 1, 2, 4  # descriptor flags
MEMORY_GPA = 0x1_0000_0000
UVA_OFFSET = 0x7E00_0000_0000  # uva = gpa + this
ARENA = 5 << 20  # bytes of each queue for requests: the largest, 4 MiB, and gaps between its pages
GAP = 16  # bytes between two elements; the daemon must not touch them
CANARY = b"\xa5"
TIMEOUT_S = 15.0
U64 = struct.Struct("=Q")

Sizes = list[int]
Framing = Callable[[Sizes], Sizes]  # Linux's element sizes to one's own, of the same sum


def linux(sizes: Sizes) -> Sizes:
    """As the driver does: headers and arguments apart, data by the page."""
    return sizes


def single(sizes: Sizes) -> Sizes:
    """One element for all there is."""
    return [sum(sizes)] if sum(sizes) else []


def scrambled(seed: int, most: int = 48) -> Framing:
    """Cut anywhere, also inside headers; some elements have no bytes."""
    choose = random.Random(seed)

    def cut(sizes: Sizes) -> Sizes:
        total = sum(sizes)
        near = [choose.randrange(min(total, 64) + 1) for _ in range(choose.randrange(most // 2))]
        far = [choose.randrange(total + 1) for _ in range(choose.randrange(most // 2))]
        borders = sorted([0, *near, *far, total])
        return [b - a for a, b in itertools.pairwise(borders)]

    return cut


def by_page(size: int) -> Sizes:
    return [min(wire.PAGE, size - at) for at in range(0, size, wire.PAGE)]


@dataclass
class Pending:
    """A chain the device has."""

    opcode: int
    unique: int
    sent: int
    writable: list[tuple[int, int]]  # gpa, bytes
    gaps: list[int]  # gpa


class GuestQueue:
    """One virtqueue, for one thread. index 0: hiprio. base: the part of guest memory it has."""

    def __init__(self, guest: "Guest", index: int, num: int, base: int) -> None:
        self.guest = guest
        self.memory = guest.memory
        self.index = index
        self.num = num
        self.desc = base
        self.avail = self.desc + 16 * num
        self.used = (self.avail + 6 + 2 * num + 3) & ~3
        self.indirect = (self.used + 6 + 8 * num + 0xFFF) & ~0xFFF
        self.arena = (self.indirect + 16 * num * min(num, 1024) + 0xFFF) & ~0xFFF
        self.end = self.arena + ARENA
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pending: dict[int, Pending] = {}
        self._done: dict[int, Reply] = {}
        self._top = self.arena

    def make_ring(self) -> None:
        """A new ring in the same place, empty on both sides."""
        desc, avail, used = (gpa + UVA_OFFSET for gpa in (self.desc, self.avail, self.used))
        indirect = self.indirect if self.guest.indirect else None
        self.ring = DriverRing(self.memory, self.num, desc, avail, used, self.guest.event_idx, indirect)
        self._pending.clear()
        self._done.clear()
        self._top = self.arena

    def vring(self, base: int = 0) -> Vring:
        desc, avail, used = (gpa + UVA_OFFSET for gpa in (self.desc, self.avail, self.used))
        fds = {"kick": self.kick_fd, "call": self.call_fd, "err": self.err_fd}
        return Vring(self.index, self.num, desc, avail, used, base=base, **fds)

    def restart(self) -> int:
        """GET_VRING_BASE, and start anew with an empty ring. The index it was stopped at."""
        base = self.guest.frontend.get_vring_base(self.index)
        self.make_ring()
        for fd in (self.call_fd, self.err_fd):
            readable(fd, 0)
        self.start()
        return base

    def start(self, base: int = 0) -> None:
        """The messages that start one queue."""
        frontend, vring = self.guest.frontend, self.vring(base)
        frontend.set_vring_num(self.index, self.num)
        frontend.set_vring_base(self.index, base)
        frontend.set_vring_addr(vring)
        frontend.set_vring_kick(self.index, self.kick_fd, ack=True)
        frontend.set_vring_enable(self.index, True, ack=True)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    # ---- requests

    def submit(
        self,
        op: str | int,
        nodeid: int = 0,
        args: bytes = b"",
        *,
        data: bytes = b"",
        out: int | None = None,
        pages: int = 0,
        uid: int = 0,
        gid: int = 0,
        length: int | None = None,
        ext: bytes = b"",
        extlen: int | None = None,
        pid: int | None = None,
        publish: bool = True,
        kick: bool = True,
    ) -> int:
        """Send one request; what wait() takes.

        data: after args, in pages. out: room of the reply's arguments, by default what Linux
        gives. pages: room of its data. length: of the in header, if it is to lie. ext: extensions,
        the last argument; extlen: of the in header, if it is to lie.
        """
        opcode = NUMBER[op] if isinstance(op, str) else op
        unique = next(self.guest.uniques)
        args += ext
        body = args + data
        extlen = len(ext) // 8 if extlen is None else extlen
        header = wire.in_header(opcode, unique, nodeid, len(body), uid, gid, length, extlen, pid)
        has_reply = opcode not in wire.NO_REPLY
        if out is None:
            out = wire.FIXED.get(opcode, 0)
        readable_sizes = [wire.IN_SIZE, *([len(args)] if args else []), *by_page(len(data))]
        writable_sizes = [wire.OUT_SIZE, *([out] if out else []), *by_page(pages)] if has_reply else []
        return self.submit_bytes(header + body, readable_sizes, writable_sizes, publish=publish, kick=kick)

    def submit_bytes(
        self,
        request: bytes,
        readable_sizes: Sizes,
        writable_sizes: Sizes,
        *,
        publish: bool = True,
        kick: bool = True,
    ) -> int:
        """Any bytes for a request, any room for a reply. publish: or the caller moves avail_idx."""
        framing = self.guest.framing
        gaps: list[int] = []
        sources = self._place(framing(readable_sizes), gaps)
        targets = self._place(framing(writable_sizes), gaps)
        at = 0
        for gpa, size in sources:
            self.memory.write(gpa, request[at : at + size])
            at += size
        assert at == len(request)
        for gpa, size in targets:
            self.memory.write(gpa, CANARY * size)
        for gpa in gaps:
            self.memory.write(gpa, CANARY * GAP)
        opcode, unique = 0, 0
        if len(request) >= wire.IN_SIZE:
            opcode, unique = struct.unpack_from("=4xIQ", request)
        token = next(self.guest.tokens)
        self._pending[token] = Pending(opcode, unique, len(request), targets, gaps)
        self.ring.add(sources, targets, token)
        if publish:
            self.ring.publish()
        if publish and kick:
            self.kick()
        return token

    def kick(self) -> None:
        """If the device wants to know."""
        if self.ring.wants_kick():
            self.kick_always()

    def _place(self, sizes: Sizes, gaps: list[int]) -> list[tuple[int, int]]:
        placed = []
        for size in sizes:
            gaps.append(self._top)
            placed.append((self._top + GAP, size))
            self._top += GAP + size
        gaps.append(self._top)
        assert self._top + GAP <= self.end, "the arena is too small for what is under way"
        return placed

    def wait(self, token: int, timeout_s: float = TIMEOUT_S) -> Reply:
        """The reply, checked. TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while token not in self._done:
            used = self.ring.pop_used()
            if used is not None:
                self._finish(*used)
            elif not self.ring.enable_call():
                self._sleep(deadline)
        return self._done.pop(token)

    def answered(self, token: int) -> bool:
        """Whether the reply had come when one that was waited for since had."""
        return token in self._done

    def _finish(self, token: int, written: int) -> None:
        pending = self._pending.pop(token)
        data = b"".join(self.memory.read(gpa, size) for gpa, size in pending.writable)
        for gpa in pending.gaps:
            assert self.memory.read(gpa, GAP) == CANARY * GAP, "written outside of the elements"
        if not self._pending:
            self._top = self.arena
        self._done[token] = wire.check_reply(
            pending.opcode, pending.unique, pending.sent, len(data), written, data
        )

    def ask(self, op: str | int, nodeid: int = 0, args: bytes = b"", **more: object) -> Reply:
        """submit() and wait()."""
        return self.wait(self.submit(op, nodeid, args, **more))  # type: ignore[arg-type]

    def _sleep(self, deadline: float) -> None:
        """Until a call. TimeoutError, ConnectionError when the daemon has left."""
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        poll.register(self.guest.sock, 0)
        left = deadline - time.monotonic()
        events = dict(poll.poll(max(0, left) * 1000))
        if self.guest.sock.fileno() in events and self.call_fd not in events:
            raise ConnectionError("the daemon has closed the connection")
        if not events:
            raise TimeoutError(f"queue {self.index}: {len(self._pending)} chains without an answer")
        os.eventfd_read(self.call_fd)

    # ---- the ring by hand

    def kick_always(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def table(self, gpa: int, descs: Iterable[tuple[int, int, int, int]]) -> None:
        """Write descriptors (addr, len, flags, next)."""
        self.memory.write(gpa, b"".join(struct.pack("<QIHH", *desc) for desc in descs))

    def get_u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def set_u16(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))

    @property
    def avail_idx(self) -> int:
        return self.get_u16(self.avail + 2)

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self.set_u16(self.avail + 2, value)

    @property
    def used_idx(self) -> int:
        return self.get_u16(self.used + 2)

    def call_after(self, idx: int) -> None:
        """Ask to be called when used.idx passes this (used_event)."""
        self.set_u16(self.avail + 4 + 2 * self.num, idx)

    def used_elem(self, i: int) -> tuple[int, int]:
        """(id, len)"""
        head, written = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (i % self.num), 8))
        return head, written

    def offer(self, *heads: int) -> None:
        """Put heads in the avail ring, and kick."""
        idx = self.avail_idx
        for i, head in enumerate(heads):
            self.set_u16(self.avail + 4 + 2 * ((idx + i) % self.num), head)
        self.avail_idx = idx + len(heads)
        self.kick_always()

    def wait_used(self, idx: int, timeout_s: float = TIMEOUT_S) -> None:
        """Until used.idx is this, by calls."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = self.used_idx
            if now == idx & 0xFFFF:
                return
            self.call_after(now)
            if self.used_idx == now:
                self._sleep(deadline)

    def broken(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Whether the error descriptor is signalled, now or within that time."""
        return readable(self.err_fd, timeout_s)


def readable(fd: int, timeout_s: float) -> bool:
    """Whether an eventfd is or becomes readable; it is read."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return False
    os.eventfd_read(fd)
    return True


class Guest(Operations):
    """Connects to a daemon and starts hiprio and `request_queues` queues of `num` elements.

    Operations of its own go to the first request queue; `on(n)` has them on another.
    """

    def __init__(
        self,
        path: Path,
        *,
        order: str = "qemu",
        num: int = 128,
        request_queues: int = 1,
        event_idx: bool = True,
        indirect: bool = True,
        framing: Framing = linux,
    ) -> None:
        self.path = path
        self.event_idx = event_idx
        self.indirect = indirect
        self.framing = framing
        self.uniques = itertools.count(2, 2)
        self.tokens = itertools.count(1)
        self.memory = GuestMemory()
        self.queues: list[GuestQueue] = []
        self.regions: list[SharedRegion] = []
        end = MEMORY_GPA
        for index in range(1 + request_queues):
            self.queues.append(GuestQueue(self, index, num, end))
            end = self.queues[-1].end
        self.regions.append(self.make_region(MEMORY_GPA, end - MEMORY_GPA))
        for queue in self.queues:
            queue.make_ring()
        super().__init__(self.queues[1])
        features = VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES
        if event_idx:
            features |= VirtioFeature.EVENT_IDX
        if indirect:
            features |= VirtioFeature.INDIRECT_DESC
        self.setup = Setup(self.regions, [queue.vring() for queue in self.queues], features)
        self.order = order
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.frontend = Frontend(self.sock, TIMEOUT_S)
        self.frontend.handshake(order, self.setup)
        self.frontend.start(order, self.setup)
        assert self.frontend.features == features, "a feature was not offered"

    def make_region(self, gpa: int, size: int) -> SharedRegion:
        """A sparse piece of guest memory, mapped here."""
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        self.memory.add(fd, gpa, size, gpa + UVA_OFFSET, 0)
        return SharedRegion(Region(gpa, size, gpa + UVA_OFFSET, 0), fd)

    def add_region(self, gpa: int, size: int) -> None:
        """Plug memory in while the queues run."""
        self.regions.append(self.make_region(gpa, size))
        self.frontend.add_mem_reg(self.regions[-1], ack=True)

    def on(self, index: int) -> Operations:
        """The operations on that queue; 0 is hiprio."""
        return Operations(self.queues[index])

    def restart(self, queues: Sequence[GuestQueue]) -> None:
        for queue in queues:
            queue.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave without a word, as a guest that is killed. Idempotent."""
        self.frontend.close()
        for queue in self.queues:
            queue.close()
        for region in self.regions:
            os.close(region.fd)
        self.queues.clear()
        self.regions.clear()
