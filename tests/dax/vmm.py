"""A front end with a DAX window that is mapped for real, and every way it can behave badly."""

import contextlib
import ctypes
import dataclasses
import fcntl
import mmap
import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fuse.ops import LINUX_FLAGS
from fuse.rawguest import Guest

from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.vhost.frontend import Frontend, SharedRegion
from vfsd.vhost.messages import (
    SHMEM_MAP,
    SHMEM_MAP_RW,
    BackendRequest,
    Message,
    PeerClosed,
    ProtocolFeature,
    Region,
    ShmemMap,
)
from vfsd.vhost.orders import ORDERS

WINDOW_GPA = 0x40_0000_0000
WINDOW_UVA = 0x7D00_0000_0000
PAGE = mmap.PAGESIZE
FH = abi.SETUPMAPPING_FH
READ, WRITE = abi.SETUPMAPPING_READ, abi.SETUPMAPPING_WRITE
DAX_FLAGS = LINUX_FLAGS | Init.MAP_ALIGNMENT | Init.HAS_INODE_DAX

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_int64]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FIXED = 0x10

TABLE = dataclasses.replace(
    ORDERS["qemu-generic"], wants=ORDERS["qemu-generic"].wants & ~ProtocolFeature.CONFIGURE_MEM_SLOTS
)
ORDERS.setdefault("qemu-table", TABLE)

Answer = Callable[[ShmemMap], int]
Refuses = Callable[[ShmemMap, int], bool]


def past_the_end(request: ShmemMap, fd: int) -> bool:
    return request.fd_offset + request.size > os.fstat(fd).st_size


