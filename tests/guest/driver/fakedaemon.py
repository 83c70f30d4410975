"""A vhost-user daemon under the test's control: it shows every chain, and lies on request.

It runs in a thread of this process, on vfsd's own back-end state machine; only what a queue does
is different. A chain goes to `handler`, by default `answer`; `hold` keeps it for the test.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from typing import Self

from vfsd._ring import DeviceRing
from vfsd.errors import ProtocolError
from vfsd.memory._regions import GuestMemory
from vfsd.vhost import messages
from vfsd.vhost.backend import Backend
from vfsd.vhost.messages import FrontendRequest, Message

DEADLINE_S = 20.0
IN_HEADER = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extlen, -
OUT_HEADER = struct.Struct("=IiQ")  # len, error, unique
DESC = struct.Struct("=QIHH")  # addr, len, flags, next
USED_ELEM = struct.Struct("=II")  # id, len
NEXT, WRITE, INDIRECT = 1, 2, 4
CALL = (1).to_bytes(8, "little")
CONFIG = struct.Struct("<36sI")  # struct virtio_fs_config

MEMORY = (FrontendRequest.SET_MEM_TABLE, FrontendRequest.ADD_MEM_REG)

Handler = Callable[["Chain"], None]
Garble = Callable[[Message, bytes], bytes]


class Chain:
    """One request as the device sees it. `readable` and `writable`: the elements' lengths."""

    def __init__(self, owner: FakeQueue, head: int, elements: list[tuple[int, int, bool]]) -> None:
        self.queue = owner
        self.head = head
        self.elements = elements  # guest address, bytes, whether the device may write
        self.readable = [size for _, size, writable in elements if not writable]
        self.writable = [size for _, size, writable in elements if writable]
        self.request = b"".join(owner.memory.read(gpa, size) for gpa, size, w in elements if not w)
        self.length, self.opcode, self.unique, self.nodeid, *rest = IN_HEADER.unpack_from(self.request)
        self.uid, self.gid, self.pid, self.extlen, _ = rest

    @property
    def body(self) -> bytes:
        """What follows the in header."""
        return self.request[IN_HEADER.size :]

    @property
    def room(self) -> int:
        """Bytes of reply behind the out header."""
        return sum(self.writable) - OUT_HEADER.size

    def put(self, data: bytes) -> None:
        """Write into the writable elements, as far as there are any."""
        for gpa, size, writable in self.elements:
            if writable and data:
                self.queue.memory.write(gpa, data[:size])
                data = data[size:]

    def give(self, used: int, call: bool = True) -> None:
        """Give the chain back with that used.len."""
        with self.queue.lock:
            if self.queue.ring is not None:
                self.queue.ring.push(self.head, used)
                if call:
                    self.queue.call()

    def reply(
        self, body: bytes = b"", error: int = 0, *, unique: int | None = None, out_len: int | None = None,
        used: int | None = None, call: bool = True,
    ) -> None:  # fmt: skip
        """Answer; what is not given is right. Nothing happens when the connection has gone."""
        size = OUT_HEADER.size + len(body)
        header = OUT_HEADER.pack(
            size if out_len is None else out_len, error, self.unique if unique is None else unique
        )
        with self.queue.lock:
            if self.queue.ring is not None:
                self.put(header + body)
                self.give(size if used is None else used, call)


def answer(chain: Chain) -> None:
    """A reply as large as the guest has room for, all zeros; a forget has none."""
    if chain.writable:
        chain.reply(bytes(chain.room))
    else:
        chain.give(0)


