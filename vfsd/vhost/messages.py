"""vhost-user on the wire: ids, sizes, feature bits, and how one message is read and written.

Source: the vhost-user specification as QEMU 11.1 ships it ("Message Specification"). Numbers are
in native byte order. Descriptors come with the first byte of a message.
"""

import array
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from vfsd.errors import ProtocolError

# Header flags.
VERSION: Final = 0x1
VERSION_MASK: Final = 0x3
REPLY: Final = 0x4
NEED_REPLY: Final = 0x8

FDS_MAX: Final = 8  # per message
PAYLOAD_MAX: Final = 4096  # bytes; the largest known payload is GET_SHMEM_CONFIG's reply, 2056
TABLE_REGIONS_MAX: Final = 8  # SET_MEM_TABLE
CONFIG_MAX: Final = 256  # bytes of config space in one message
SEND_TIMEOUT_S: Final = 1.0  # other front ends wait meanwhile

# The u64 of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR.
VRING_INDEX_MASK: Final = 0xFF
VRING_NO_FD: Final = 0x100

VRING_ADDR_LOG: Final = 0x1  # flags of SET_VRING_ADDR

SHMEM_REGIONS_MAX: Final = 256  # sizes in SHMEM_CONFIG, by shmid
SHMEM_MAP_RW: Final = 0x1  # flags of SHMEM_MAP; without it the region is read-only

HEADER: Final = struct.Struct("=III")  # request, flags, payload bytes
U64: Final = struct.Struct("=Q")
VRING_STATE: Final = struct.Struct("=II")  # index, num
VRING_ADDR: Final = struct.Struct("=IIQQQQ")  # index, flags, desc, used, avail, log
REGION: Final = struct.Struct("=QQQQ")  # gpa, size, uva, mmap offset
MEM_TABLE_HEAD: Final = struct.Struct("=I4x")  # regions
SINGLE_REGION: Final = struct.Struct("=8xQQQQ")
CONFIG_HEAD: Final = struct.Struct("=III")  # offset, size, flags
LOG_BASE: Final = struct.Struct("=QQ")  # size, offset
INFLIGHT: Final = struct.Struct("=QQHH4x")  # mmap size, mmap offset, queues, queue size
DEVICE_STATE: Final = struct.Struct("=II")  # direction, phase
SHMEM_CONFIG: Final = struct.Struct("=I4x256Q")  # regions, sizes
SHMEM_MAP: Final = struct.Struct("=B7xQQQQ")  # shmid, fd offset, shm offset, bytes, flags

for _struct, _size in (
    (HEADER, 12), (VRING_STATE, 8), (VRING_ADDR, 40), (REGION, 32), (MEM_TABLE_HEAD, 8),
    (SINGLE_REGION, 40), (CONFIG_HEAD, 12), (INFLIGHT, 24), (SHMEM_CONFIG, 2056), (SHMEM_MAP, 40),
):  # fmt: skip
    assert _struct.size == _size, (_struct.format, _size)


