"""The state machine of a connection, one message at a time, with queues that only record."""

import itertools
import os
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsd.errors import ProtocolError
from vfsd.vhost import messages
from vfsd.vhost.backend import FEATURES, MESSAGES_PER_CALL
from vfsd.vhost.frontend import RequestRefused
from vfsd.vhost.memory import SLOTS_MAX
from vfsd.vhost.messages import (
    CONFIG_HEAD,
    NEED_REPLY,
    SINGLE_REGION,
    U64,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    ProtocolFeature,
    Region,
    VirtioFeature,
)
from vfsd.vhost.messages import FrontendRequest as F

from .peers import Guest, Link, RecordingDevice

EVENT_IDX = VirtioFeature.VERSION_1 | VirtioFeature.EVENT_IDX
WITH_ENABLE = EVENT_IDX | VirtioFeature.PROTOCOL_FEATURES


class Driver:
    """Sends the messages that bring up one queue, each by its name."""

    def __init__(self, link: Link, guest: Guest, index: int = 1) -> None:
        self.link = link
        self.guest = guest
        self.vring = guest.vring(index)
        self.index = index

    def send(self, name: str, value: int = 0) -> None:
        tell, ring, index = self.link.tell, self.vring, self.index
        if name == "FEATURES":
            tell(F.SET_FEATURES, U64.pack(value or WITH_ENABLE))
        elif name == "MEMORY":
            table = messages.encode_mem_table([self.guest.region])
            tell(F.SET_MEM_TABLE, table, [self.guest.fd])
        elif name == "NUM":
            tell(F.SET_VRING_NUM, VRING_STATE.pack(index, value or ring.num))
        elif name == "ADDR":
            moved = (ring.desc + value, ring.used + value, ring.avail + value)
            tell(F.SET_VRING_ADDR, VRING_ADDR.pack(index, 0, *moved, 0))
        elif name == "BASE":
            tell(F.SET_VRING_BASE, VRING_STATE.pack(index, value))
        elif name == "KICK":
            tell(F.SET_VRING_KICK, U64.pack(index), [self.guest.kicks[index][1]])
        elif name == "CALL":
            tell(F.SET_VRING_CALL, U64.pack(index), [self.guest.calls[index][1]])
        elif name == "ENABLE":
            tell(F.SET_VRING_ENABLE, VRING_STATE.pack(index, 1))
        elif name == "DISABLE":
            tell(F.SET_VRING_ENABLE, VRING_STATE.pack(index, 0))
        else:
            raise AssertionError(name)

    def bring_up(self, *names: str) -> None:
        for name in names or ("FEATURES", "MEMORY", *PARTS):
            self.send(name)

    def get_base(self) -> int:
        self.link.tell(F.GET_VRING_BASE, VRING_STATE.pack(self.index, 0))
        header = messages.HEADER.size
        index, base = VRING_STATE.unpack(self.link.sock.recv(100)[header:])
        assert index == self.index
        return int(base)


PARTS = ("NUM", "ADDR", "BASE", "KICK", "CALL", "ENABLE")
NEEDED = {"FEATURES", "MEMORY", "NUM", "ADDR", "KICK", "ENABLE"}


@pytest.fixture
def driver(no_leak: None, guest: Guest, link: Link) -> Driver:
    return Driver(link, guest)


def test_a_ring_starts_once_in_every_order_of_its_parts(shared_guest: Guest) -> None:
    for order in itertools.permutations(PARTS):
        device = RecordingDevice()
        link = Link(device)
        driver = Driver(link, shared_guest)
        driver.bring_up("FEATURES", "MEMORY", *order)
        queue, ring = device.queues[1], driver.vring
        assert queue.starts == [(ring.num, ring.desc, ring.avail, ring.used, 0, True)], order
        assert queue.started, order
        link.close()


@settings(max_examples=200, deadline=None)
@given(st.permutations(["FEATURES", "MEMORY", *PARTS]))
def test_a_ring_starts_once_also_if_features_or_memory_come_late(
    shared_guest: Guest, order: list[str]
) -> None:
    device = RecordingDevice()
    link = Link(device)
    driver = Driver(link, shared_guest)
    for sent, name in enumerate(order, 1):
        driver.send(name)
        started = 1 in device.queues and device.queues[1].started
        assert started == NEEDED.issubset(order[:sent])
    assert len(device.queues[1].starts) == 1
    assert device.queues[1].started
    link.close()


@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_a_ring_does_not_start_without(driver: Driver, device: RecordingDevice, missing: str) -> None:
    driver.bring_up(*(name for name in ("FEATURES", "MEMORY", *PARTS) if name != missing))
    assert not device.queues[1].starts
    driver.send(missing)
    assert device.queues[1].started