class FakeQueue:
    """A queue without a thread: its owner's thread waits for kicks and calls `serve`."""

    abandoned = False

    def __init__(self, fake: FakeDaemon, index: int) -> None:
        self.fake = fake
        self.index = index
        self.lock = threading.RLock()
        self.ring: DeviceRing | None = None
        self.kick_fd = self.call_fd = self.err_fd = -1
        self.call_message = CALL
        self.calls = 0
        self.popped = 0
        self.started = threading.Event()

    def start(
        self, memory: GuestMemory, num: int, desc: int, avail: int, used: int, base: int, event_idx: bool
    ) -> None:
        with self.lock:
            self.memory, self.num, self.desc, self.used = memory, num, desc, used
            self.avail, self.event_idx = avail, event_idx
            self.ring = DeviceRing(memory, num, desc, avail, used, base, event_idx)
            self.popped = base
            self.started.set()
        self.serve()

    def use_memory(self, memory: GuestMemory) -> None:
        with self.lock:
            if self.ring is not None:
                at = self.popped & 0xFFFF
                self.memory = memory
                self.ring = DeviceRing(
                    memory, self.num, self.desc, self.avail, self.used, at, self.event_idx
                )

    def begin_stop(self) -> None:
        pass

    def stop(self, timeout_s: float = 0) -> int:
        with self.lock:
            self.ring = None
            return self.popped & 0xFFFF

    def _own(self, old: int, new: int) -> int:
        if old >= 0:
            os.close(old)
        return new

    def set_kick(self, fd: int) -> None:
        self.kick_fd = self._own(self.kick_fd, fd)

    def set_call(self, fd: int, message: bytes | None = None) -> None:
        with self.lock:
            self.call_fd = self._own(self.call_fd, fd)
            self.call_message = CALL if message is None else message

    def set_err(self, fd: int) -> None:
        self.err_fd = self._own(self.err_fd, fd)

    def set_enabled(self, enabled: bool) -> None:
        pass

    def kick(self) -> None:
        self.serve()

    def close(self, timeout_s: float) -> None:
        self.stop()
        self.set_kick(-1)
        self.set_call(-1)
        self.set_err(-1)

    def serve(self) -> None:
        """Take all chains off the ring."""
        with self.lock:
            while self.ring is not None:
                popped = self.ring.pop()
                if popped is not None:
                    head, readable, writable = popped
                    for view in (*readable, *writable):
                        view.release()  # they would keep the memory mapped
                    self.popped += 1
                    self.fake.handler(Chain(self, head, self.walk(head)))
                elif not self.ring.enable_kick():
                    return

    def gpa(self, uva: int) -> int:
        return next(g + uva - u for g, size, u in self.memory.regions() if u <= uva < u + size)

    def walk(self, head: int) -> list[tuple[int, int, bool]]:
        """The chain's elements as the driver made them; DeviceRing merges adjacent ones."""
        table, index = self.gpa(self.desc), head
        elements = []
        while True:
            addr, size, flags, after = DESC.unpack(self.memory.read(table + DESC.size * index, DESC.size))
            if flags & INDIRECT:
                table, index = addr, 0
                continue
            elements.append((addr, size, bool(flags & WRITE)))
            if not flags & NEXT:
                return elements
            index = after

    def call(self) -> None:
        """Call the guest if it wants to be."""
        with self.lock:
            if self.ring is not None and self.ring.wants_call():
                self.call_always()

    def call_always(self) -> None:
        with self.lock:
            if self.call_fd >= 0:
                self.calls += 1
                with contextlib.suppress(BrokenPipeError):
                    os.write(self.call_fd, self.call_message)

    def push_raw(self, head: int, used: int) -> None:
        """A used element with any id."""
        with self.lock:
            base = self.gpa(self.used)
            (idx,) = struct.unpack("=H", self.memory.read(base + 2, 2))
            self.memory.write(base + 4 + 8 * (idx % self.num), USED_ELEM.pack(head, used))
            self.move_used(1)

    def move_used(self, n: int) -> None:
        """Say that n more chains were used."""
        with self.lock:
            base = self.gpa(self.used)
            (idx,) = struct.unpack("=H", self.memory.read(base + 2, 2))
            self.memory.write(base + 2, struct.pack("=H", (idx + n) & 0xFFFF))
            self.call_always()


class _Close(Exception):
    """Close the connection now."""


class _Mute(Exception):
    """Never answer again."""


class _Backend(Backend):
    def __init__(self, sock: socket.socket, fake: FakeDaemon) -> None:
        super().__init__(sock, fake)
        self._fake = fake

    def _handle(self, message: Message) -> None:
        self._fake.see(message)
        super()._handle(message)

    def _reply(self, message: Message, payload: bytes) -> None:
        data = messages.encode(message.request, payload, messages.REPLY)
        garble = self._fake.garble
        messages.send(self._sock, data if garble is None else garble(message, data))


