"""A shared memory region of the device, which the front end fills: SHMEM_MAP and SHMEM_UNMAP.

Back-end requests go over the channel of SET_BACKEND_REQ_FD and are answered there. Meanwhile the
front end may wait for the main channel: QEMU tells each mapping by ADD_MEM_REG before it answers. So
whoever waits here is never the control thread, and gives up as soon as that one has to stop a queue
(`suspended`).
"""

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from errno import EAGAIN, EIO, ENODEV, ETIMEDOUT
from typing import Final

from vfsd.errors import ProtocolError
from vfsd.vhost import messages
from vfsd.vhost.messages import (
    NEED_REPLY,
    REPLY,
    SHMEM_MAP,
    SHMEM_MAP_RW,
    U64,
    BackendRequest,
    Message,
    MessageReader,
    PeerClosed,
    ShmemMap,
)

log = logging.getLogger("vfsd.vhost")

ANSWER_TIMEOUT_S: Final = 20.0


def check_reply(request: int, flags: int, size: int, fds: int) -> None:
    """Check of what a back end reads from the back-end channel."""
    name = f"reply to {messages.backend_name(request)}"
    if not flags & REPLY or size != U64.size or fds:
        raise ProtocolError(f"{name}: flags {flags:#x}, {size} bytes, {fds} descriptors")


