"""What a front end has said so far, as far as the next back end must hear it again."""

from collections.abc import Iterator

from vfsd.vhost import messages
from vfsd.vhost.messages import (
    NEED_REPLY,
    SINGLE_REGION,
    U64,
    VRING_ADDR,
    VRING_INDEX_MASK,
    VRING_STATE,
    FrontendRequest,
    Message,
)

_R = FrontendRequest

# Said for the connection, and for each ring: the last one counts. In the order in which they are said again;
# a ring starts with its last.
OF_THE_CONNECTION = (
    _R.SET_OWNER,
    _R.SET_FEATURES,
    _R.SET_PROTOCOL_FEATURES,
    _R.SET_BACKEND_REQ_FD,
    _R.SET_STATUS,
    _R.SET_MEM_TABLE,
)
OF_A_RING = (
    _R.SET_VRING_NUM,
    _R.SET_VRING_BASE,
    _R.SET_VRING_ADDR,
    _R.SET_VRING_CALL,
    _R.SET_VRING_ERR,
    _R.SET_VRING_KICK,
    _R.SET_VRING_ENABLE,
)
# What RESET_DEVICE leaves of a ring.
AFTER_RESET = (_R.SET_VRING_CALL, _R.SET_VRING_ERR)
BY_WORD = (_R.SET_VRING_CALL, _R.SET_VRING_ERR, _R.SET_VRING_KICK)


def ring_of(message: Message) -> int:
    """The index of the ring that a message of OF_A_RING is about."""
    if message.request in BY_WORD:
        return int(U64.unpack(message.payload)[0] & VRING_INDEX_MASK)
    layout = VRING_ADDR if message.request == _R.SET_VRING_ADDR else VRING_STATE
    return int(layout.unpack(message.payload)[0])


class Conversation:
    """It owns the descriptors of what it keeps."""

    def __init__(self) -> None:
        self._connection: dict[int, Message] = {}
        self._rings: dict[int, dict[int, Message]] = {}
        self._regions: list[Message] = []  # ADD_MEM_REG since the last SET_MEM_TABLE

    def heard(self, message: Message) -> None:
        """One of the front end's messages, whole and of a right size. It is this object's from now on."""
        request = message.request
        if request == _R.SET_MEM_TABLE:
            self._drop_regions()
        if request in OF_THE_CONNECTION:
            self._replace(self._connection, message)
        elif request in OF_A_RING:
            self._replace(self._rings.setdefault(ring_of(message), {}), message)
        elif request == _R.ADD_MEM_REG:
            self._regions.append(message)
        elif request == _R.REM_MEM_REG:
            self._remove_region(message)
        else:
            message.close()
        if request == _R.RESET_DEVICE or (
            request == _R.SET_STATUS and U64.unpack(message.payload)[0] == 0
        ):
            self._reset()

    def stopped(self, reply: bytes) -> None:
        """GET_VRING_BASE was answered so: that ring waits for its next kick descriptor."""
        index, base = VRING_STATE.unpack(reply)
        ring = self._rings.setdefault(index, {})
        self._replace(ring, Message(_R.SET_VRING_BASE, 0, VRING_STATE.pack(index, base), []))
        if _R.SET_VRING_KICK in ring:
            ring.pop(_R.SET_VRING_KICK).close()

    def again(self, next_avail: dict[int, int]) -> Iterator[tuple[bytes, list[int]]]:
        """Whole messages, none of which asks for an answer, and their descriptors, which stay this object's.

        next_avail: of the rings that a back end has served, where it was.
        """
        said = [self._connection[request] for request in OF_THE_CONNECTION if request in self._connection]
        for message in [*said, *self._regions]:
            yield self._again(message, message.payload)
        for index, ring in self._rings.items():
            for request in OF_A_RING:
                if request not in ring:
                    continue
                payload = ring[request].payload
                if request == _R.SET_VRING_BASE and index in next_avail:
                    payload = VRING_STATE.pack(index, next_avail[index])
                yield self._again(ring[request], payload)

    def rings(self) -> list[int]:
        return list(self._rings)

    def descriptors(self) -> set[int]:
        rings = [message for ring in self._rings.values() for message in ring.values()]
        return {fd for m in (*self._connection.values(), *rings, *self._regions) for fd in m.fds}

    @staticmethod
    def _again(message: Message, payload: bytes) -> tuple[bytes, list[int]]:
        flags = message.flags & ~(NEED_REPLY | messages.VERSION_MASK)
        return messages.encode(message.request, payload, flags), message.fds

    @staticmethod
    def _replace(where: dict[int, Message], message: Message) -> None:
        if message.request in where:
            where[message.request].close()
        where[message.request] = message

    def _drop_regions(self) -> None:
        while self._regions:
            self._regions.pop().close()

    def _remove_region(self, message: Message) -> None:
        """By address and size; what is in no list of ours was in the table of SET_MEM_TABLE."""
        gone = SINGLE_REGION.unpack(message.payload)[:4]
        for region in self._regions:
            if SINGLE_REGION.unpack(region.payload)[:4] == gone:
                self._regions.remove(region)
                region.close()
                break
        message.close()

    def _reset(self) -> None:
        for ring in self._rings.values():
            for request in [request for request in ring if request not in AFTER_RESET]:
                ring.pop(request).close()