class FrontendRequest(IntEnum):
    """Messages the front end sends on the main channel."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """Messages the back end sends on the channel of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE = 2
    VRING_HOST_NOTIFIER = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(IntFlag):
    """Bits of GET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22


class VirtioFeature(IntFlag):
    """Bits of GET_FEATURES that a file system device can have."""

    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    RING_RESET = 1 << 40


class Shape(NamedTuple):
    """What one kind of message looks like."""

    payload: tuple[int, int]  # bytes, least and most
    fds: int  # most
    reply: tuple[int, int] | None  # bytes of the reply it always has; None: u64, only if asked for
    feature: ProtocolFeature  # it belongs to; 0: to none


NO_FEATURE: Final = ProtocolFeature(0)


def _shape(
    payload: int | tuple[int, int] = 0,
    reply: int | tuple[int, int] | None = None,
    fds: int = 0,
    feature: ProtocolFeature = NO_FEATURE,
) -> Shape:
    exact = (payload, payload) if isinstance(payload, int) else payload
    return Shape(exact, fds, (reply, reply) if isinstance(reply, int) else reply, feature)


_F, _P = FrontendRequest, ProtocolFeature
_ANY: Final = (0, PAYLOAD_MAX)
_TABLE: Final = (MEM_TABLE_HEAD.size, MEM_TABLE_HEAD.size + TABLE_REGIONS_MAX * REGION.size)
_CONFIG: Final = (CONFIG_HEAD.size, CONFIG_HEAD.size + CONFIG_MAX)

FRONTEND_SHAPES: Final[dict[int, Shape]] = {
    _F.GET_FEATURES: _shape(reply=8),
    _F.SET_FEATURES: _shape(8),
    _F.SET_OWNER: _shape(),
    _F.RESET_OWNER: _shape(),
    _F.SET_MEM_TABLE: _shape(_TABLE, fds=TABLE_REGIONS_MAX),
    _F.SET_LOG_BASE: _shape((8, 16), reply=(8, 16), fds=1, feature=_P.LOG_SHMFD),
    _F.SET_LOG_FD: _shape(fds=1),
    _F.SET_VRING_NUM: _shape(8),
    _F.SET_VRING_ADDR: _shape(40),
    _F.SET_VRING_BASE: _shape(8),
    _F.GET_VRING_BASE: _shape(8, reply=8),
    _F.SET_VRING_KICK: _shape(8, fds=1),
    _F.SET_VRING_CALL: _shape(8, fds=1),
    _F.SET_VRING_ERR: _shape(8, fds=1),
    _F.GET_PROTOCOL_FEATURES: _shape(reply=8),
    _F.SET_PROTOCOL_FEATURES: _shape(8),
    _F.GET_QUEUE_NUM: _shape(reply=8, feature=_P.MQ),
    _F.SET_VRING_ENABLE: _shape(8),
    _F.SEND_RARP: _shape(8, feature=_P.RARP),
    _F.NET_SET_MTU: _shape(8, feature=_P.MTU),
    _F.SET_BACKEND_REQ_FD: _shape(fds=1, feature=_P.BACKEND_REQ),
    _F.IOTLB_MSG: _shape(32, reply=8),
    _F.SET_VRING_ENDIAN: _shape(8, feature=_P.CROSS_ENDIAN),
    _F.GET_CONFIG: _shape(_CONFIG, reply=_CONFIG, feature=_P.CONFIG),
    _F.SET_CONFIG: _shape(_CONFIG, feature=_P.CONFIG),
    _F.CREATE_CRYPTO_SESSION: _shape(_ANY, reply=_ANY, feature=_P.CRYPTO_SESSION),
    _F.CLOSE_CRYPTO_SESSION: _shape(8, feature=_P.CRYPTO_SESSION),
    _F.POSTCOPY_ADVISE: _shape(_ANY, reply=_ANY, feature=_P.PAGEFAULT),
    _F.POSTCOPY_LISTEN: _shape(_ANY, feature=_P.PAGEFAULT),
    _F.POSTCOPY_END: _shape(_ANY, reply=8, feature=_P.PAGEFAULT),
    _F.GET_INFLIGHT_FD: _shape(24, reply=24, feature=_P.INFLIGHT_SHMFD),
    _F.SET_INFLIGHT_FD: _shape(24, fds=1, feature=_P.INFLIGHT_SHMFD),
    _F.GPU_SET_SOCKET: _shape(fds=1),
    _F.RESET_DEVICE: _shape(feature=_P.RESET_DEVICE),
    _F.VRING_KICK: _shape(8, feature=_P.INBAND_NOTIFICATIONS),
    _F.GET_MAX_MEM_SLOTS: _shape(reply=8, feature=_P.CONFIGURE_MEM_SLOTS),
    _F.ADD_MEM_REG: _shape(40, fds=1, feature=_P.CONFIGURE_MEM_SLOTS),
    _F.REM_MEM_REG: _shape(40, fds=1, feature=_P.CONFIGURE_MEM_SLOTS),
    _F.SET_STATUS: _shape(8, feature=_P.STATUS),
    _F.GET_STATUS: _shape(reply=8, feature=_P.STATUS),
    _F.GET_SHARED_OBJECT: _shape(_ANY, reply=_ANY, feature=_P.SHARED_OBJECT),
    _F.SET_DEVICE_STATE_FD: _shape(8, reply=8, fds=1, feature=_P.DEVICE_STATE),
    _F.CHECK_DEVICE_STATE: _shape(reply=8, feature=_P.DEVICE_STATE),
    _F.GET_SHMEM_CONFIG: _shape(reply=2056, feature=_P.SHMEM),
}

BACKEND_SHAPES: Final[dict[int, Shape]] = {
    BackendRequest.IOTLB_MSG: _shape(32),
    BackendRequest.CONFIG_CHANGE: _shape(feature=_P.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER: _shape(24, fds=1, feature=_P.HOST_NOTIFIER),
    BackendRequest.VRING_CALL: _shape(8, feature=_P.INBAND_NOTIFICATIONS),
    BackendRequest.VRING_ERR: _shape(8, feature=_P.INBAND_NOTIFICATIONS),
    BackendRequest.SHARED_OBJECT_ADD: _shape(_ANY, feature=_P.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_REMOVE: _shape(_ANY, feature=_P.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_LOOKUP: _shape(_ANY, feature=_P.SHARED_OBJECT),
    BackendRequest.SHMEM_MAP: _shape(40, fds=1, feature=_P.SHMEM),
    BackendRequest.SHMEM_UNMAP: _shape(40, feature=_P.SHMEM),
}


class Region(NamedTuple):
    """A piece of guest memory as the front end describes it. All in bytes."""

    gpa: int  # guest physical address
    size: int
    uva: int  # address in the front end
    offset: int  # into the descriptor


class VringAddr(NamedTuple):
    """Payload of SET_VRING_ADDR: where the front end has the parts of a ring."""

    queue: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


class ShmemMap(NamedTuple):
    """Payload of SHMEM_MAP and SHMEM_UNMAP, VhostUserMMap. Bytes, multiples of the page size."""

    shmid: int
    fd_offset: int
    shm_offset: int
    size: int
    flags: int  # SHMEM_MAP_RW


class PeerClosed(Exception):
    """The other end closed the connection between two messages."""


class Message:
    """One received message. It owns the descriptors nobody has taken from it."""

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int] | None = None) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = [] if fds is None else fds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def take_fd(self) -> int:
        """The first descriptor, from now on the caller's."""
        return self.fds.pop(0)

    def close(self) -> None:
        """Close the descriptors nobody took. Idempotent."""
        close_all(self.fds)


