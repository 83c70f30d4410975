"""The driver side of a vhost-user connection: every message, and the orders of known front ends.

The messages are methods of `Frontend`. What QEMU, cloud-hypervisor, crosvm, user-mode Linux and
libkrun send, in which order, is in `vfsd.vhost.orders`; `handshake`, `start` and `stop` play it.
"""

import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from vfsd.errors import ProtocolError
from vfsd.vhost import messages
from vfsd.vhost.messages import (
    CONFIG_HEAD,
    NEED_REPLY,
    REPLY,
    SINGLE_REGION,
    TABLE_REGIONS_MAX,
    U64,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    FrontendRequest,
    Message,
    MessageReader,
    PeerClosed,
    ProtocolFeature,
    Region,
    VirtioFeature,
)
from vfsd.vhost.orders import ORDERS, Order, Step, Steps

STATUS_FEATURES_OK: Final = 8


class RequestRefused(Exception):
    """The back end answered a request for acknowledgement with something else than 0."""

    def __init__(self, request: int, code: int) -> None:
        super().__init__(f"{messages.frontend_name(request)}: refused with {code}")
        self.code = code


class TooFewQueues(Exception):
    """The back end has fewer queues than the driver wants to set up."""


@dataclass(frozen=True)
class SharedRegion:
    """Guest memory and the descriptor it can be mapped from. The descriptor stays the caller's."""

    region: Region
    fd: int


@dataclass(frozen=True)
class Vring:
    """One virtqueue. Addresses are user addresses, as in Region.uva; descriptors stay the
    caller's, None is sent as "no descriptor" (in-band, or no notification at all)."""

    index: int
    num: int
    desc: int
    avail: int
    used: int
    kick: int | None = None
    call: int | None = None
    err: int | None = None
    base: int = 0  # next available index
    log: int = 0  # guest address of the used ring, for the dirty log


@dataclass(frozen=True)
class Setup:
    """What a driver brings along when it plays the order of a front end."""

    memory: Sequence[SharedRegion] = ()
    vrings: Sequence[Vring] = ()
    features: VirtioFeature | None = None  # it takes of the offered ones; None: all
    without: ProtocolFeature = messages.NO_FEATURE  # it does not take, though the front end would


_F = FrontendRequest


