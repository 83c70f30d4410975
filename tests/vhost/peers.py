"""A device that records, connections to it in this process, and the daemon as a process."""

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vfsd.errors import ProtocolError
from vfsd.memory._regions import GuestMemory
from vfsd.vhost import messages
from vfsd.vhost.backend import Backend
from vfsd.vhost.frontend import Frontend, Setup, SharedRegion, Vring
from vfsd.vhost.messages import ProtocolFeature, Region, VirtioFeature
from vfsd.virtqueue._driver_ring import DriverRing

DEADLINE_S = 20.0
RING_NUM = 64
EVENT = (1).to_bytes(8, sys.byteorder)

FUSE_INIT = 26
INIT = struct.Struct("=IIQQIIII IIII 48x")
REPLY = struct.Struct("=IiQ II")

Wire = list[tuple[bytes, list[int]]]  # messages, each with its descriptors


class RecordingQueue:
    """In the place of vfsd.queue._queue.Queue: no thread, but the same ownership and the same checks."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.calls: list[str] = []  # every method that was called
        self.started = False
        self.abandoned = False
        self.starts: list[tuple[int, int, int, int, int, bool]] = []
        self.position = 0  # what stop() returns; a test moves it
        self.fds = {"kick": -1, "call": -1, "err": -1}
        self.message = b""
        self.kicks = 0

    def start(
        self,
        memory: GuestMemory,
        num: int,
        desc: int,
        avail: int,
        used: int,
        base: int,
        event_idx: bool,
    ) -> None:
        assert not self.started
        self.calls.append("start")
        for address in (desc, avail, used):
            if not any(uva <= address < uva + size for _, size, uva in memory.regions()):
                raise ValueError(f"ring part at {address:#x} outside memory")
        self.started = True
        self.position = base
        self.starts.append((num, desc, avail, used, base, event_idx))

    def use_memory(self, memory: GuestMemory) -> None:
        self.calls.append("use_memory")
        for address in self.starts[-1][1:4]:
            if not any(uva <= address < uva + size for _, size, uva in memory.regions()):
                raise ValueError("its ring is in no memory region")

    def begin_stop(self) -> None:
        self.calls.append("begin_stop")

    def stop(self, timeout_s: float) -> int:
        self.calls.append("stop")
        if not self.started:
            return 0
        self.started = False
        return self.position

    def _own(self, name: str, fd: int) -> None:
        self.calls.append(f"set_{name}")
        if self.fds[name] >= 0:
            os.close(self.fds[name])
        self.fds[name] = fd

    def set_kick(self, fd: int) -> None:
        self._own("kick", fd)

    def set_call(self, fd: int, message: bytes | None = None) -> None:
        self._own("call", fd)
        self.message = message or b""

    def set_err(self, fd: int) -> None:
        self._own("err", fd)

    def kick(self) -> None:
        self.kicks += 1

    def close(self, timeout_s: float) -> None:
        self.stop(timeout_s)
        for name in self.fds:
            self._own(name, -1)


class RecordingDevice:
    queues_max = 3
    shmem = None

    def __init__(self, config: bytes | None = None, inband: bool = False) -> None:
        self.config = config
        self.inband = inband
        self.queues: dict[int, RecordingQueue] = {}
        self.resets = 0

    def make_queue(self, index: int) -> RecordingQueue:
        assert index not in self.queues
        self.queues[index] = RecordingQueue(index)
        return self.queues[index]

    def reset(self) -> None:
        assert not any(queue.started for queue in self.queues.values())
        self.resets += 1


class Guest:
    """Memory of a guest with rings in it, and the descriptors that go with them."""

    SIZE = 1 << 20
    RING = 1 << 14  # bytes kept for one ring
    DATA = 1 << 18  # where buffers begin

    def __init__(self, queues: int = 2, sockets: bool = False) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, self.SIZE)
        self.region = Region(0, self.SIZE, 0x7F00_0000_0000, 0)
        # (the guest's end, the device's end); of an eventfd both are the same
        pairs = [self._notifier(sockets) for _ in range(2 * queues)]
        self.kicks, self.calls = pairs[:queues], pairs[queues:]
        self.memory = GuestMemory()
        self.memory.add(self.fd, *self.region)

    @staticmethod
    def _notifier(sockets: bool) -> tuple[int, int]:
        if sockets:
            ours, theirs = socket.socketpair()
            return ours.detach(), theirs.detach()
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        return fd, os.dup(fd)

    @property
    def shared(self) -> SharedRegion:
        return SharedRegion(self.region, self.fd)

    def vring(self, index: int, base: int = 0) -> Vring:
        start = self.region.uva + index * self.RING
        return Vring(
            index,
            RING_NUM,
            desc=start,
            avail=start + 0x1000,
            used=start + 0x2000,
            kick=self.kicks[index][1],
            call=self.calls[index][1],
            base=base,
        )

    def setup(
        self,
        bases: dict[int, int] | None = None,
        features: VirtioFeature | None = None,
        without: ProtocolFeature = messages.NO_FEATURE,
    ) -> Setup:
        vrings = [self.vring(i, (bases or {}).get(i, 0)) for i in range(len(self.kicks))]
        return Setup([self.shared], vrings, features, without)

    def driver(self, index: int, event_idx: bool = True) -> DriverRing:
        """The driver's half of a ring, from its beginning."""
        self.memory.write(self.region.gpa + index * self.RING, bytes(self.RING))
        vring = self.vring(index)
        return DriverRing(self.memory, vring.num, vring.desc, vring.avail, vring.used, event_idx)

    def kick(self, index: int) -> None:
        os.write(self.kicks[index][0], EVENT)

    def wait_call(self, index: int) -> None:
        fd = self.calls[index][0]
        assert select.select([fd], [], [], DEADLINE_S)[0], f"no call from queue {index}"
        os.read(fd, 8)

    def close(self) -> None:
        for fd in (self.fd, *(fd for pair in (*self.kicks, *self.calls) for fd in pair)):
            os.close(fd)