def test_without_the_protocol_features_bit_rings_are_enabled_at_once(
    driver: Driver, device: RecordingDevice
) -> None:
    driver.send("FEATURES", EVENT_IDX)
    driver.bring_up("MEMORY", "NUM", "ADDR", "KICK")
    assert device.queues[1].started


def test_event_idx_is_used_only_if_the_driver_takes_it(driver: Driver, device: RecordingDevice) -> None:
    driver.send("FEATURES", WITH_ENABLE & ~VirtioFeature.EVENT_IDX)
    driver.bring_up("MEMORY", *PARTS)
    assert device.queues[1].starts[0][-1] is False
    assert driver.link.backend.features == WITH_ENABLE & ~VirtioFeature.EVENT_IDX


def test_the_base_is_where_the_ring_goes_on(driver: Driver, device: RecordingDevice) -> None:
    driver.bring_up("FEATURES", "MEMORY", "NUM", "ADDR", "KICK")
    driver.send("BASE", 65535)
    driver.send("ENABLE")
    assert device.queues[1].starts[0][4] == 65535


def test_get_vring_base_stops_until_the_next_kick(driver: Driver, device: RecordingDevice) -> None:
    driver.bring_up()
    queue = device.queues[1]
    queue.position = 77
    assert driver.get_base() == 77
    assert not queue.started
    driver.bring_up("NUM", "ADDR", "ENABLE", "CALL")
    assert not queue.started
    assert driver.get_base() == 77
    driver.send("KICK")
    assert queue.started
    assert queue.starts[1][4] == 77


def test_get_vring_base_of_a_ring_that_never_ran_is_the_base_that_was_set(driver: Driver) -> None:
    assert driver.get_base() == 0
    driver.send("BASE", 5)
    assert driver.get_base() == 5


def test_disable_and_enable_go_on_at_the_same_place(driver: Driver, device: RecordingDevice) -> None:
    driver.bring_up()
    queue = device.queues[1]
    queue.position = 9
    driver.send("DISABLE")
    assert not queue.started
    driver.send("ENABLE")
    assert queue.started
    assert queue.starts[1][4] == 9


def test_a_disabled_ring_can_be_set_up_anew(driver: Driver, device: RecordingDevice) -> None:
    """As user-mode Linux does when its driver is bound again: it never sends GET_VRING_BASE."""
    driver.bring_up()
    device.queues[1].position = 9
    driver.send("DISABLE")
    driver.send("NUM", 32)
    driver.send("BASE", 0)
    driver.send("ADDR", 0x4000)
    driver.bring_up("KICK", "ENABLE")
    assert device.queues[1].starts[1][0] == 32
    assert device.queues[1].starts[1][1] == driver.vring.desc + 0x4000
    assert device.queues[1].starts[1][4] == 0


def test_a_running_ring_takes_the_same_again_and_new_descriptors(
    driver: Driver, device: RecordingDevice
) -> None:
    driver.bring_up()
    queue = device.queues[1]
    queue.position = 3
    old = dict(queue.fds)
    for name in PARTS:
        driver.send(name)
    assert queue.started
    assert len(queue.starts) == 1
    assert set(old.values()) != set(queue.fds.values())


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("NUM", 32, "SET_VRING_NUM: queue 1: size changes from 0x40 to 0x20 while it runs"),
        ("BASE", 1, "SET_VRING_BASE: queue 1: index changes from 0x0 to 0x1 while it runs"),
        ("ADDR", 16, "SET_VRING_ADDR: queue 1: desc address changes from"),
        ("FEATURES", 1 << 32, "SET_FEATURES: bits change to 0x100000000 while queue 1 runs"),
    ],
)
def test_a_running_ring_refuses_to_be_changed(driver: Driver, name: str, value: int, text: str) -> None:
    driver.bring_up()
    with pytest.raises(ProtocolError, match=f"^{text}"):
        driver.send(name, value)


def test_ring_addresses_outside_memory(driver: Driver) -> None:
    driver.send("ADDR", Guest.SIZE)
    with pytest.raises(ProtocolError, match=r"^SET_VRING_ENABLE: queue 1: .* outside memory$"):
        driver.bring_up("FEATURES", "MEMORY", "NUM", "KICK", "ENABLE")


