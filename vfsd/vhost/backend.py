"""The device side of one vhost-user connection: a state machine fed by the control thread.

Nothing here waits for a request, but for what stops a ring, and that for STOP_TIMEOUT_S at most.

A ring has a running queue exactly while it is set up (size, addresses, memory, features), started
(SET_VRING_KICK, or in-band) and enabled. The front ends send the messages that lead there in
every order, so each of them only records its part and then asks whether all parts are there.
What stops a queue keeps its next available index, and the next start goes on from it.

A disabled ring has no queue thread: user-mode Linux frees the memory of its rings after
SET_VRING_ENABLE 0 and sets them up anew without ever sending GET_VRING_BASE.
"""

import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Final, Protocol

from vfsd.errors import ProtocolError
from vfsd.vhost import messages
from vfsd.vhost.memory import SLOTS_MAX, MemoryTable
from vfsd.vhost.messages import (
    CONFIG_HEAD,
    NEED_REPLY,
    REPLY,
    SINGLE_REGION,
    U64,
    VRING_ADDR,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    VRING_STATE,
    BackendRequest,
    FrontendRequest,
    Message,
    MessageReader,
    PeerClosed,
    ProtocolFeature,
    Region,
    VirtioFeature,
    VringAddr,
)
from vfsd.vhost.shmem import SharedMemory
from vfsd.vhost.vring import VirtQueue, Vring

log = logging.getLogger("vfsd.vhost")

FEATURES: Final = (
    VirtioFeature.VERSION_1
    | VirtioFeature.INDIRECT_DESC
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.PROTOCOL_FEATURES
)
PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)

# QEMU aborts at 512 regions of memory, and each mapping is one while CONFIGURE_MEM_SLOTS is on; the rest
# is for guest memory. A larger window is offered without that feature: then QEMU tells only the first
# few mappings, and is bounded by the kernel's vm.max_map_count of 65530.
SLOTTED_MAPPINGS_MAX: Final = 448
SLOTTED_WINDOW_MAX: Final = SLOTTED_MAPPINGS_MAX << 21
MAPPINGS_MAX: Final = 1 << 15

# A request that has not come back after that time is never answered: the front end, which is a whole VM,
# waits meanwhile. Nobody waits for those of a front end that has left.
STOP_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 1.0

MESSAGES_PER_CALL: Final = 64  # then the control thread looks at its other connections
REFUSED: Final = 1  # the u64 of an acknowledgement that is none


class Device(Protocol):
    """The device behind a connection. It may make more than one queue, each only once."""

    @property
    def queues_max(self) -> int:
        """Answer of GET_QUEUE_NUM: request queues and hiprio, at most 256."""

    @property
    def config(self) -> bytes | None:
        """The configuration space; None: the front end has its own, CONFIG is not offered."""

    @property
    def inband(self) -> bool:
        """Whether INBAND_NOTIFICATIONS is offered."""

    @property
    def shmem(self) -> SharedMemory | None:
        """Its shared memory region; None: SHMEM is not offered."""

    def make_queue(self, index: int) -> VirtQueue: ...

    def reset(self) -> None:
        """Forget the session: RESET_DEVICE or status 0. No queue runs."""


def _refuse_unoffered(bits: int, offered: int) -> None:
    # The complement of an IntFlag has only the bits it has names for.
    if unoffered := bits & ~int(offered):
        raise ProtocolError(f"bits {unoffered:#x} were not offered")