class Frontend:
    """The driver side of one connection. It owns the socket and the back-end channel.

    Every method that waits raises TimeoutError after `timeout_s`, PeerClosed when the back end
    closed the connection and ProtocolError when its answer cannot be; with `ack`, and REPLY_ACK
    negotiated, it waits for the acknowledgement and raises RequestRefused if it is not 0."""

    def __init__(self, sock: socket.socket, timeout_s: float = 10.0) -> None:
        self.timeout_s = timeout_s
        self.offered = VirtioFeature(0)  # last answer of GET_FEATURES
        self.offered_protocol = ProtocolFeature(0)
        self.features = VirtioFeature(0)  # as set
        self.protocol_features = ProtocolFeature(0)
        self.queues_max = 1
        self.slots_max = TABLE_REGIONS_MAX
        self.bases: dict[int, int] = {}  # answers of GET_VRING_BASE
        self.config = b""  # what GET_CONFIG read last
        self._sock = sock
        self._reader = MessageReader(sock, messages.check_frontend_reply, messages.frontend_name)
        self.shmem: dict[int, int] = {}  # bytes by shmid: what GET_SHMEM_CONFIG read
        self.channel: socket.socket | None = None  # our end, to wait on; read_channel reads it
        # What to answer to a request of the back end: 0, or an error. Called by serve_channel.
        self.on_request: Callable[[Message], int] | None = None
        self._channel_reader: MessageReader | None = None
        self._channel_lock = threading.Lock()
        self._regions: list[Region] = []  # the back end has

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and the channel. Idempotent."""
        self._reader.close()
        self._sock.close()
        self._close_channel()

    # ---- whole orders

    def handshake(self, order: str, setup: Setup) -> None:
        """What the front end `order` (a key of ORDERS) sends when it connects. QEMU sends the
        call descriptors of the vrings already here."""
        self._play(ORDERS[order], ORDERS[order].connect, setup)

    def start(self, order: str, setup: Setup) -> None:
        """What it sends when the guest's driver is ready."""
        self._play(ORDERS[order], ORDERS[order].start, setup)

    def stop(self, order: str, setup: Setup) -> None:
        """What it sends when the driver stops. `bases` has the indexes to go on from."""
        self._play(ORDERS[order], ORDERS[order].stop, setup)

    def _play(self, order: Order, steps: Steps, setup: Setup) -> None:
        for step in steps:
            if isinstance(step, Step):
                if self._applies(step):
                    self._send(step, order, setup)
                continue
            for vring in reversed(setup.vrings) if step.backwards else setup.vrings:
                for one in step.steps:
                    if self._applies(one):
                        self._send_vring(one, vring)

    def _applies(self, step: Step) -> bool:
        return step.needs in self.protocol_features and not step.unless & self.protocol_features

    def _send(self, step: Step, order: Order, setup: Setup) -> None:
        match step.request:
            case _F.GET_FEATURES:
                self.get_features()
            case _F.SET_FEATURES:
                takes = self.offered if setup.features is None else setup.features
                self.set_features(takes & self.offered, step.ack)
            case _F.GET_PROTOCOL_FEATURES:
                self.get_protocol_features()
            case _F.SET_PROTOCOL_FEATURES:
                wants = order.wants & self.offered_protocol & ~setup.without
                self.set_protocol_features(wants, step.ack)
            case _F.GET_QUEUE_NUM:
                if self.get_queue_num() < len(setup.vrings):
                    raise TooFewQueues(f"{self.queues_max} queues, not {len(setup.vrings)}")
            case _F.GET_MAX_MEM_SLOTS:
                self.get_max_mem_slots()
            case _F.GET_CONFIG:
                for size in order.config_sizes:
                    self.get_config(0, size)
            case _F.GET_SHMEM_CONFIG:
                self.get_shmem_config()
            case _F.GET_STATUS:
                self.get_status()
            case _F.SET_STATUS:
                self.set_status(STATUS_FEATURES_OK, step.ack)
            case _F.SET_MEM_TABLE:
                self.set_mem_table(setup.memory, step.ack)
            case _F.ADD_MEM_REG:
                self.change_memory(setup.memory, step.ack)
            case _F.SET_BACKEND_REQ_FD:
                self.open_channel(step.ack)
            case _F.SET_OWNER:
                self.set_owner(step.ack)
            case _F.RESET_DEVICE:
                self.reset_device(step.ack)
            case _:
                raise AssertionError(step)

    def _send_vring(self, step: Step, vring: Vring) -> None:
        match step.request:
            case _F.SET_VRING_NUM:
                self.set_vring_num(vring.index, vring.num, step.ack)
            case _F.SET_VRING_BASE:
                self.set_vring_base(vring.index, vring.base, step.ack)
            case _F.SET_VRING_ADDR:
                self.set_vring_addr(vring, step.ack)
            case _F.SET_VRING_KICK:
                self.set_vring_kick(vring.index, vring.kick, step.ack)
            case _F.SET_VRING_CALL:
                self.set_vring_call(vring.index, vring.call, step.ack)
            case _F.SET_VRING_ERR:
                self.set_vring_err(vring.index, vring.err, step.ack)
            case _F.SET_VRING_ENABLE:
                self.set_vring_enable(vring.index, bool(step.value), step.ack)
            case _F.GET_VRING_BASE:
                self.bases[vring.index] = self.get_vring_base(vring.index)
            case _:
                raise AssertionError(step)

    # ---- features, status, configuration

    def get_features(self) -> VirtioFeature:
        self.offered = VirtioFeature(self._ask_u64(_F.GET_FEATURES))
        return self.offered

    def set_features(self, features: int, ack: bool = False) -> None:
        self.features = VirtioFeature(features)
        self._tell(_F.SET_FEATURES, U64.pack(features), ack)

    def get_protocol_features(self) -> ProtocolFeature:
        self.offered_protocol = ProtocolFeature(self._ask_u64(_F.GET_PROTOCOL_FEATURES))
        return self.offered_protocol

    def set_protocol_features(self, features: int, ack: bool = False) -> None:
        """With REPLY_ACK among them, this message can already ask for an acknowledgement."""
        self.protocol_features = ProtocolFeature(features)
        self._tell(_F.SET_PROTOCOL_FEATURES, U64.pack(features), ack)

    def get_queue_num(self) -> int:
        self.queues_max = self._ask_u64(_F.GET_QUEUE_NUM)
        return self.queues_max

    def set_owner(self, ack: bool = False) -> None:
        self._tell(_F.SET_OWNER, ack=ack)

    def reset_device(self, ack: bool = False) -> None:
        self._tell(_F.RESET_DEVICE, ack=ack)

    def get_status(self) -> int:
        return self._ask_u64(_F.GET_STATUS)

    def set_status(self, status: int, ack: bool = False) -> None:
        self._tell(_F.SET_STATUS, U64.pack(status), ack)

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space. RequestRefused when there are fewer."""
        head = CONFIG_HEAD.pack(offset, size, 0)
        payload = self._ask(_F.GET_CONFIG, head + bytes(size))
        if len(payload) != CONFIG_HEAD.size + size:
            raise RequestRefused(_F.GET_CONFIG, len(payload) - CONFIG_HEAD.size)
        self.config = payload[CONFIG_HEAD.size :]
        return self.config

    def get_shmem_config(self) -> dict[int, int]:
        """Shared memory regions the back end has: bytes by shmid."""
        self.shmem = messages.decode_shmem_config(self._ask(_F.GET_SHMEM_CONFIG))
        return self.shmem

    # ---- memory

    def set_mem_table(self, memory: Sequence[SharedRegion], ack: bool = False) -> None:
        """At most 8 regions; they replace all others."""
        payload = messages.encode_mem_table([shared.region for shared in memory])
        self._tell(_F.SET_MEM_TABLE, payload, ack, [shared.fd for shared in memory])
        self._regions = [shared.region for shared in memory]

    def get_max_mem_slots(self) -> int:
        self.slots_max = self._ask_u64(_F.GET_MAX_MEM_SLOTS)
        return self.slots_max

    def add_mem_reg(self, shared: SharedRegion, ack: bool = False) -> None:
        self._tell(_F.ADD_MEM_REG, SINGLE_REGION.pack(*shared.region), ack, [shared.fd])
        self._regions.append(shared.region)

    def rem_mem_reg(self, region: Region, ack: bool = False) -> None:
        self._tell(_F.REM_MEM_REG, SINGLE_REGION.pack(*region), ack)
        self._regions.remove(region)

    def change_memory(self, memory: Sequence[SharedRegion], ack: bool = False) -> None:
        """Make `memory` the regions of the back end with single removals and additions."""
        wanted = [shared.region for shared in memory]
        for region in [old for old in self._regions if old not in wanted]:
            self.rem_mem_reg(region, ack)
        for shared in memory:
            if shared.region not in self._regions:
                self.add_mem_reg(shared, ack)

    # ---- rings

    def set_vring_num(self, index: int, num: int, ack: bool = False) -> None:
        self._tell(_F.SET_VRING_NUM, VRING_STATE.pack(index, num), ack)

    def set_vring_base(self, index: int, base: int, ack: bool = False) -> None:
        self._tell(_F.SET_VRING_BASE, VRING_STATE.pack(index, base), ack)

    def get_vring_base(self, index: int) -> int:
        """Stop the ring; the next available index."""
        payload = self._ask(_F.GET_VRING_BASE, VRING_STATE.pack(index, 0))
        answered, base = VRING_STATE.unpack(payload)
        if answered != index:
            raise ProtocolError(f"GET_VRING_BASE: answer for queue {answered}, not {index}")
        return int(base)

    def set_vring_addr(self, vring: Vring, ack: bool = False) -> None:
        payload = VRING_ADDR.pack(vring.index, 0, vring.desc, vring.used, vring.avail, vring.log)
        self._tell(_F.SET_VRING_ADDR, payload, ack)

    def set_vring_enable(self, index: int, enable: bool, ack: bool = False) -> None:
        self._tell(_F.SET_VRING_ENABLE, VRING_STATE.pack(index, enable), ack)

    def set_vring_kick(self, index: int, fd: int | None, ack: bool = False) -> None:
        self._set_vring_fd(_F.SET_VRING_KICK, index, fd, ack)

    def set_vring_call(self, index: int, fd: int | None, ack: bool = False) -> None:
        self._set_vring_fd(_F.SET_VRING_CALL, index, fd, ack)

    def set_vring_err(self, index: int, fd: int | None, ack: bool = False) -> None:
        self._set_vring_fd(_F.SET_VRING_ERR, index, fd, ack)

    def _set_vring_fd(self, request: int, index: int, fd: int | None, ack: bool) -> None:
        if fd is None:
            self._tell(request, U64.pack(index | VRING_NO_FD), ack)
        else:
            self._tell(request, U64.pack(index), ack, [fd])

    def vring_kick(self, index: int) -> None:
        """Kick in-band."""
        self._tell(_F.VRING_KICK, VRING_STATE.pack(index, 0))

    # ---- the back-end channel

    def open_channel(self, ack: bool = False) -> socket.socket:
        """SET_BACKEND_REQ_FD with one end of a new pair; `channel` is the other one."""
        ours, theirs = socket.socketpair()
        self._close_channel()
        self.channel = ours
        self._channel_reader = MessageReader(ours, messages.check_backend_request, messages.backend_name)
        with theirs:
            self._tell(_F.SET_BACKEND_REQ_FD, ack=ack, fds=[theirs.fileno()])
        return ours

    def _close_channel(self) -> None:
        if self.channel is not None and self._channel_reader is not None:
            self._channel_reader.close()
            self.channel.close()

    def read_channel(self) -> Message | None:
        """The next request of the back end, None if there is none now. The caller closes it."""
        return None if self._channel_reader is None else self._channel_reader.read()

    def serve_channel(self) -> None:
        """Answer what the back end has asked, by `on_request`. Any thread may, also while another
        waits for a reply: the back end can wait for this answer before it gives that one."""
        with self._channel_lock:
            while self.on_request is not None and (message := self.read_channel()) is not None:
                try:
                    code = self.on_request(message)
                finally:
                    message.close()
                if message.flags & NEED_REPLY and self.channel is not None:
                    data = messages.encode(message.request, U64.pack(code), REPLY)
                    messages.send(self.channel, data, (), self.timeout_s)

    # ---- request and reply

    def _tell(self, request: int, payload: bytes = b"", ack: bool = False, fds: Sequence[int] = ()) -> None:
        ack = ack and ProtocolFeature.REPLY_ACK in self.protocol_features
        data = messages.encode(request, payload, NEED_REPLY if ack else 0)
        messages.send(self._sock, data, fds, self.timeout_s)
        if ack:
            (code,) = U64.unpack(self._reply(request))
            if code:
                raise RequestRefused(request, code)

    def _ask(self, request: int, payload: bytes = b"") -> bytes:
        messages.send(self._sock, messages.encode(request, payload), (), self.timeout_s)
        return self._reply(request)

    def _ask_u64(self, request: int) -> int:
        return int(U64.unpack(self._ask(request))[0])

    def _reply(self, request: int) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        while (message := self._reader.read()) is None:
            if not self._wait(deadline):
                raise TimeoutError(f"{messages.frontend_name(request)}: no reply for {self.timeout_s:g} s")
        message.close()
        if message.request != request:
            raise ProtocolError(
                f"{messages.frontend_name(request)}: a reply to "
                f"{messages.frontend_name(message.request)} instead"
            )
        return message.payload

    def _wait(self, deadline: float) -> bool:
        """Until there is something to read, with the back end's requests answered meanwhile."""
        if self.channel is None or self.on_request is None:
            return messages.wait(self._sock, select.POLLIN, deadline)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self.channel, select.POLLIN)
        ready = dict(poll.poll(max(deadline - time.monotonic(), 0) * 1000))
        if self.channel.fileno() in ready and self._sock.fileno() not in ready:
            try:
                self.serve_channel()
            except PeerClosed:
                # The main channel will say so too.
                return messages.wait(self._sock, select.POLLIN, deadline)
        return bool(ready)