@pytest.mark.parametrize(
    ("request_id", "payload", "text"),
    [
        (F.SET_VRING_NUM, VRING_STATE.pack(1, 100), "queue 1: size 100 is no power of two"),
        (F.SET_VRING_NUM, VRING_STATE.pack(1, 0), "queue 1: size 0 is not 1 to 32768"),
        (F.SET_VRING_NUM, VRING_STATE.pack(1, 65536), "queue 1: size 65536 is not 1 to 32768"),
        (F.SET_VRING_NUM, VRING_STATE.pack(3, 64), "queue 3: there are 3"),
        (F.GET_VRING_BASE, VRING_STATE.pack(1 << 31, 0), "queue 2147483648: there are 3"),
        (F.SET_VRING_ADDR, VRING_ADDR.pack(256, 0, 0, 0, 0, 0), "queue 256: there are 3"),
        (F.SET_VRING_BASE, VRING_STATE.pack(0, 65536), "queue 0: index 65536 of a split ring"),
        (F.SET_VRING_ENABLE, VRING_STATE.pack(0, 2), "queue 0: 2 is neither 0 nor 1"),
        (F.SET_VRING_KICK, U64.pack(0), "queue 0: no descriptor"),
        (F.SET_VRING_CALL, U64.pack(2), "queue 2: no descriptor"),
        (F.SET_VRING_CALL, U64.pack(7), "queue 7: there are 3"),
        (F.SET_VRING_ERR, U64.pack(0x200), "queue 0: unknown bits in 0x200"),
        (F.SET_VRING_KICK, U64.pack(VRING_NO_FD), "queue 0: no descriptor, rings are not polled"),
        (F.SET_FEATURES, U64.pack(1 << 26 | 1 << 32), "bits 0x4000000 were not offered"),
        (F.SET_FEATURES, U64.pack(1 << 63), "bits 0x8000000000000000 were not offered"),
        (F.SET_PROTOCOL_FEATURES, U64.pack(1 << 9 | 1), "bits 0x200 were not offered"),
        (F.SET_BACKEND_REQ_FD, b"", "no descriptor"),
        (F.ADD_MEM_REG, SINGLE_REGION.pack(0, 4096, 0, 0), "no descriptor"),
        (F.REM_MEM_REG, SINGLE_REGION.pack(0, 4096, 0, 0), "no memory region"),
        (F.SET_MEM_TABLE, messages.encode_mem_table([Region(0, 4096, 0, 0)]), "1 regions with 0"),
        (F.GET_INFLIGHT_FD, bytes(24), "INFLIGHT_SHMFD was not offered"),
        (F.GET_CONFIG, bytes(12), "CONFIG was not offered"),
        (F.IOTLB_MSG, bytes(32), "its feature was not offered"),
    ],
)
def test_what_breaks_the_protocol_is_named(driver: Driver, request_id: F, payload: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=f"^{request_id.name}: {text}"):
        driver.link.tell(request_id, payload)


def test_a_descriptor_and_the_bit_for_none(driver: Driver) -> None:
    with pytest.raises(ProtocolError, match="a descriptor, and the bit for none"):
        driver.link.tell(F.SET_VRING_CALL, U64.pack(VRING_NO_FD), [driver.guest.fd])


# ---- memory


def table_of(guest: Guest, *regions: Region) -> tuple[bytes, list[int]]:
    return messages.encode_mem_table(regions), [guest.fd] * len(regions)


def test_a_running_ring_goes_on_in_a_new_memory_table(driver: Driver, device: RecordingDevice) -> None:
    driver.bring_up()
    queue = device.queues[1]
    queue.position = 11
    other = Region(1 << 32, 4096, 1 << 20, 0)
    driver.link.tell(F.SET_MEM_TABLE, *table_of(driver.guest, driver.guest.region, other))
    assert queue.started
    assert len(queue.starts) == 1 and queue.calls[-1] == "use_memory"
    assert len(driver.link.backend.memory) == 2


def test_a_new_memory_table_without_a_running_ring_is_refused(driver: Driver) -> None:
    driver.bring_up()
    with pytest.raises(ProtocolError, match=r"^SET_MEM_TABLE: queue 1: its ring is in no memory region"):
        driver.link.tell(F.SET_MEM_TABLE, *table_of(driver.guest, Region(0, 4096, 1 << 20, 0)))


def test_an_empty_memory_table_under_a_running_ring_is_refused(driver: Driver) -> None:
    driver.bring_up()
    with pytest.raises(ProtocolError, match="queue 1: its ring is in no memory region"):
        driver.link.tell(F.SET_MEM_TABLE, messages.encode_mem_table([]))