class Backend:
    """The device side of one connection. It owns the socket.

    ProtocolError means the front end broke the protocol: log its text, which names the message
    and the field, and close(). Nothing else is usable then."""

    def __init__(self, sock: socket.socket, device: Device) -> None:
        self.features = VirtioFeature(0)  # as acknowledged by the front end
        self.protocol_features = ProtocolFeature(0)
        self.offered = PROTOCOL_FEATURES
        if device.config is not None:
            self.offered |= ProtocolFeature.CONFIG
        if device.inband:
            self.offered |= ProtocolFeature.INBAND_NOTIFICATIONS
        self._shmem = device.shmem
        if self._shmem is not None:
            self.offered |= ProtocolFeature.SHMEM
            if self._shmem.size > SLOTTED_WINDOW_MAX:
                self.offered &= ~ProtocolFeature.CONFIGURE_MEM_SLOTS
        self._table: list[tuple[Region, int, int]] | None = None
        self.channel: int | None = None  # descriptor of SET_BACKEND_REQ_FD
        self.memory = MemoryTable()
        self.memory.guest.watch(sock.fileno())
        self._sock = sock
        self._device = device
        self._reader = MessageReader(sock, messages.check_frontend_request, messages.frontend_name)
        self._rings: dict[int, Vring] = {}
        self._features_set = False
        self._status = 0

    def fileno(self) -> int:
        """The main channel, to wait on with a level-triggered selector."""
        return self._sock.fileno()

    def on_readable(self) -> bool:
        """Handle the messages that are there. False: the front end closed the connection."""
        try:
            for _ in range(MESSAGES_PER_CALL):
                message = self._reader.read()
                if message is None:
                    return True
                try:
                    self._handle(message)
                finally:
                    message.close()
        except PeerClosed:
            if self.memory.guest.torn:
                raise ProtocolError("guest memory is gone: its file was cut off or is full") from None
            return False
        return True

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop the queues and close every descriptor. The device is not reset. Idempotent.

        timeout_s: as of Queue.stop().
        """
        self._stop(self._rings.values(), timeout_s)
        for ring in self._rings.values():
            ring.queue.close(0)
        self._rings.clear()
        self.memory.clear()
        self._set_channel(None)
        if self._shmem is not None:
            self._shmem.close()
        self._reader.close()
        self._sock.close()

    # ---- one message

    def _handle(self, message: Message) -> None:
        name = messages.frontend_name(message.request)
        log.debug("%s: %d bytes, %d fds", name, len(message.payload), len(message.fds))
        try:
            answer = self._answer(message)
            if isinstance(answer, bytes):
                self._reply(message, answer)
            elif message.flags & NEED_REPLY and self._has(ProtocolFeature.REPLY_ACK):
                self._reply(message, U64.pack(answer))
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error}") from error

    def _answer(self, message: Message) -> bytes | int:
        """The body of the reply, or 0 or REFUSED where a reply is only an acknowledgement."""
        shape = messages.FRONTEND_SHAPES.get(message.request)
        handler = _HANDLERS.get(message.request)
        if shape is None:
            return REFUSED
        if handler is not None and shape.feature in self.offered:
            return handler(self, message)
        if shape.reply is not None:
            raise ProtocolError(f"{shape.feature.name or 'its feature'} was not offered")
        return REFUSED

    def _reply(self, message: Message, payload: bytes) -> None:
        messages.send(self._sock, messages.encode(message.request, payload, REPLY))

    def _has(self, feature: ProtocolFeature) -> bool:
        return feature in self.protocol_features

    # ---- features, status, configuration

    def _get_features(self, message: Message) -> bytes:
        return U64.pack(FEATURES)

    def _set_features(self, message: Message) -> int:
        (bits,) = U64.unpack(message.payload)
        _refuse_unoffered(bits, FEATURES)
        if bits != self.features:
            for ring in self._running():
                raise ProtocolError(f"bits change to {bits:#x} while queue {ring.index} runs")
        self.features = VirtioFeature(bits)
        self._features_set = True
        self._start_ready()
        return 0

    def _get_protocol_features(self, message: Message) -> bytes:
        return U64.pack(self.offered)

    def _set_protocol_features(self, message: Message) -> int:
        (bits,) = U64.unpack(message.payload)
        _refuse_unoffered(bits, self.offered)
        self.protocol_features = ProtocolFeature(bits)
        self.memory.guest.set_incomplete(self._has(ProtocolFeature.SHMEM))
        self._connect_calls()
        self._connect_shmem()
        return 0

    def _nothing(self, message: Message) -> int:
        return 0

    def _get_queue_num(self, message: Message) -> bytes:
        return U64.pack(self._device.queues_max)

    def _get_config(self, message: Message) -> bytes:
        config = self._device.config
        offset, size, flags = CONFIG_HEAD.unpack_from(message.payload)
        if config is None or offset + size > len(config):
            return CONFIG_HEAD.pack(offset, 0, flags)  # size 0 is the specified error
        return CONFIG_HEAD.pack(offset, size, flags) + config[offset : offset + size]

    def _set_config(self, message: Message) -> int:
        return REFUSED  # every field of virtio_fs_config is read-only

    def _get_status(self, message: Message) -> bytes:
        return U64.pack(self._status)

    def _set_status(self, message: Message) -> int:
        (status,) = U64.unpack(message.payload)
        if status == 0 and self._status != 0:
            self._reset()
        self._status = status
        return 0

    def _reset_device(self, message: Message) -> int:
        self._reset()
        return 0

    def _reset(self) -> None:
        # Memory stays: QEMU sends only what changes in it, also after a reset.
        self._stop(self._rings.values(), STOP_TIMEOUT_S)
        for ring in self._rings.values():
            ring.forget()
        self._status = 0
        self._device.reset()

    def _stop(self, rings: Iterable[Vring], timeout_s: float) -> None:
        """Have these queues not run, the lot of them within that time.

        What waits for an answer of the front end, which waits for this, gives up. When nothing runs any more,
        a request that was left behind has the guest's memory taken away from under it, because that may be
        another kernel's by the time it comes back."""
        deadline = time.monotonic() + timeout_s
        running = [ring for ring in rings if ring.running]
        with self._shmem.suspended() if self._shmem is not None else nullcontext():
            for ring in running:
                ring.queue.begin_stop()
            for ring in running:
                ring.stop(max(0.0, deadline - time.monotonic()))
        left_behind = any(ring.queue.abandoned for ring in self._rings.values())
        if running and left_behind and not self._running() and not self.memory.guest.renew():
            log.warning("a request that has not come back may still write to the guest's memory")

    # ---- shared memory

    def _get_shmem_config(self, message: Message) -> bytes:
        assert self._shmem is not None
        return messages.encode_shmem_config({self._shmem.shmid: self._shmem.size})

    def _connect_shmem(self) -> None:
        if self._shmem is None:
            return
        usable = self.channel is not None and self._has(ProtocolFeature.SHMEM)
        slots = self._has(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        self._shmem.mappings_max = SLOTTED_MAPPINGS_MAX if slots else MAPPINGS_MAX
        # Without an acknowledgement nobody could tell the guest that its file is there.
        if usable and self.channel is not None and self._has(ProtocolFeature.REPLY_ACK):
            self._shmem.connect(os.dup(self.channel))
        else:
            self._shmem.connect(None)

    def _is_window(self, region: Region, fd: int) -> bool:
        """Whether it is no guest memory but a file in a window: ours, or another device's, which QEMU tells
        us as well.

        Ours is what we have asked for. Another's is known by what memory can't be: shorter than the region,
        or not to be written. Else it is taken for memory, whatever its name: nothing but system calls touches
        it then either, as long as the guest has only data there."""
        if self._shmem is None or not self._has(ProtocolFeature.SHMEM):
            return False
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return False
        short = status.st_size < region.offset + region.size
        readable_alone = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        return short or readable_alone or self._shmem.maps(fd, region.offset, region.size)

    # ---- memory

    def _set_mem_table(self, message: Message) -> int:
        regions = messages.decode_mem_table(message.payload)
        fds: list[int] = message.fds
        if self._shmem is not None and len(regions) == len(fds):
            # Each mapping in the region makes QEMU send a whole table. Guest memory does not change.
            pairs = zip(regions, fds, strict=True)
            kept = [(region, fd) for region, fd in pairs if not self._is_window(region, fd)]
            regions, fds = [region for region, _ in kept], [fd for _, fd in kept]
            status = [os.fstat(fd) for fd in fds]
            table = [(r, st.st_dev, st.st_ino) for r, st in zip(regions, status, strict=True)]
            if table == self._table:
                return 0
            self._table = table
        self.memory.replace(regions, fds)
        self._memory_changed()
        return 0

    def _get_max_mem_slots(self, message: Message) -> bytes:
        return U64.pack(SLOTS_MAX)

    def _add_mem_reg(self, message: Message) -> int:
        if not message.fds:
            raise ProtocolError("no descriptor")
        region = Region(*SINGLE_REGION.unpack(message.payload))
        if self._is_window(region, message.fds[0]):
            self.memory.add_shrinking(region, message.fds[0])
        else:
            self._table = None
            self.memory.add(region, message.fds[0])
        self._memory_changed()
        return 0

    def _rem_mem_reg(self, message: Message) -> int:
        region = Region(*SINGLE_REGION.unpack(message.payload))
        self._table = None
        self.memory.remove(region)
        self._memory_changed()
        return 0

    def _memory_changed(self) -> None:
        """Nothing waits for requests under way: they keep what they work with."""
        for ring in self._running():
            ring.use_memory(self.memory)
        self._start_ready()

    # ---- rings

    def _ring(self, index: int) -> Vring:
        if index >= self._device.queues_max:
            raise ProtocolError(f"queue {index}: there are {self._device.queues_max}")
        if index not in self._rings:
            self._rings[index] = Vring(index, self._device.make_queue(index))
            self._connect_call(self._rings[index])
        return self._rings[index]

    def _running(self) -> list[Vring]:
        return [ring for ring in self._rings.values() if ring.running]

    def _start_ready(self) -> None:
        for ring in self._rings.values():
            self._start_if_ready(ring)

    def _start_if_ready(self, ring: Vring) -> None:
        if self._features_set:
            ring.start_if_ready(self.memory, self.features)

    def _set_vring_num(self, message: Message) -> int:
        index, num = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        ring.set_num(num)
        self._start_if_ready(ring)
        return 0

    def _set_vring_addr(self, message: Message) -> int:
        addr = VringAddr(*VRING_ADDR.unpack(message.payload))
        ring = self._ring(addr.queue)
        ring.set_addr(addr)
        self._start_if_ready(ring)
        return 0

    def _set_vring_base(self, message: Message) -> int:
        index, base = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        ring.set_base(base)
        self._start_if_ready(ring)
        return 0

    def _get_vring_base(self, message: Message) -> bytes:
        index, _ = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        self._stop([ring], STOP_TIMEOUT_S)
        ring.kicked = False
        return VRING_STATE.pack(index, ring.base)

    def _set_vring_enable(self, message: Message) -> int:
        index, enable = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        if enable > 1:
            raise ProtocolError(f"queue {index}: {enable} is neither 0 nor 1")
        ring.enabled = bool(enable)
        if not enable:
            self._stop([ring], STOP_TIMEOUT_S)
            return 0
        if self._has(ProtocolFeature.INBAND_NOTIFICATIONS):
            ring.kicked = True  # user-mode Linux sends no SET_VRING_KICK then
        self._start_if_ready(ring)
        return 0

    # ---- notifications

    def _vring_fd(self, message: Message) -> tuple[Vring, int]:
        """The ring and its new descriptor, now the caller's; -1: the message says it has none."""
        (word,) = U64.unpack(message.payload)
        ring = self._ring(word & VRING_INDEX_MASK)
        where = f"queue {ring.index}"
        if word & ~(VRING_INDEX_MASK | VRING_NO_FD):
            raise ProtocolError(f"{where}: unknown bits in {word:#x}")
        if word & VRING_NO_FD:
            if message.fds:
                raise ProtocolError(f"{where}: a descriptor, and the bit for none")
            return ring, -1
        if not message.fds:
            raise ProtocolError(f"{where}: no descriptor")
        return ring, message.take_fd()

    def _set_vring_kick(self, message: Message) -> int:
        ring, fd = self._vring_fd(message)
        if fd < 0 and not self._has(ProtocolFeature.INBAND_NOTIFICATIONS):
            raise ProtocolError(f"queue {ring.index}: no descriptor, rings are not polled here")
        with ring.handing_over():
            ring.queue.set_kick(fd)
        ring.kicked = True
        self._start_if_ready(ring)
        return 0

    def _set_vring_call(self, message: Message) -> int:
        ring, fd = self._vring_fd(message)
        ring.calls_by_fd = fd >= 0
        with ring.handing_over():
            ring.queue.set_call(fd)
        self._connect_call(ring)
        return 0

    def _set_vring_err(self, message: Message) -> int:
        ring, fd = self._vring_fd(message)
        with ring.handing_over():
            ring.queue.set_err(fd)
        return 0

    def _vring_kick(self, message: Message) -> int:
        index, _ = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        ring.kicked = True
        self._start_if_ready(ring)
        if ring.running:
            ring.queue.kick()
        return 0

    def _set_backend_req_fd(self, message: Message) -> int:
        if not message.fds:
            raise ProtocolError("no descriptor")
        self._set_channel(message.take_fd())
        self._connect_calls()
        self._connect_shmem()
        return 0

    def _set_channel(self, fd: int | None) -> None:
        if self.channel is not None:
            os.close(self.channel)
        self.channel = fd

    def _connect_calls(self) -> None:
        for ring in self._rings.values():
            self._connect_call(ring)

    def _connect_call(self, ring: Vring) -> None:
        """Where it was agreed on, call the guest by messages on the back-end channel."""
        inband = self._has(ProtocolFeature.INBAND_NOTIFICATIONS)
        if inband and self.channel is not None and not ring.calls_by_fd:
            call = messages.encode(BackendRequest.VRING_CALL, VRING_STATE.pack(ring.index, 0))
            with ring.handing_over():
                ring.queue.set_call(os.dup(self.channel), call)


_R = FrontendRequest
_HANDLERS: Final[dict[int, Callable[[Backend, Message], bytes | int]]] = {
    _R.GET_FEATURES: Backend._get_features,
    _R.SET_FEATURES: Backend._set_features,
    _R.SET_OWNER: Backend._nothing,
    _R.RESET_OWNER: Backend._nothing,
    _R.SET_MEM_TABLE: Backend._set_mem_table,
    _R.SET_VRING_NUM: Backend._set_vring_num,
    _R.SET_VRING_ADDR: Backend._set_vring_addr,
    _R.SET_VRING_BASE: Backend._set_vring_base,
    _R.GET_VRING_BASE: Backend._get_vring_base,
    _R.SET_VRING_KICK: Backend._set_vring_kick,
    _R.SET_VRING_CALL: Backend._set_vring_call,
    _R.SET_VRING_ERR: Backend._set_vring_err,
    _R.GET_PROTOCOL_FEATURES: Backend._get_protocol_features,
    _R.SET_PROTOCOL_FEATURES: Backend._set_protocol_features,
    _R.GET_QUEUE_NUM: Backend._get_queue_num,
    _R.SET_VRING_ENABLE: Backend._set_vring_enable,
    _R.SET_BACKEND_REQ_FD: Backend._set_backend_req_fd,
    _R.GET_CONFIG: Backend._get_config,
    _R.SET_CONFIG: Backend._set_config,
    _R.RESET_DEVICE: Backend._reset_device,
    _R.VRING_KICK: Backend._vring_kick,
    _R.GET_MAX_MEM_SLOTS: Backend._get_max_mem_slots,
    _R.ADD_MEM_REG: Backend._add_mem_reg,
    _R.REM_MEM_REG: Backend._rem_mem_reg,
    _R.GET_SHMEM_CONFIG: Backend._get_shmem_config,
    _R.SET_STATUS: Backend._set_status,
    _R.GET_STATUS: Backend._get_status,
}