class SharedMemory:
    """Region `shmid` of `size` bytes, and what it holds, as far as the front end is concerned.

    map() and unmap() are for any thread that may wait, the others for the control thread.
    """

    def __init__(self, shmid: int, size: int) -> None:
        self.shmid = shmid
        self.size = size
        self.mappings_max = 0  # how many the front end can have at a time
        self._turn = threading.Lock()  # of one request and its answer
        self._sock: socket.socket | None = None
        self._reader: MessageReader | None = None
        self._unanswered = 0  # answers to come: they come in the order of the requests
        self._stuck = False  # none has come since one was waited for in vain
        self._suspensions = 0
        self._suspension = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # What is, or may be, mapped, by offset in the region: device, inode, offset in the file, bytes.
        self._mapped: dict[int, tuple[int, int, int, int]] = {}

    # ---- the control thread

    def connect(self, fd: int | None) -> None:
        """Use this descriptor, from now on the region's; None: there is no channel. ProtocolError."""
        sock = None
        if fd is not None:
            try:
                sock = socket.socket(fileno=fd)
            except OSError as problem:
                os.close(fd)
                raise ProtocolError(f"no socket: {problem.strerror}") from problem
        with self.suspended(), self._turn:
            if self._reader is not None:
                self._reader.close()
            if self._sock is not None:
                self._sock.close()
            self._sock = sock
            self._unanswered = 0
            self._stuck = False
            self._reader = None
            if sock is not None:
                self._reader = MessageReader(sock, check_reply, messages.backend_name)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """While the control thread can't answer the front end: whoever waits gives up, nobody begins."""
        if self._suspension < 0:  # closed: nobody waits
            yield
            return
        self._suspensions += 1
        os.eventfd_write(self._suspension, 1)
        try:
            yield
        finally:
            self._suspensions -= 1
            if not self._suspensions:
                os.eventfd_read(self._suspension)

    def maps(self, fd: int, fd_offset: int, size: int) -> bool:
        """Whether this part of a file is, or is just being, mapped here: then it is no guest memory."""
        status = os.fstat(fd)
        return any(
            (dev, ino) == (status.st_dev, status.st_ino)
            and at <= fd_offset and fd_offset + size <= at + length
            for dev, ino, at, length in list(self._mapped.values())
        )  # fmt: skip

    def close(self) -> None:
        """Nobody may wait here any more. Idempotent."""
        if self._suspension < 0:
            return
        self.connect(None)
        os.close(self._suspension)
        self._suspension = -1

    # ---- whoever maps

    @property
    def connected(self) -> bool:
        return self._sock is not None

    def map(self, fd: int, fd_offset: int, shm_offset: int, size: int, writable: bool) -> None:
        """Have a part of a file appear in the region, where nothing may be. All in bytes.

        OSError: EIO the front end refused, ENODEV it is gone, EAGAIN a queue is being stopped (a page
        fault of Linux is then tried again); nothing is mapped. TimeoutError (ETIMEDOUT, EAGAIN): it may
        be mapped.
        """
        flags = SHMEM_MAP_RW if writable else 0
        payload = SHMEM_MAP.pack(*ShmemMap(self.shmid, fd_offset, shm_offset, size, flags))
        # Before it is sent: QEMU describes the memory before it answers.
        self._expect(shm_offset, fd, fd_offset, size)
        try:
            refused = self._ask(BackendRequest.SHMEM_MAP, payload, fd)
        except TimeoutError:
            raise
        except OSError:
            self._forget(shm_offset)
            raise
        if refused:
            self._forget(shm_offset)
            raise OSError(EIO, "the front end refuses")

    def unmap(self, shm_offset: int, size: int) -> None:
        """Undo one map(), whole, or find that the front end has done so itself (on a reset).

        OSError ENODEV, EAGAIN, EIO as map(), it is still there; TimeoutError: it may be.
        """
        payload = SHMEM_MAP.pack(*ShmemMap(self.shmid, 0, shm_offset, size, 0))
        self._ask(BackendRequest.SHMEM_UNMAP, payload)
        self._forget(shm_offset)

    def unmap_unheard(self, shm_offset: int, size: int) -> bool:
        """The same without waiting for the answer, for any thread. False: it can't be sent now."""
        payload = SHMEM_MAP.pack(*ShmemMap(self.shmid, 0, shm_offset, size, 0))
        self._forget(shm_offset)
        with self._turn:
            if self._sock is None:
                return False
            try:
                self._send(self._sock, BackendRequest.SHMEM_UNMAP, payload)
            except (ProtocolError, PeerClosed, OSError):
                return False
        return True

    def _expect(self, shm_offset: int, fd: int, fd_offset: int, size: int) -> None:
        status = os.fstat(fd)
        self._mapped[shm_offset] = status.st_dev, status.st_ino, fd_offset, size

    def _forget(self, shm_offset: int) -> None:
        self._mapped.pop(shm_offset, None)

    def _ask(self, request: BackendRequest, payload: bytes, fd: int | None = None) -> int:
        """One request and its answer: 0, or that of a front end that refuses. OSError."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        with self._turn:
            if self._sock is None or self._reader is None:
                raise OSError(ENODEV, "there is no back-end channel")
            try:
                while self._unanswered and self._read_answer(self._reader):
                    pass
                if self._suspensions:
                    raise OSError(EAGAIN, "a queue is being stopped")
                if self._stuck:
                    raise OSError(EIO, "the front end owes an answer")
                self._send(self._sock, request, payload, fd)
                answer = self._wait_answer(self._sock, self._reader, deadline)
                if answer.request != request:
                    name = messages.backend_name(answer.request)
                    raise ProtocolError(f"{request.name}: a reply to {name} instead")
            except (ProtocolError, PeerClosed) as problem:
                raise self._broken(problem) from problem
        (refused,) = U64.unpack(answer.payload)
        if refused:
            log.debug("%s: the front end refuses: %d", request.name, refused)
        return int(refused)

    def _send(
        self, sock: socket.socket, request: BackendRequest, payload: bytes, fd: int | None = None
    ) -> None:
        data = messages.encode(request, payload, NEED_REPLY)
        messages.send(sock, data, () if fd is None else (fd,), 0)
        self._unanswered += 1

    def _read_answer(self, reader: MessageReader) -> Message | None:
        answer = reader.read()
        if answer is not None:
            self._unanswered -= 1
            self._stuck = False
        return answer

    def _wait_answer(self, sock: socket.socket, reader: MessageReader, deadline: float) -> Message:
        """The answer to the last request, past those that nobody waited for."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(self._suspension, select.POLLIN)
        while True:
            answer = self._read_answer(reader)
            if answer is not None and not self._unanswered:
                return answer
            if answer is not None:
                continue
            left_ms = (deadline - time.monotonic()) * 1000
            ready = dict(poll.poll(left_ms)) if left_ms > 0 else {}
            if sock.fileno() in ready:
                continue
            if ready:
                raise TimeoutError(EAGAIN, "a queue is stopped while the front end is to answer")
            self._stuck = True
            log.warning("the front end does not answer for %g s", ANSWER_TIMEOUT_S)
            raise TimeoutError(ETIMEDOUT, "the front end does not answer")

    def _broken(self, problem: Exception) -> OSError:
        """The channel is of no more use."""
        log.warning("the back-end channel is lost: %s", problem or "closed by the front end")
        assert self._sock is not None and self._reader is not None
        self._reader.close()
        self._sock.close()
        self._sock = self._reader = None
        return OSError(ENODEV, "the back-end channel is lost")