def test_a_region_that_cannot_be_mapped_changes_nothing(driver: Driver, device: RecordingDevice) -> None:
    driver.bring_up()
    past_end = Region(1 << 30, Guest.SIZE, 1 << 30, 4096)
    table = table_of(driver.guest, driver.guest.region, past_end)
    with pytest.raises(ProtocolError, match=r"^SET_MEM_TABLE: region 1 \(gpa 0x40000000\): "):
        driver.link.tell(F.SET_MEM_TABLE, *table)
    assert driver.link.backend.memory.guest.regions() == [driver.guest.region[:3]]
    assert device.queues[1].started


def test_single_regions_come_and_go_while_a_ring_runs(driver: Driver, device: RecordingDevice) -> None:
    driver.bring_up()
    queue, guest, link = device.queues[1], driver.guest, driver.link
    queue.position = 4
    added = Region(1 << 32, 4096, 1 << 32, 8192)
    link.tell(F.ADD_MEM_REG, SINGLE_REGION.pack(*added), [guest.fd])
    assert len(queue.starts) == 1
    assert queue.calls[-1] == "use_memory"
    assert queue.started
    link.tell(F.REM_MEM_REG, SINGLE_REGION.pack(*added), [guest.fd])
    assert queue.started
    assert len(queue.starts) == 1 and len(link.backend.memory) == 1
    with pytest.raises(ProtocolError, match="REM_MEM_REG: queue 1"):
        link.tell(F.REM_MEM_REG, SINGLE_REGION.pack(*guest.region))


def test_a_region_that_overlaps_is_refused_and_rings_go_on(driver: Driver, device: RecordingDevice) -> None:
    driver.bring_up()
    with pytest.raises(ProtocolError, match=r"ADD_MEM_REG: region .* overlaps"):
        driver.link.tell(F.ADD_MEM_REG, SINGLE_REGION.pack(*driver.guest.region), [driver.guest.fd])
    assert device.queues[1].started
    assert len(driver.link.backend.memory) == 1


def test_memory_has_as_many_slots_as_it_says(driver: Driver) -> None:
    def add(i: int) -> None:
        region = SINGLE_REGION.pack(i << 12, 4096, i << 12, 0)
        driver.link.tell(F.ADD_MEM_REG, region, [driver.guest.fd])

    for i in range(SLOTS_MAX):
        add(i)
    with pytest.raises(ProtocolError, match=f"more than {SLOTS_MAX} regions"):
        add(SLOTS_MAX)


# ---- reset and status


def reset_device(link: Link) -> None:
    link.tell(F.RESET_DEVICE)


def reset_status(link: Link) -> None:
    link.tell(F.SET_STATUS, U64.pack(0))


@pytest.mark.parametrize("reset", [reset_device, reset_status])
def test_reset_stops_rings_and_drops_the_session_but_not_memory(
    driver: Driver, device: RecordingDevice, reset: Callable[[Link], None]
) -> None:
    driver.link.tell(F.SET_STATUS, U64.pack(8))
    driver.bring_up()
    reset(driver.link)
    assert device.resets == 1
    assert not device.queues[1].started
    assert len(driver.link.backend.memory) == 1
    driver.bring_up("FEATURES", "NUM", "BASE", "ADDR", "KICK")
    assert not device.queues[1].started
    driver.send("ENABLE")
    assert device.queues[1].started


def test_status_zero_resets_only_after_another(driver: Driver, device: RecordingDevice) -> None:
    reset_status(driver.link)
    assert device.resets == 0


def test_reset_device_before_anything_else(driver: Driver, device: RecordingDevice) -> None:
    reset_device(driver.link)
    assert device.resets == 1


# ---- replies


def test_replies_of_messages_that_have_one() -> None:
    config = bytes(range(40))
    with Link(RecordingDevice(config)) as link:
        frontend = link.frontend
        assert frontend.get_features() == FEATURES
        assert frontend.get_queue_num() == 3
        assert frontend.get_max_mem_slots() == SLOTS_MAX
        offered = frontend.get_protocol_features()
        assert ProtocolFeature.CONFIG in offered
        assert ProtocolFeature.INBAND_NOTIFICATIONS not in offered
        assert not offered & (ProtocolFeature.SHMEM | ProtocolFeature.LOG_SHMFD)
        frontend.set_status(8)
        assert frontend.get_status() == 8
        for size in range(41):
            assert frontend.get_config(0, size) == config[:size]
        assert frontend.get_config(36, 4) == config[36:]
        with pytest.raises(RequestRefused):
            frontend.get_config(36, 5)
    assert link.error is None