def read_only(request: ShmemMap, fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def as_qemu(request: ShmemMap, fd: int) -> bool:
    """As QEMU 11.1, which maps for memory: for writing, and what is there."""
    return past_the_end(request, fd) or read_only(request, fd)


class Vmm(Guest):
    """A guest with a window. tells: as QEMU, describe each mapping as memory before answering.
    order: "qemu-generic", "qemu-table" (the same without CONFIGURE_MEM_SLOTS) or another.

    refuses: by what is asked for and its descriptor, what is not mapped.

    `mapped`: what is in the window, by offset: bytes, and whether it may be written. `answer`: called
    with each request in place of doing it.
    """

    def __init__(
        self, path: Path, *, tells: bool = True, order: str = "qemu-generic",
        refuses: Refuses = lambda request, fd: False, **more: object,
    ) -> None:  # fmt: skip
        self.tells = tells
        self.refuses = refuses
        self.mapped: dict[int, tuple[int, bool]] = {}
        self.requests: list[tuple[str, ShmemMap]] = []
        self.answer: Answer | None = None
        self.problem: BaseException | None = None
        self._lock = threading.RLock()
        super().__init__(path, order=order, **more)  # type: ignore[arg-type]
        self.size = self.frontend.shmem.get(abi.DAX_SHMID, 0)
        anonymous = mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE
        self.base: int = LIBC.mmap(None, self.size, 0, anonymous, -1, 0)
        self.files: dict[int, tuple[int, int]] = {}  # descriptor and offset in it, by offset in the window
        self.frontend.on_request = self._serve
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            for fd, _ in self.files.values():
                os.close(fd)
            self.files.clear()
            os.close(self._stop)
            LIBC.munmap(self.base, self.size)
        super().close()
        if self.problem is not None:
            raise self.problem

    def _loop(self) -> None:
        channel = self.frontend.channel
        assert channel is not None
        try:
            while self._stop not in select.select([channel, self._stop], [], [])[0]:
                with self._lock:
                    self.frontend.serve_channel()
        except (PeerClosed, OSError):
            pass
        except BaseException as problem:
            self.problem = problem

    def _serve(self, message: Message) -> int:
        request = ShmemMap(*SHMEM_MAP.unpack(message.payload))
        name = BackendRequest(message.request).name
        self.requests.append((name, request))
        with self.busy():
            return self._do(name, request, message)

    @contextlib.contextmanager
    def busy(self) -> Iterator[Frontend]:
        """The main channel for one thread; the back-end channel is not looked at (QEMU's big lock)."""
        with self._lock:
            serve, self.frontend.on_request = self.frontend.on_request, None
            try:
                yield self.frontend
            finally:
                self.frontend.on_request = serve

    def _do(self, name: str, request: ShmemMap, message: Message) -> int:
        if self.answer is not None and (code := self.answer(request)):
            return code
        if name == "SHMEM_MAP":
            return self._map(request, message.take_fd())
        assert name == "SHMEM_UNMAP" and not message.fds
        return self._unmap(request)

    def _mmap(self, at: int, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> bool:
        """Python's own mmap refuses what is beyond the end of a file."""
        wanted = self.base + at
        return bool(LIBC.mmap(wanted, size, prot, flags | MAP_FIXED, fd, offset) == wanted)

    @property
    def slots(self) -> bool:
        return ProtocolFeature.CONFIGURE_MEM_SLOTS in self.frontend.protocol_features

    def region(self, request: ShmemMap) -> Region:
        at = request.shm_offset
        return Region(WINDOW_GPA + at, request.size, WINDOW_UVA + at, request.fd_offset)

    def _map(self, request: ShmemMap, fd: int) -> int:
        end = request.shm_offset + request.size
        if end > self.size or self.refuses(request, fd) or any(
            at < end and request.shm_offset < at + size for at, (size, _) in self.mapped.items()
        ):  # fmt: skip
            os.close(fd)
            return 1  # QEMU: a mapping over another fails
        writable = bool(request.flags & SHMEM_MAP_RW)
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        if not self._mmap(request.shm_offset, request.size, prot, mmap.MAP_SHARED, fd, request.fd_offset):
            os.close(fd)
            return 1
        self.mapped[request.shm_offset] = request.size, writable
        self.files[request.shm_offset] = fd, request.fd_offset
        if self.tells and self.slots:
            self.frontend.add_mem_reg(SharedRegion(self.region(request), fd), ack=True)
        elif self.tells:
            window = SharedRegion(self.region(request), fd)
            self.frontend.set_mem_table([*self.regions, window], ack=True)
        return 0

    def _unmap(self, request: ShmemMap) -> int:
        if self.mapped.get(request.shm_offset, (0,))[0] != request.size:
            return 1  # QEMU: exactly one whole mapping
        assert self._mmap(request.shm_offset, request.size, 0, mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE)
        fd, fd_offset = self.files.pop(request.shm_offset)
        os.close(fd)
        del self.mapped[request.shm_offset]
        if self.tells and self.slots:
            self.frontend.rem_mem_reg(self.region(request._replace(fd_offset=fd_offset)), ack=True)
        elif self.tells:
            self.frontend.set_mem_table(self.regions, ack=True)
        return 0

    # ---- the guest

    def start_session(self) -> None:
        self.init(flags=DAX_FLAGS)

    def map_file(
        self, nodeid: int, foffset: int, length: int, moffset: int, flags: int = READ, queue: int = 1
    ) -> None:
        self.on(queue).body("SETUPMAPPING", nodeid, setupmapping(foffset, length, moffset, flags))

    def remove(self, nodeid: int, *parts: tuple[int, int], count: int | None = None) -> None:
        args = abi.REMOVEMAPPING_IN.pack(len(parts) if count is None else count)
        self.body("REMOVEMAPPING", nodeid, args + b"".join(abi.REMOVEMAPPING_ONE.pack(*p) for p in parts))

    def load(self, moffset: int, size: int) -> bytes:
        """Read the window."""
        assert self.is_mapped(moffset, size)
        return ctypes.string_at(self.base + moffset, size)

    def store(self, moffset: int, data: bytes) -> None:
        """Write to the window."""
        assert self.is_mapped(moffset, len(data), write=True)
        ctypes.memmove(self.base + moffset, data, len(data))

    def is_mapped(self, moffset: int, size: int = 1, write: bool = False) -> bool:
        return any(
            at <= moffset and moffset + size <= at + n and writable >= write
            for at, (n, writable) in self.mapped.items()
        )


def setupmapping(foffset: int, length: int, moffset: int, flags: int = READ) -> bytes:
    return abi.SETUPMAPPING_IN.pack(FH, foffset, length, flags, moffset)