class FakeDaemon:
    """A daemon on a socket of its own; a context manager.

    close_at, mute_at: the number of the message, from 0, at which the connection is closed or
    never answered again. garble: makes what is sent of a reply. tag None: CONFIG is not offered.
    """

    shmem = None

    def __init__(
        self, handler: Handler = answer, *, request_queues: int = 4, tag: bytes | None = b"fake",
        config_queues: int | None = None, inband: bool = False, close_at: int = -1, mute_at: int = -1,
        garble: Garble | None = None, keep_memory: bool = False,
    ) -> None:  # fmt: skip
        self.handler = handler
        self.queues_max = 1 + request_queues
        self.inband = inband
        queues = request_queues if config_queues is None else config_queues
        self.config = None if tag is None else CONFIG.pack(tag, queues)
        self.close_at, self.mute_at, self.garble, self.keep_memory = close_at, mute_at, garble, keep_memory
        self.held: queue.SimpleQueue[Chain] = queue.SimpleQueue()
        self.seen: list[int] = []  # messages of the connection
        self.memory_fds: list[int] = []  # with keep_memory
        self.queues: dict[int, FakeQueue] = {}
        self.error: ProtocolError | None = None
        self.resets = 0
        self.connections = 0
        self._directory = tempfile.mkdtemp(prefix="fake-")
        self.path = f"{self._directory}/socket"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._sock: socket.socket | None = None
        self._backend: _Backend | None = None
        self._muted = False
        self._stop = False
        self._ended = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fake-daemon", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and the daemon. Idempotent."""
        if self._stop:
            return
        self._stop = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._listener.close()
        os.close(self._wake)
        messages.close_all(self.memory_fds)
        shutil.rmtree(self._directory)

    # ---- for the test

    def hold(self, chain: Chain) -> None:
        """A handler: keep the chain until the test takes it with `next`."""
        self.held.put(chain)

    def hold_requests(self, chain: Chain) -> None:
        """A handler: keep requests, answer forgets."""
        (self.hold if chain.writable else answer)(chain)

    def next(self) -> Chain:
        """The next chain kept."""
        return self.held.get(timeout=DEADLINE_S)

    def take(self, n: int) -> list[Chain]:
        return [self.next() for _ in range(n)]

    def drop(self) -> None:
        """Close the connection, as a daemon that dies does; wait until it is closed."""
        with self._ended:
            sock = self._sock
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)
                assert self._ended.wait_for(lambda: self._sock is not sock, DEADLINE_S)

    def close_channel(self) -> None:
        """Close only the back-end channel."""
        assert self._backend is not None
        assert self._backend.channel is not None
        with socket.socket(fileno=os.dup(self._backend.channel)) as channel:
            channel.shutdown(socket.SHUT_RDWR)

    def write_channel(self, data: bytes) -> None:
        assert self._backend is not None
        assert self._backend.channel is not None
        os.write(self._backend.channel, data)

    # ---- vfsd.vhost.backend.Device

    def make_queue(self, index: int) -> FakeQueue:
        self.queues[index] = FakeQueue(self, index)
        return self.queues[index]

    def reset(self) -> None:
        self.resets += 1

    # ---- the thread

    def see(self, message: Message) -> None:
        number = len(self.seen)
        self.seen.append(message.request)
        if self.keep_memory and message.request in MEMORY:
            self.memory_fds += map(os.dup, message.fds)
        if number == self.close_at:
            raise _Close
        if number == self.mute_at:
            raise _Mute

    def _run(self) -> None:
        while not self._stop:
            poll = select.poll()
            kicks = {q.kick_fd: q for q in self.queues.values() if q.kick_fd >= 0 and q.ring is not None}
            listen = self._listener if self._backend is None else None
            for fd in (self._wake, listen, None if self._muted else self._backend, *kicks):
                if fd is not None:
                    poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            for fd in ready & kicks.keys():
                os.read(fd, 8)
                kicks[fd].serve()
            if listen is not None and listen.fileno() in ready:
                self._accept()
            if self._backend is not None and self._backend.fileno() in ready:
                self._read(self._backend)
        self._end()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        self.connections += 1
        self.seen, self.queues, self._muted = [], {}, False
        with self._ended:
            self._sock = sock
        self._backend = _Backend(sock, self)

    def _read(self, backend: _Backend) -> None:
        try:
            if not backend.on_readable():
                self._end()
        except _Mute:
            self._muted = True
        except (_Close, OSError, messages.PeerClosed):
            self._end()
        except ProtocolError as error:
            self.error = error
            self._end()

    def _end(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        with self._ended:
            self._sock = None
            self._ended.notify_all()