def close_all(fds: list[int]) -> None:
    """Close every descriptor of the list and empty it."""
    while fds:
        os.close(fds.pop())


# ---- reading


# Raises ProtocolError for a (request, flags, payload bytes, descriptors) that cannot be.
Check = Callable[[int, int, int, int], None]


def frontend_name(request: int) -> str:
    """Name of a message of the main channel, also of one nobody knows."""
    return _F(request).name if request in FRONTEND_SHAPES else f"message {request}"


def backend_name(request: int) -> str:
    """The same for the back-end channel."""
    known = request in BACKEND_SHAPES
    return BackendRequest(request).name if known else f"back-end message {request}"


def _check_size(name: str, size: int, allowed: tuple[int, int]) -> None:
    least, most = allowed
    if not least <= size <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise ProtocolError(f"{name}: {size} bytes of payload, not {wanted}")


def _check_request(name: str, shape: Shape | None, flags: int, size: int, fds: int) -> None:
    if flags & REPLY:
        raise ProtocolError(f"{name}: a reply where a request belongs")
    _check_size(name, size, shape.payload if shape else _ANY)
    if shape and fds > shape.fds:
        raise ProtocolError(f"{name}: {fds} descriptors, at most {shape.fds}")


def check_frontend_request(request: int, flags: int, size: int, fds: int) -> None:
    """Check of what a back end reads from the main channel."""
    _check_request(frontend_name(request), FRONTEND_SHAPES.get(request), flags, size, fds)


def check_backend_request(request: int, flags: int, size: int, fds: int) -> None:
    """Check of what a front end reads from the back-end channel."""
    _check_request(backend_name(request), BACKEND_SHAPES.get(request), flags, size, fds)


def check_frontend_reply(request: int, flags: int, size: int, fds: int) -> None:
    """Check of what a front end reads from the main channel: replies and acknowledgements."""
    name = f"reply to {frontend_name(request)}"
    shape = FRONTEND_SHAPES.get(request)
    if not flags & REPLY:
        raise ProtocolError(f"{name}: without the reply flag")
    _check_size(name, size, shape.reply if shape and shape.reply else (U64.size, U64.size))
    if fds > 1:
        raise ProtocolError(f"{name}: {fds} descriptors, at most 1")


