"""The orders in which known front ends send their messages, as tables.

`vfsd.vhost.frontend` plays them. Seen on the wire with QEMU 11.1 and user-mode Linux, read in
the sources of the others (2026).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vfsd.vhost.messages import NO_FEATURE, FrontendRequest, ProtocolFeature


@dataclass(frozen=True)
class Step:
    """One message of an order."""

    request: FrontendRequest
    ack: bool = False  # ask for an acknowledgement, if REPLY_ACK was negotiated
    value: int = 1  # of SET_VRING_ENABLE
    needs: ProtocolFeature = NO_FEATURE  # sent only if negotiated
    unless: ProtocolFeature = NO_FEATURE  # sent only if not negotiated


@dataclass(frozen=True)
class Each:
    """Messages sent for one queue after the other."""

    steps: tuple[Step, ...]
    backwards: bool = False


Steps = tuple[Step | Each, ...]


@dataclass(frozen=True)
class Order:
    """How one front end talks: once per connection, then start and stop in turns."""

    wants: ProtocolFeature  # what it negotiates if offered
    connect: Steps
    start: Steps
    stop: Steps
    config_sizes: Sequence[int] = (40,)  # bytes GET_CONFIG asks for, always from the start


_F, _P = FrontendRequest, ProtocolFeature
_ENABLE, _DISABLE = Step(_F.SET_VRING_ENABLE), Step(_F.SET_VRING_ENABLE, value=0)
_CHANNEL: Final = Step(_F.SET_BACKEND_REQ_FD, needs=_P.BACKEND_REQ)
_QUEUES: Final = Step(_F.GET_QUEUE_NUM, needs=_P.MQ)
_WINDOW: Final = Step(_F.GET_SHMEM_CONFIG, needs=_P.SHMEM)
_FEATURES: Final = (
    Step(_F.GET_FEATURES),
    Step(_F.GET_PROTOCOL_FEATURES),
    Step(_F.SET_PROTOCOL_FEATURES),
)
_STOP: Final = (Each((_DISABLE,)), Each((Step(_F.GET_VRING_BASE),)))


_QEMU_WANTS: Final = (
    _P.MQ | _P.REPLY_ACK | _P.BACKEND_REQ | _P.BACKEND_SEND_FD | _P.CONFIGURE_MEM_SLOTS | _P.STATUS
)  # fmt: skip
_QEMU_CALL: Final = Each((Step(_F.SET_VRING_CALL),))
_QEMU_CONNECT: Final = (
    *_FEATURES,
    _QUEUES,
    Step(_F.GET_MAX_MEM_SLOTS, needs=_P.CONFIGURE_MEM_SLOTS),
    Step(_F.SET_BACKEND_REQ_FD, ack=True, needs=_P.BACKEND_REQ),
    Step(_F.SET_OWNER),
    Step(_F.GET_FEATURES),
    Each((Step(_F.SET_VRING_CALL, ack=True), Step(_F.SET_VRING_ERR, ack=True))),
)
_QEMU_MEMORY: Final = (
    Step(_F.SET_FEATURES),
    Step(_F.GET_STATUS, needs=_P.STATUS),
    Step(_F.SET_STATUS, needs=_P.STATUS),
    Step(_F.ADD_MEM_REG, ack=True, needs=_P.CONFIGURE_MEM_SLOTS),
    Step(_F.SET_MEM_TABLE, ack=True, unless=_P.CONFIGURE_MEM_SLOTS),
)
_QEMU_RING: Final = (
    Step(_F.SET_VRING_NUM),
    Step(_F.SET_VRING_BASE),
    Step(_F.SET_VRING_ADDR),
    Step(_F.SET_VRING_KICK, ack=True),
)
_QEMU_ENABLE: Final = Each((Step(_F.SET_VRING_ENABLE, ack=True),))


def _qemu() -> Order:
    """QEMU 11.1, vhost-user-fs-pci."""
    reset = Step(_F.RESET_DEVICE, needs=_P.RESET_DEVICE)
    return Order(
        wants=_QEMU_WANTS | _P.RESET_DEVICE,
        connect=(*_QEMU_CONNECT, reset),
        start=(_QEMU_CALL, *_QEMU_MEMORY, Each(_QEMU_RING), _QEMU_ENABLE, _QEMU_CALL),
        stop=(*_STOP, _QEMU_CALL, reset),
    )


def _qemu_generic() -> Order:
    """QEMU 11.1, vhost-user-test-device-pci: the config space and the DAX window are the daemon's."""
    return Order(
        wants=_QEMU_WANTS | _P.CONFIG | _P.SHMEM,
        connect=(*_QEMU_CONNECT, _WINDOW),
        start=(
            Step(_F.GET_CONFIG, needs=_P.CONFIG),
            *_QEMU_MEMORY,
            Each((*_QEMU_RING, Step(_F.SET_VRING_CALL))),
            _QEMU_ENABLE,
            _QEMU_CALL,
        ),
        stop=(*_STOP, _QEMU_CALL),
        config_sizes=(40,) * 37,  # all of it for each byte of the tag, and for the number of queues
    )


