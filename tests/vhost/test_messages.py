import array
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsd.errors import ProtocolError
from vfsd.vhost import messages
from vfsd.vhost.messages import (
    FRONTEND_SHAPES,
    HEADER,
    NEED_REPLY,
    PAYLOAD_MAX,
    REPLY,
    U64,
    VRING_STATE,
    FrontendRequest,
    Message,
    MessageReader,
    PeerClosed,
    Region,
)


class Pipe:
    """A reader and the end it reads from."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.reader = MessageReader(self.theirs, messages.check_frontend_request, messages.frontend_name)

    def write(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds or []))]
        assert self.ours.sendmsg([data], rights if fds else []) == len(data)

    def close(self) -> None:
        self.reader.close()
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def pipe(no_leak: None) -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def eventfds(n: int) -> list[int]:
    return [os.eventfd(0) for _ in range(n)]


def test_a_message_comes_back_as_it_was_sent(pipe: Pipe) -> None:
    payload = VRING_STATE.pack(1, 128)
    pipe.write(messages.encode(FrontendRequest.SET_VRING_NUM, payload, NEED_REPLY))
    assert pipe.reader.read() == Message(8, 1 | NEED_REPLY, payload)
    assert pipe.reader.read() is None


def test_encoding_is_the_one_of_the_specification() -> None:
    call = messages.encode(messages.BackendRequest.VRING_CALL, VRING_STATE.pack(3, 0))
    assert call == bytes.fromhex("04000000 01000000 08000000 03000000 00000000")


def test_descriptors_arrive_closed_on_exec_and_belong_to_the_message(pipe: Pipe) -> None:
    fds = eventfds(8)
    table = messages.encode_mem_table([Region(i << 20, 1 << 20, i << 20, 0) for i in range(8)])
    pipe.write(messages.encode(FrontendRequest.SET_MEM_TABLE, table), fds)
    messages.close_all(fds)
    message = pipe.reader.read()
    assert message is not None
    assert len(message.fds) == 8
    assert not any(os.get_inheritable(fd) for fd in message.fds)
    os.close(message.take_fd())
    message.close()
    message.close()


request_messages = st.sampled_from(sorted(FRONTEND_SHAPES)).flatmap(
    lambda request: st.builds(
        Message,
        st.just(request),
        st.sampled_from([1, 1 | NEED_REPLY]),
        st.binary(
            min_size=FRONTEND_SHAPES[request].payload[0],
            max_size=min(FRONTEND_SHAPES[request].payload[1], 300),
        ),
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(request_messages, min_size=1, max_size=3), st.data())
def test_a_stream_is_read_in_whatever_pieces_it_comes(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(HEADER.pack(m.request, m.flags, len(m.payload)) + m.payload for m in sent)
    cuts = data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=20))
    pipe, received = Pipe(), []
    try:
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(stream)], strict=True):
            pipe.write(stream[start:end])
            while (message := pipe.reader.read()) is not None:
                received.append(message)
    finally:
        pipe.close()
    assert received == sent


def test_a_stream_with_descriptors_is_read_cut_at_every_byte(no_leak: None) -> None:
    parts = [
        (messages.encode(FrontendRequest.SET_VRING_CALL, U64.pack(0)), 1),
        (messages.encode(FrontendRequest.GET_FEATURES), 0),
        (messages.encode(FrontendRequest.SET_VRING_ERR, U64.pack(1)), 1),
    ]
    for cut in range(sum(len(data) for data, _ in parts)):
        pipe, counts = Pipe(), []
        position = 0
        for data, n in parts:
            fds = eventfds(n)
            at = min(max(cut - position, 1), len(data))
            pipe.write(data[:at], fds)  # descriptors come with the first byte
            messages.close_all(fds)
            for piece in (b"", data[at:]):
                if piece:
                    pipe.write(piece)
                while (message := pipe.reader.read()) is not None:
                    counts.append((message.request, len(message.fds)))
                    message.close()
            position += len(data)
        assert counts == [(13, 1), (1, 0), (14, 1)]
        pipe.close()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (HEADER.pack(1, 0, 0), "GET_FEATURES: version 0, not 1"),
        (HEADER.pack(1, 2, 0), "GET_FEATURES: version 2, not 1"),
        (HEADER.pack(8, 1, 4), "SET_VRING_NUM: 4 bytes of payload, not 8"),
        (HEADER.pack(8, 1, 1 << 31), "SET_VRING_NUM: 2147483648 bytes of payload, not 8"),
        (HEADER.pack(5, 1, 300), "SET_MEM_TABLE: 300 bytes of payload, not 8 to 264"),
        (HEADER.pack(99, 1, PAYLOAD_MAX + 1), "message 99: 4097 bytes of payload, not 0 to 4096"),
        (HEADER.pack(1, 1 | REPLY, 0), "GET_FEATURES: a reply where a request belongs"),
    ],
)
def test_a_header_that_cannot_be_is_refused_before_its_payload(pipe: Pipe, data: bytes, text: str) -> None:
    pipe.write(data)
    with pytest.raises(ProtocolError, match=f"^{text}$"):
        pipe.reader.read()


@pytest.mark.parametrize("n", [1, 8, 9, 12])
def test_descriptors_that_do_not_belong_are_refused_and_closed(pipe: Pipe, n: int) -> None:
    fds = eventfds(n)
    pipe.write(messages.encode(FrontendRequest.GET_FEATURES), fds)
    messages.close_all(fds)
    with pytest.raises(ProtocolError, match="descriptors"):
        pipe.reader.read()


def test_an_unknown_message_is_read_with_its_descriptors(pipe: Pipe) -> None:
    fds = eventfds(3)
    pipe.write(messages.encode(1002, b"private"), fds)
    messages.close_all(fds)
    message = pipe.reader.read()
    assert message is not None
    assert (message.request, message.payload, len(message.fds)) == (1002, b"private", 3)
    message.close()


def test_the_end_between_messages_is_no_error(pipe: Pipe) -> None:
    pipe.write(messages.encode(FrontendRequest.GET_FEATURES))
    pipe.ours.shutdown(socket.SHUT_WR)
    assert pipe.reader.read() == Message(1, 1, b"")
    with pytest.raises(PeerClosed):
        pipe.reader.read()


@pytest.mark.parametrize("cut", range(1, 20))
def test_the_end_inside_a_message_is_an_error_and_closes_its_descriptors(pipe: Pipe, cut: int) -> None:
    fds = eventfds(1)
    pipe.write(messages.encode(FrontendRequest.SET_VRING_KICK, U64.pack(0))[:cut], fds)
    messages.close_all(fds)
    pipe.ours.close()
    with pytest.raises(ProtocolError, match="connection closed after"):
        pipe.reader.read()


def test_a_reply_needs_its_flag_and_its_size(pipe: Pipe) -> None:
    reader = MessageReader(pipe.ours, messages.check_frontend_reply, messages.frontend_name)
    messages.send(pipe.theirs, messages.encode(FrontendRequest.GET_FEATURES, U64.pack(7), REPLY))
    assert reader.read() == Message(1, 1 | REPLY, U64.pack(7))
    messages.send(pipe.theirs, messages.encode(FrontendRequest.GET_FEATURES, U64.pack(7)))
    with pytest.raises(ProtocolError, match="without the reply flag"):
        reader.read()


def test_sending_to_one_who_does_not_read_ends(pipe: Pipe) -> None:
    with pytest.raises(ProtocolError, match="does not read"):
        while True:
            messages.send(pipe.ours, bytes(4096), timeout_s=0.01)


def test_sending_waits_for_one_who_reads_late(pipe: Pipe) -> None:
    pipe.theirs.setblocking(True)
    data = os.urandom(1 << 20)
    sender = threading.Thread(target=messages.send, args=(pipe.ours, data))
    sender.start()
    assert pipe.theirs.recv(len(data), socket.MSG_WAITALL) == data
    sender.join()


def test_sending_to_one_who_is_gone(pipe: Pipe) -> None:
    pipe.theirs.close()
    with pytest.raises(PeerClosed):
        messages.send(pipe.ours, messages.encode(FrontendRequest.GET_FEATURES))


def test_a_memory_table_may_have_room_for_more_regions_than_it_has() -> None:
    region = Region(0x1000, 0x2000, 0x7000, 0x400)
    payload = messages.encode_mem_table([region])
    assert messages.decode_mem_table(payload + b"\xff" * 32) == [region]
    with pytest.raises(ProtocolError, match="2 regions take 72"):
        messages.decode_mem_table(messages.MEM_TABLE_HEAD.pack(2) + payload[8:])
    with pytest.raises(ProtocolError, match="9 regions, at most 8"):
        messages.decode_mem_table(messages.MEM_TABLE_HEAD.pack(9) + bytes(288))


def test_every_message_has_a_shape() -> None:
    assert sorted(FRONTEND_SHAPES) == sorted(FrontendRequest) == list(range(1, 45))
    assert sorted(messages.BACKEND_SHAPES) == list(range(1, 11))


def test_shared_memory_sizes_come_back_by_their_region() -> None:
    sizes = {0: 1 << 29, 255: 4096}
    payload = messages.encode_shmem_config(sizes)
    assert len(payload) == 2056 and payload[:8] == b"\2\0\0\0\0\0\0\0"
    assert messages.decode_shmem_config(payload) == sizes
    with pytest.raises(ProtocolError, match="3 shared memory regions, but 2 sizes"):
        messages.decode_shmem_config(b"\3" + payload[1:])
