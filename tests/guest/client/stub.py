"""A device whose answers the test gives: for what no real daemon does when asked to."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable
from errno import ENOENT, ENOSYS
from typing import Any

from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.driver._window import WindowMemory

Answer = Callable[[int, bytes], bytes]
FLAGS = Init.ASYNC_READ | Init.BIG_WRITES | Init.PARALLEL_DIROPS | Init.MAX_PAGES | Init.INIT_EXT


def init_out(
    *, minor: int = 45, flags: int = FLAGS, max_background: int = 0, max_write: int = 1 << 20,
    max_pages: int = 256, major: int = 7, map_alignment: int = 0,
) -> bytes:  # fmt: skip
    return abi.INIT_OUT.pack(
        major, minor, 131072, flags & 0xFFFFFFFF, max_background, 0, max_write, 1, max_pages, map_alignment,
        flags >> 32,
    )


def attr(ino: int, mode: int = stat.S_IFREG | 0o644, size: int = 0, flags: int = 0, mtime: int = 0) -> bytes:
    return abi.ATTR.pack(ino, size, 0, 0, mtime, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, flags)


def entry(
    nodeid: int, *, generation: int = 0, valid: int = 0, attr_valid: int | None = None,
    mode: int = stat.S_IFREG | 0o644, size: int = 0, flags: int = 0,
) -> bytes:  # fmt: skip
    head = abi.ENTRY_OUT.pack(nodeid, generation, valid, valid if attr_valid is None else attr_valid, 0, 0)
    return head + attr(nodeid, mode, size, flags)


class StubTransport:
    """Answers by opcode; ENOSYS for the others. `held` submissions wait for `release`."""

    def __init__(self) -> None:
        self.answers: dict[Opcode, Answer] = {
            Opcode.INIT: lambda nodeid, args: init_out(),
            Opcode.DESTROY: lambda nodeid, args: b"",
            Opcode.GETATTR: lambda nodeid, args: abi.ATTR_OUT.pack(3600, 0, 0)
            + attr(nodeid, stat.S_IFDIR | 0o755),
        }
        self.sent: list[tuple[Opcode, int]] = []
        self.forgets: list[tuple[int, int]] = []
        self.running = 0
        self.running_max = 0
        self.hold = False
        self._held: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def _answer(self, opcode: int, nodeid: int, args: bytes) -> bytes:
        self.sent.append((Opcode(opcode), nodeid))
        answer = self.answers.get(Opcode(opcode))
        if answer is None:
            raise OSError(ENOSYS, "")
        return answer(nodeid, args)

    def call(
        self, opcode: int, nodeid: int, args: bytes = b"", *, into: Any = None, **_: Any
    ) -> tuple[bytes, int]:
        data = self._answer(opcode, nodeid, args)
        if into is None:
            return data, 0
        memoryview(into)[: len(data)] = data
        return b"", len(data)

    def submit(
        self, done: Callable[[int, bytes, bytes], None], opcode: int, nodeid: int, args: bytes = b"",
        **_: Any,
    ) -> None:  # fmt: skip
        def finish() -> None:
            try:
                error, out = 0, self._answer(opcode, nodeid, args)
            except OSError as problem:
                error, out = problem.errno or ENOENT, b""
            with self._lock:
                self.running -= 1
            done(error, out, out)

        with self._lock:
            self.running += 1
            self.running_max = max(self.running_max, self.running)
            if self.hold:
                self._held.append(finish)
                return
        threading.Thread(target=finish).start()

    def release(self) -> int:
        """Let what is held go on; how many that were."""
        with self._lock:
            held, self._held = self._held, []
        for finish in held:
            finish()
        return len(held)

    def forget(self, nodeid: int, nlookup: int) -> None:
        self.forgets.append((nodeid, nlookup))

    def nothing(self, *_: Any) -> None:
        pass

    connect = disconnect = drain = restart_unique = close = nothing


class StubDevice:
    def __init__(self, queue_size: int = 1024, tag: str = "stub") -> None:
        self.transport = StubTransport()
        self.queue_size = queue_size
        self.max_pages = min(256, queue_size - 4)
        self.tag = tag
        self.name = "stub"
        self.gone: str | None = None
        self.window: WindowMemory | None = None