def test_acknowledgements_come_only_when_asked_for_and_agreed_on(link: Link) -> None:
    link.tell(F.SET_OWNER, flags=NEED_REPLY)  # before REPLY_ACK is agreed on
    link.tell(F.SET_PROTOCOL_FEATURES, U64.pack(8), flags=NEED_REPLY)
    link.tell(F.RESET_OWNER)
    ack = messages.encode(F.SET_PROTOCOL_FEATURES, U64.pack(0), messages.REPLY)
    assert link.sock.recv(100) == ack


@pytest.mark.parametrize("request_id", [1002, 45, F.SEND_RARP, F.SET_INFLIGHT_FD, F.VRING_KICK])
def test_an_unknown_message_is_ignored_or_refused(link: Link, request_id: int) -> None:
    shape = messages.FRONTEND_SHAPES.get(request_id)
    payload = bytes(shape.payload[0] if shape else 5)
    link.tell(F.SET_PROTOCOL_FEATURES, U64.pack(8))
    link.tell(request_id, payload)
    link.tell(request_id, payload, flags=NEED_REPLY)
    assert link.sock.recv(100) == messages.encode(request_id, U64.pack(1), messages.REPLY)


def test_the_configuration_cannot_be_written() -> None:
    link = Link(RecordingDevice(bytes(40)))
    link.tell(F.SET_PROTOCOL_FEATURES, U64.pack(8))
    link.tell(F.SET_CONFIG, CONFIG_HEAD.pack(0, 4, 0) + b"evil", flags=NEED_REPLY)
    assert link.sock.recv(100)[12:] == U64.pack(1)
    link.close()


# ---- in-band notifications


@pytest.fixture
def inband(no_leak: None, guest: Guest) -> Iterator[Driver]:
    link = Link(RecordingDevice(inband=True))
    features = ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ
    link.tell(F.SET_PROTOCOL_FEATURES, U64.pack(features))
    yield Driver(link, guest)
    link.close()


@pytest.mark.parametrize("channel_first", [True, False])
def test_in_band_a_ring_needs_no_descriptors(inband: Driver, channel_first: bool) -> None:
    link = inband.link
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if channel_first:
            link.tell(F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        link.tell(F.SET_VRING_CALL, U64.pack(1 | VRING_NO_FD))
        inband.bring_up("FEATURES", "MEMORY", "NUM", "BASE", "ADDR", "ENABLE")
        if not channel_first:
            link.tell(F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        queue = link.device.queues[1]
        assert queue.started
        link.tell(F.VRING_KICK, VRING_STATE.pack(1, 0))
        assert queue.kicks == 1
        os.write(queue.fds["call"], queue.message)
        assert ours.recv(100) == bytes.fromhex("04000000 01000000 08000000 01000000 00000000")
        inband.send("CALL")
        assert queue.message == b""
        assert inband.get_base() == 0
        assert not queue.started
        link.tell(F.VRING_KICK, VRING_STATE.pack(1, 0))
        assert queue.started


def test_in_band_a_kick_can_also_say_that_it_has_no_descriptor(inband: Driver) -> None:
    inband.bring_up("FEATURES", "MEMORY", "NUM", "ADDR", "ENABLE")
    inband.get_base()
    inband.link.tell(F.SET_VRING_KICK, U64.pack(1 | VRING_NO_FD))
    assert inband.link.device.queues[1].started


# ---- the connection


def test_close_gives_everything_back(driver: Driver, device: RecordingDevice) -> None:
    driver.bring_up()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        driver.link.tell(F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        driver.link.tell(F.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    backend = driver.link.backend
    backend.close()
    backend.close()
    assert not device.queues[1].started
    assert set(device.queues[1].fds.values()) == {-1}
    assert backend.channel is None
    assert len(backend.memory) == 0


def test_the_end_of_the_connection_is_no_error(link: Link) -> None:
    messages.send(link.sock, messages.encode(F.SET_OWNER))
    link.sock.close()
    assert link.backend.on_readable() is False


def test_a_front_end_that_is_gone_before_its_reply_is_no_error(link: Link) -> None:
    messages.send(link.sock, messages.encode(F.GET_FEATURES))
    link.sock.close()
    assert link.backend.on_readable() is False


def test_one_connection_does_not_keep_the_control_thread(link: Link) -> None:
    for _ in range(MESSAGES_PER_CALL + 1):
        messages.send(link.sock, messages.encode(F.GET_FEATURES))
    answer = messages.HEADER.size + U64.size
    link.backend.on_readable()
    assert len(link.sock.recv(1 << 16)) == MESSAGES_PER_CALL * answer
    link.backend.on_readable()
    assert len(link.sock.recv(1 << 16)) == answer
