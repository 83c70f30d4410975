"""The orders of known front ends: against the state machine alone, and against the daemon."""

import select
from collections.abc import Iterator

import pytest

from vfsd.vhost.frontend import Frontend, SharedRegion
from vfsd.vhost.messages import (
    VRING_STATE,
    BackendRequest,
    ProtocolFeature,
    Region,
    VirtioFeature,
)
from vfsd.vhost.orders import ORDERS

from .peers import DEADLINE_S, Daemon, Driver, Guest, Link, RecordingDevice

RESTARTS_FROM_ZERO = ("qemu", "uml")  # the guest's driver was reset; others go on


@pytest.fixture
def frontend(daemon: Daemon) -> Iterator[Frontend]:
    with Frontend(daemon.connect(), DEADLINE_S) as frontend:
        yield frontend


# ---- the state machine


@pytest.mark.parametrize("order", ORDERS)
def test_every_ring_is_served_after_start_and_none_after_stop(
    no_leak: None, guest: Guest, order: str
) -> None:
    device = RecordingDevice(config=bytes(40))
    setup = guest.setup()
    with Link(device) as link:
        frontend = link.frontend
        frontend.handshake(order, setup)
        for times in (1, 2):
            frontend.start(order, setup)
            frontend.get_features()  # all before it is done
            assert sorted(device.queues) == [0, 1]
            for queue in device.queues.values():
                assert queue.started
                assert len(queue.starts) == times
                assert min(queue.fds["kick"], queue.fds["call"]) >= 0
            frontend.stop(order, setup)
            frontend.get_features()
            assert not any(queue.started for queue in device.queues.values())
    assert link.error is None


@pytest.mark.parametrize("order", ORDERS)
def test_each_order_negotiates_what_its_front_end_knows(guest: Guest, order: str) -> None:
    with Link(RecordingDevice(config=bytes(40))) as link:
        link.frontend.handshake(order, guest.setup(without=ProtocolFeature.MQ))
        link.frontend.get_features()
        agreed = link.backend.protocol_features
        assert agreed == ORDERS[order].wants & link.backend.offered & ~ProtocolFeature.MQ
    assert link.error is None


def test_in_band_user_mode_linux_sends_no_kick(no_leak: None, guest: Guest) -> None:
    device = RecordingDevice(config=bytes(40), inband=True)
    setup = guest.setup()
    with Link(device) as link:
        link.frontend.handshake("uml", setup)
        link.frontend.start("uml", setup)
        assert all(queue.started for queue in device.queues.values())
        assert "set_kick" not in device.queues[1].calls
        assert device.queues[1].message.startswith(bytes([BackendRequest.VRING_CALL]))
    assert link.error is None


# ---- the daemon


@pytest.mark.parametrize("order", ORDERS)
def test_the_daemon_answers_after_every_start(guest: Guest, frontend: Frontend, order: str) -> None:
    driver = Driver(guest)
    frontend.handshake(order, guest.setup())
    frontend.start(order, guest.setup())
    for _ in range(3):
        driver.init()
    frontend.stop(order, guest.setup())
    if order in RESTARTS_FROM_ZERO:
        driver.reset()
        frontend.start(order, guest.setup())
    else:
        assert frontend.bases == {0: 0, 1: 3}
        frontend.start(order, guest.setup(frontend.bases))
    driver.init()


@pytest.mark.parametrize("order", ORDERS)
def test_the_daemon_serves_sockets_in_place_of_eventfds(frontend: Frontend, order: str) -> None:
    guest = Guest(sockets=True)
    driver = Driver(guest)
    frontend.handshake(order, guest.setup())
    frontend.start(order, guest.setup())
    for _ in range(3):
        driver.init()
    guest.close()


def test_the_daemon_serves_a_driver_without_optional_features(guest: Guest, frontend: Frontend) -> None:
    bare = VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES
    setup = guest.setup(features=bare, without=ProtocolFeature.CONFIGURE_MEM_SLOTS)
    driver = Driver(guest, event_idx=False)
    frontend.handshake("qemu", setup)
    frontend.start("qemu", setup)
    for _ in range(3):
        driver.init()


def test_what_is_on_the_ring_before_the_start_is_answered_without_a_kick(
    guest: Guest, frontend: Frontend
) -> None:
    driver = Driver(guest)
    frontend.handshake("qemu", guest.setup())
    driver.init(kick=lambda: frontend.start("qemu", guest.setup()))


def test_memory_changes_while_the_guest_runs(guest: Guest, frontend: Frontend) -> None:
    driver = Driver(guest)
    frontend.handshake("qemu", guest.setup())
    frontend.start("qemu", guest.setup())
    driver.init()
    plugged = SharedRegion(Region(1 << 30, 1 << 16, 1 << 30, 1 << 16), guest.fd)
    frontend.add_mem_reg(plugged, ack=True)
    driver.init()
    frontend.rem_mem_reg(plugged.region, ack=True)
    driver.init()
    frontend.set_mem_table([guest.shared, plugged], ack=True)
    driver.init()


def test_a_disabled_ring_is_left_alone(guest: Guest, frontend: Frontend) -> None:
    driver = Driver(guest)
    frontend.handshake("uml", guest.setup())
    frontend.start("uml", guest.setup())
    driver.init()
    frontend.set_vring_enable(1, False, ack=True)

    def enable() -> None:
        guest.kick(1)
        frontend.get_features()
        assert driver.ring.pop_used() is None
        frontend.set_vring_enable(1, True)

    # The queue may have been polling, with kicks off, when it was disabled.
    driver.init(kick=enable, kick_always=True)


@pytest.fixture(scope="module")
def inband_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("inband")
    daemon = Daemon(directory, "--tag", "test", "--inband-notifications")
    yield daemon
    assert daemon.stop() == 0


def test_in_band_the_daemon_is_kicked_and_calls_by_messages(guest: Guest, inband_daemon: Daemon) -> None:
    driver = Driver(guest)
    setup = guest.setup()
    with Frontend(inband_daemon.connect(), DEADLINE_S) as frontend:
        frontend.handshake("uml", setup)
        frontend.start("uml", setup)

        def wait_call() -> None:
            assert frontend.channel is not None
            assert select.select([frontend.channel], [], [], DEADLINE_S)[0]
            message = frontend.read_channel()
            assert message is not None
            assert message.request == BackendRequest.VRING_CALL
            assert VRING_STATE.unpack(message.payload) == (1, 0)

        for _ in range(3):
            driver.init(lambda: frontend.vring_kick(1), wait_call)