class MessageReader:
    """Reads messages from a stream socket without blocking, in however many pieces they come.

    The socket is set non-blocking and stays the caller's."""

    def __init__(self, sock: socket.socket, check: Check, name: Callable[[int], str]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._check = check
        self._name = name
        self._header: tuple[int, int, int] | None = None
        self._buffer = bytearray()
        self._fds: list[int] = []

    def read(self) -> Message | None:
        """The next whole message, None if the rest of it has not come yet.

        PeerClosed between two messages; ProtocolError for a message that cannot be, or one that
        breaks off, with its descriptors closed: the stream is then of no more use."""
        try:
            return self._read()
        except ProtocolError:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors of a message that is not complete. Idempotent."""
        close_all(self._fds)

    def _read(self) -> Message | None:
        if self._header is None:
            if not self._fill(HEADER.size):
                return None
            self._header = self._checked_header()
            self._buffer.clear()
        request, flags, size = self._header
        if not self._fill(size):
            return None
        message = Message(request, flags, bytes(self._buffer), self._fds)
        self._header, self._fds = None, []
        self._buffer.clear()
        return message

    def _checked_header(self) -> tuple[int, int, int]:
        request, flags, size = HEADER.unpack(self._buffer)
        if flags & VERSION_MASK != VERSION:
            raise ProtocolError(f"{self._name(request)}: version {flags & VERSION_MASK}, not {VERSION}")
        self._check(request, flags, size, len(self._fds))
        return request, flags, size

    def _fill(self, wanted: int) -> bool:
        """Whether the buffer holds `wanted` bytes."""
        while len(self._buffer) < wanted:
            try:
                data = self._receive(wanted - len(self._buffer))
            except BlockingIOError:
                return False
            except ConnectionResetError:
                data = b""
            if not data:
                self._end_of_stream()
            self._buffer += data
        return True

    def _receive(self, most: int) -> bytes:
        # Without room for them the kernel drops descriptors that come later than the first byte.
        if self._header is not None or self._buffer:
            return self._sock.recv(most)
        data, ancillary, flags, _ = self._sock.recvmsg(
            most, socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
                self._fds += fds
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(
                f"message with more than {FDS_MAX} descriptors, or more than can be opened here"
            )
        return data

    def _end_of_stream(self) -> None:
        if self._header is not None:
            request, _, size = self._header
            raise ProtocolError(
                f"{self._name(request)}: connection closed after {len(self._buffer)} of {size} "
                "bytes of payload"
            )
        if self._buffer:
            raise ProtocolError(f"connection closed after {len(self._buffer)} bytes of a header")
        raise PeerClosed


# ---- writing


def encode(request: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """A whole message; the version is added to `flags`."""
    return HEADER.pack(request, flags | VERSION, len(payload)) + payload


def send(
    sock: socket.socket, data: bytes, fds: Sequence[int] = (), timeout_s: float = SEND_TIMEOUT_S
) -> None:
    """Write a whole message to a blocking or non-blocking socket. Descriptors stay the caller's.

    PeerClosed when nobody can read it; ProtocolError when nobody does for `timeout_s`."""
    ancillary: Iterable[tuple[int, int, array.array[int]]] = ()
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    deadline = time.monotonic() + timeout_s
    view = memoryview(data)
    while view:
        try:
            sent = sock.sendmsg([view], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            if not wait(sock, select.POLLOUT, deadline):
                raise ProtocolError(f"the other end does not read for {timeout_s:g} s") from None
        except (BrokenPipeError, ConnectionResetError):
            raise PeerClosed from None
        else:
            view, ancillary = view[sent:], ()


def wait(sock: socket.socket, events: int, deadline: float) -> bool:
    """Whether one of the poll(2) events came before the monotonic time `deadline`."""
    poll = select.poll()
    poll.register(sock, events)
    left_ms = (deadline - time.monotonic()) * 1000
    return bool(poll.poll(max(left_ms, 0)))


def encode_mem_table(regions: Sequence[Region]) -> bytes:
    """Payload of SET_MEM_TABLE."""
    return MEM_TABLE_HEAD.pack(len(regions)) + b"".join(REGION.pack(*r) for r in regions)


def encode_shmem_config(sizes: Mapping[int, int]) -> bytes:
    """Reply to GET_SHMEM_CONFIG: bytes by shmid."""
    all_sizes = [sizes.get(shmid, 0) for shmid in range(SHMEM_REGIONS_MAX)]
    return SHMEM_CONFIG.pack(sum(size > 0 for size in all_sizes), *all_sizes)


def decode_shmem_config(payload: bytes) -> dict[int, int]:
    """Bytes by shmid, of the regions there are."""
    regions, *sizes = SHMEM_CONFIG.unpack(payload)
    found = {shmid: size for shmid, size in enumerate(sizes) if size}
    if regions != len(found):
        raise ProtocolError(f"{regions} shared memory regions, but {len(found)} sizes")
    return found


def decode_mem_table(payload: bytes) -> list[Region]:
    """Regions of SET_MEM_TABLE. User-mode Linux 6.1 sends room for one more region than it has."""
    (n,) = MEM_TABLE_HEAD.unpack_from(payload)
    if n > TABLE_REGIONS_MAX:
        raise ProtocolError(f"{n} regions, at most {TABLE_REGIONS_MAX}")
    size = MEM_TABLE_HEAD.size + n * REGION.size
    if len(payload) < size:
        raise ProtocolError(f"{len(payload)} bytes of payload, {n} regions take {size}")
    return [Region(*fields) for fields in REGION.iter_unpack(payload[MEM_TABLE_HEAD.size : size])]
