"""A virtio-fs daemon in this process that answers as a test tells it, and keeps what it was sent."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from errno import ENOSYS
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from vfsd._ring import DeviceRing
from vfsd.memory._regions import GuestMemory
from vfsd.vhost.backend import Backend

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extlen, padding
OUT_HEADER = struct.Struct("=IiQ")
DESC = struct.Struct("=QIHH")
DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4


class Frame(NamedTuple):
    """A request as the device found it. readable, writable: the elements' sizes."""

    opcode: int
    unique: int
    nodeid: int
    arguments: bytes
    queue: int
    readable: list[int]
    writable: list[int]


Answer = Callable[[Frame], bytes | int | None]
"""The reply's body, a negative errno, or None: no reply now."""


class Queue:
    """In the place of vfsd.queue._queue.Queue."""

    abandoned = False

    def __init__(self, device: Scripted, index: int) -> None:
        self.device = device
        self.index = index
        self.kick_fd = self.call_fd = -1
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.thread: threading.Thread | None = None
        self.ring: DeviceRing | None = None
        self.views: list[memoryview] = []  # of guest memory, which stays mapped as long as there is one

    def start(
        self, memory: GuestMemory, num: int, desc: int, avail: int, used: int, base: int, event_idx: bool
    ) -> None:
        self.memory, self.desc = memory, desc
        self.ring = DeviceRing(memory, num, desc, avail, used, base, event_idx)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        assert self.ring is not None
        poll = select.poll()
        poll.register(self.wake_fd, select.POLLIN)
        poll.register(self.kick_fd, select.POLLIN)
        while True:
            while (chain := self.ring.pop()) is not None:
                self.serve(*chain)
            if self.ring.enable_kick():
                continue
            ready = dict(poll.poll())
            if self.wake_fd in ready:
                return
            os.eventfd_read(self.kick_fd)

    def elements(self, head: int) -> tuple[list[int], list[int]]:
        """The chain's own elements; those of the ring are merged already."""
        address, length, flags, following = DESC.unpack(self.memory.read(self.desc + 16 * head, 16))
        table = self.desc
        if flags & DESC_INDIRECT:
            table = address
            address, length, flags, following = DESC.unpack(self.memory.read(table, 16))
        found: tuple[list[int], list[int]] = [], []
        while True:
            found[bool(flags & DESC_WRITE)].append(length)
            if not flags & DESC_NEXT:
                return found
            address, length, flags, following = DESC.unpack(self.memory.read(table + 16 * following, 16))

    def serve(self, head: int, readable: list[memoryview], writable: list[memoryview]) -> None:
        whole = b"".join(readable)
        length, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(whole)
        assert length == len(whole)
        frame = Frame(opcode, unique, nodeid, whole[40:], self.index, *self.elements(head))

        self.views += readable + writable

        def reply(raw: bytes) -> None:
            assert self.ring is not None
            left = memoryview(raw)
            for part in writable:
                n = min(len(part), len(left))
                part[:n] = left[:n]
                left = left[n:]
            self.ring.push(head, len(raw) - len(left))
            os.eventfd_write(self.call_fd, 1)

        self.device.take(frame, reply)

    def use_memory(self, memory: GuestMemory) -> None:
        raise AssertionError("memory came while the queue ran")

    def begin_stop(self) -> None: ...

    def stop(self, timeout_s: float = 0) -> int:
        if self.thread is not None:
            os.eventfd_write(self.wake_fd, 1)
            self.thread.join()
            os.eventfd_read(self.wake_fd)
        for view in self.views:
            view.release()
        self.views.clear()
        self.thread = self.ring = None
        return 0

    def set_kick(self, fd: int) -> None:
        self.kick_fd = self.replaced(self.kick_fd, fd)

    def set_call(self, fd: int, message: bytes | None = None) -> None:
        self.call_fd = self.replaced(self.call_fd, fd)

    def set_err(self, fd: int) -> None:
        self.replaced(fd, -1)

    @staticmethod
    def replaced(old: int, new: int) -> int:
        if old >= 0:
            os.close(old)
        return new

    def kick(self) -> None:
        raise AssertionError("in-band notifications were not offered")

    def close(self, timeout_s: float) -> None:
        self.stop()
        self.set_kick(-1)
        self.set_call(-1)
        self.wake_fd = self.replaced(self.wake_fd, -1)


class Scripted:
    """The device, listening at `path`; a context manager.

    answers: by opcode. raw: by opcode, the whole reply in place of the right one. frames: all that
    came. A request without an answer is kept in `held`, with what sends its reply.
    """

    config = None
    inband = False
    shmem = None

    def __init__(self, path: Path, queues: int = 1) -> None:
        self.path = path
        self.queues_max = 1 + queues
        self.answers: dict[int, Answer] = {}
        self.raw: dict[int, Callable[[bytes], bytes]] = {}
        self.frames: list[Frame] = []
        self.held: list[tuple[Frame, Callable[[bytes], None]]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._listener.close()
        os.close(self._wake)

    def make_queue(self, index: int) -> Queue:
        return Queue(self, index)

    def reset(self) -> None: ...

    def take(self, frame: Frame, reply: Callable[[bytes], None]) -> None:
        self.frames.append(frame)
        if not frame.writable:
            reply(b"")
            return
        to_ask = self.answers.get(frame.opcode)
        answer = -ENOSYS if to_ask is None else to_ask(frame)
        if answer is None:
            self.held.append((frame, reply))
            return
        lie = self.raw.get(frame.opcode)
        right = packed(frame, answer)
        reply(right if lie is None else lie(right))

    def of(self, opcode: int) -> list[Frame]:
        """What came with this opcode."""
        return [frame for frame in self.frames if frame.opcode == opcode]

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        backend: Backend | None = None
        while True:
            ready = dict(poll.poll())
            if self._wake in ready:
                break
            if backend is None:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                backend = Backend(sock, self)
                poll.register(backend.fileno(), select.POLLIN)
            elif not backend.on_readable():
                poll.unregister(backend.fileno())
                backend.close()
                backend = None
        if backend is not None:
            backend.close()


def packed(frame: Frame, answer: bytes | int) -> bytes:
    """The whole reply."""
    if isinstance(answer, int):
        return OUT_HEADER.pack(16, answer, frame.unique)
    return OUT_HEADER.pack(16 + len(answer), 0, frame.unique) + answer