class Driver:
    """Sends FUSE_INIT through one queue, again and again."""

    def __init__(self, guest: Guest, index: int = 1, event_idx: bool = True) -> None:
        self.guest = guest
        self.index = index
        self.event_idx = event_idx
        self.unique = 1
        self.reset()

    def reset(self) -> None:
        self.ring: DriverRing = self.guest.driver(self.index, self.event_idx)

    def init(
        self,
        kick: Callable[[], None] | None = None,
        wait_call: Callable[[], None] | None = None,
        at: int = Guest.DATA,
        kick_always: bool = False,
    ) -> None:
        """One request and its reply, notified through the guest's descriptors by default."""
        self.unique += 2
        request = INIT.pack(INIT.size, FUSE_INIT, self.unique, 0, 0, 0, 0, 0, 7, 38, 1 << 17, 0)
        self.guest.memory.write(at, request)
        self.ring.add([(at, INIT.size)], [(at + 0x1000, 80)], self.unique)
        self.ring.publish()
        if self.ring.wants_kick() or kick_always:
            (kick or (lambda: self.guest.kick(self.index)))()
        while (used := self.ring.pop_used()) is None:
            if not self.ring.enable_call():
                (wait_call or (lambda: self.guest.wait_call(self.index)))()
        length, error, unique, major, _ = REPLY.unpack(self.guest.memory.read(at + 0x1000, REPLY.size))
        assert used == (self.unique, length)
        assert (error, unique, major) == (0, self.unique, 7)


class Link:
    """A front end and a back end in this process.

    As a context manager it serves the back end in a thread, as the control thread would; without,
    `tell` sends one message and handles it at once."""

    def __init__(self, device: RecordingDevice) -> None:
        self.device = device
        ours, theirs = socket.socketpair()
        self.sock = ours
        self.frontend = Frontend(ours, timeout_s=DEADLINE_S)
        self.backend = Backend(theirs, device)
        self.error: ProtocolError | None = None  # how the connection ended
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        try:
            while select.select([self.backend], [], [], DEADLINE_S)[0]:
                if not self.backend.on_readable():
                    break
        except ProtocolError as error:
            self.error = error
        self.backend.close()

    def __enter__(self) -> "Link":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()
        self._thread.join()
        self.close()

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        messages.send(self.sock, messages.encode(request, payload, flags), fds)
        assert self.backend.on_readable()

    def close(self) -> None:
        self.frontend.close()
        self.backend.close()


class Daemon:
    """`vfsd serve` as a process."""

    def __init__(self, directory: Path, *options: str) -> None:
        shared = directory / "shared"
        shared.mkdir()
        self.socket = str(directory / "sock")
        command = [sys.executable, "-m", "vfsd", "serve", "--socket", self.socket]
        self.process = subprocess.Popen(
            [*command, "--shared-dir", str(shared), *options], stderr=subprocess.PIPE, bufsize=0
        )
        assert self.process.stderr is not None
        self._stderr = self.process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._text = b""
        self.wait_line("READY")

    def _read(self, timeout_s: float) -> bool:
        """Whether there was something; end of file is an error."""
        if not select.select([self._stderr], [], [], timeout_s)[0]:
            return False
        data = os.read(self._stderr.fileno(), 65536)
        assert data, f"the daemon ended: {self.process.wait()}, {self._text.decode()}"
        self._text += data
        return True

    def wait_line(self, needle: str, but: str = "\n") -> str:
        """Drop what was logged up to the first line with `needle` in it and without `but`; that line."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            line, newline, rest = self._text.partition(b"\n")
            if newline:
                self._text = rest
                if needle in line.decode() and but not in line.decode():
                    return line.decode()
            else:
                assert self._read(deadline - time.monotonic()), f"no line with {needle!r}"

    def take_lines(self) -> list[str]:
        """What was logged since the last look."""
        while self._read(0):
            pass
        *lines, self._text = self._text.split(b"\n")
        return [line.decode() for line in lines]

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.socket)  # with a timeout it would fail when the backlog is full
        sock.settimeout(DEADLINE_S)
        return sock

    def fd_count(self) -> int:
        """Of the process that all servers are forked from."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        """Its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """The way that always works."""
        self.process.kill()
        self.process.wait()
        self._stderr.close()