def _uml() -> Order:
    """User-mode Linux: every message asks for an acknowledgement once that is negotiated.

    In-band, 6.1 names no call descriptors; later ones send SET_VRING_CALL without one."""
    inband = _P.INBAND_NOTIFICATIONS
    return Order(
        wants=_P.MQ | _P.REPLY_ACK | _P.BACKEND_REQ | _P.CONFIG | inband,
        connect=(
            Step(_F.SET_OWNER),
            Step(_F.GET_FEATURES),
            Step(_F.GET_PROTOCOL_FEATURES),
            Step(_F.SET_PROTOCOL_FEATURES, ack=True),
            Step(_F.SET_BACKEND_REQ_FD, ack=True, needs=_P.BACKEND_REQ),
            _QUEUES,
        ),
        start=(
            Step(_F.SET_FEATURES, ack=True),
            Step(_F.GET_CONFIG, needs=_P.CONFIG),
            Step(_F.SET_MEM_TABLE, ack=True),
            Each(
                (
                    Step(_F.SET_VRING_CALL, ack=True, unless=inband),
                    Step(_F.SET_VRING_NUM, ack=True),
                    Step(_F.SET_VRING_BASE, ack=True),
                    Step(_F.SET_VRING_ADDR, ack=True),
                )
            ),
            Each(
                (
                    Step(_F.SET_VRING_KICK, ack=True, unless=inband),
                    Step(_F.SET_VRING_ENABLE, ack=True),
                )
            ),
        ),
        stop=(
            Each((Step(_F.SET_VRING_ENABLE, ack=True, value=0),), backwards=True),
            Step(_F.GET_FEATURES),
        ),
        config_sizes=(*range(1, 37), 40),  # the tag byte by byte, then the number of queues
    )


ORDERS: Final[dict[str, Order]] = {
    "qemu": _qemu(),
    "qemu-generic": _qemu_generic(),
    "cloud-hypervisor": Order(
        wants=_P.MQ | _P.CONFIGURE_MEM_SLOTS | _P.REPLY_ACK | _P.BACKEND_REQ,
        connect=(Step(_F.SET_OWNER), *_FEATURES, _QUEUES),
        start=(
            Step(_F.SET_FEATURES),
            Step(_F.SET_MEM_TABLE),
            Each((Step(_F.SET_VRING_NUM),)),
            Each(
                (
                    Step(_F.SET_VRING_ADDR),
                    Step(_F.SET_VRING_BASE),
                    Step(_F.SET_VRING_CALL),
                    Step(_F.SET_VRING_KICK),
                )
            ),
            Each((_ENABLE,)),
            _CHANNEL,
        ),
        stop=_STOP,
    ),
    "crosvm": Order(
        wants=_P.MQ | _P.CONFIG | _P.BACKEND_REQ | _P.REPLY_ACK | _P.SHMEM,
        connect=(Step(_F.SET_OWNER), *_FEATURES, _CHANNEL, _QUEUES, _WINDOW),
        start=(
            Step(_F.GET_CONFIG, needs=_P.CONFIG),
            Step(_F.SET_FEATURES),
            Step(_F.SET_MEM_TABLE),
            Each(
                (
                    Step(_F.SET_VRING_NUM),
                    Step(_F.SET_VRING_ADDR),
                    Step(_F.SET_VRING_BASE),
                    Step(_F.SET_VRING_CALL),
                    Step(_F.SET_VRING_KICK),
                    _ENABLE,
                )
            ),
        ),
        stop=_STOP,
    ),
    "uml": _uml(),
    "libkrun": Order(
        wants=_P.MQ | _P.CONFIG,
        connect=(*_FEATURES, _QUEUES, Step(_F.SET_OWNER)),
        start=(
            Step(_F.SET_MEM_TABLE),
            Step(_F.SET_FEATURES),
            Each(
                (
                    Step(_F.SET_VRING_NUM),
                    Step(_F.SET_VRING_BASE),
                    Step(_F.SET_VRING_ADDR),
                    Step(_F.SET_VRING_KICK),
                    Step(_F.SET_VRING_CALL),
                    _ENABLE,
                )
            ),
        ),
        stop=_STOP,
    ),
}
