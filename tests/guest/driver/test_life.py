"""A device's life: connect, reset, remove, and what happens when the daemon goes."""

import gc
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import Daemon, StartDaemon
from guests.daemon import eventually

from vfsd.guest.driver._transport import Transport
from vfsd.guest.driver.device import Device
from vfsd.vhost.orders import ORDERS

from .conftest import Background, Rig, StartRig, descriptors, driver_threads
from .fakedaemon import DEADLINE_S, FakeDaemon, answer
from .requests import ATTR_OUT, DESTROY, GETATTR, ROOT
from .test_full_queue import IDLE_CPU_S, Results, cpu_of_idle
from .test_scatter_gather import Client

EIO, ENODEV, ENOTCONN = 5, 19, 107
ROOT_DIR = Path(__file__).resolve().parents[3]


def error_of(function: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        function()
    return caught.value.errno


def destroy(made: Rig, queue: int | None = None) -> None:
    made.transport.call(DESTROY, 0, queue=queue)


# ---- every order


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_connects_works_resets_works_and_removes(
    daemon: StartDaemon, tmp_path: Path, order: str
) -> None:
    (tmp_path / "a").touch()
    started = daemon(tmp_path)
    device = Device.connect(started.socket, order=order, queues=2)
    for _ in range(3):
        client = Client(device.transport)
        assert client.listdir(4096) == {b"a"}
        device.reset()
    Client(device.transport)
    device.remove()
    assert eventually(lambda: "the front end has left" in started.log)
    assert "broke the protocol" not in started.log


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_with_the_fake_daemon(rig: StartRig, order: str) -> None:
    made = rig(order=order, queues=3)
    for _ in range(3):
        for number in (1, 2, 3):
            made.transport.call(GETATTR, ROOT, bytes(16), out=ATTR_OUT, queue=number)
        made.transport.forget(1, 1)
        made.transport.drain()
        made.device.reset()
    made.device.remove()
    assert made.fake.error is None


@pytest.mark.parametrize("order", ["uml", "crosvm"])
def test_the_tag_comes_from_the_daemon_in_orders_that_ask(rig: StartRig, order: str) -> None:
    assert rig(order=order).device.tag == "fake"
    assert rig(order=order, fake={"tag": b"x" * 36}).device.tag == "x" * 36
    assert rig(order="qemu").device.tag == ""


# ---- in-band notifications


def test_in_band_notifications_with_a_real_daemon(daemon: StartDaemon, tmp_path: Path) -> None:
    started = daemon(tmp_path, options=["--inband-notifications"])
    device = Device.connect(started.socket, order="uml", inband=True, queues=2)
    try:
        client = Client(device.transport)
        node, fh = client.create(b"f")
        for block in range(50):
            client.write(node, fh, 4096 * block, bytes([block]) * 4096)
        assert client.read(node, fh, 4096 * 49, 4096) == bytes([49]) * 4096
        device.transport.forget(node, 1)
        client.release(node, fh)
        device.reset()
        assert Client(device.transport).listdir(4096) == {b"f"}
    finally:
        device.remove()


def test_in_band_no_descriptor_is_handed_over_and_a_busy_queue_completes(rig: StartRig) -> None:
    made = rig(order="uml", inband=True, queues=2, queue_size=8, slots=64, fake={"inband": True})
    results = Results()
    for node in range(2000):
        made.transport.submit(results.done(node), DESTROY, node, queue=1 + node % 2)
    assert len(results.take(2000)) == 2000
    assert all(q.kick_fd == -1 and q.call_message != b"\1" for q in made.fake.queues.values())
    made.transport.drain()


def test_in_band_is_refused_where_the_daemon_or_the_order_cannot(rig: StartRig) -> None:
    with FakeDaemon() as fake, pytest.raises(OSError, match="in-band"):
        Device.connect(fake.path, order="uml", inband=True).remove()
    with FakeDaemon(inband=True) as fake, pytest.raises(OSError, match="in-band"):
        Device.connect(fake.path, order="qemu", inband=True).remove()


# ---- reset


@pytest.mark.parametrize("order", ORDERS)
def test_reset_ends_what_is_in_flight(held: Callable[..., Rig], order: str) -> None:
    made, results = held(order=order, slots=32, queue_size=8), Results()
    for node in range(12):
        made.transport.submit(results.done(node), DESTROY, node)
    made.fake.take(8)
    for node in range(12):
        made.transport.forget(node, 1)
    made.device.reset()
    assert [error for _, error, _ in results.take(12)] == [ENOTCONN] * 12
    made.fake.handler = answer
    destroy(made)
    made.transport.drain()
    assert made.transport.in_flight == 0


def test_50_resets_leak_nothing(rig: StartRig) -> None:
    made = rig(queues=2)
    made.device.reset()
    gc.collect()
    files, threads = descriptors(), driver_threads()
    for _ in range(50):
        made.device.reset()
        destroy(made)
    gc.collect()
    assert eventually(lambda: (descriptors(), driver_threads()) == (files, threads))


def test_a_daemon_that_dies_in_a_reset_is_an_oserror_and_the_device_gone(rig: StartRig) -> None:
    for step in range(3):
        made = rig(slots=4)
        made.fake.close_at = len(made.fake.seen) + step
        assert error_of(made.device.reset) is not None
        assert made.device.gone is not None
        assert error_of(made.device.reset) == ENODEV
        assert error_of(lambda made=made: destroy(made)) == ENOTCONN  # type: ignore[misc]
        made.device.remove()


# ---- remove


def test_remove_waits_for_what_is_in_flight(held: Callable[..., Rig]) -> None:
    made = held()
    call = Background(lambda: destroy(made))
    made.transport.forget(1, 1)
    chains = made.fake.take(2)
    remove = Background(made.device.remove)
    assert eventually(lambda: error_of_submit(made) == ENOTCONN)
    answer(chains.pop())
    assert cpu_of_idle() < IDLE_CPU_S
    assert remove.running
    answer(chains.pop())
    remove.result()
    call.result()
    made.device.remove()  # idempotent
    assert driver_threads() == []


def error_of_submit(made: Rig) -> int:
    """The errno of a request that is let through or refused; what is let through is answered."""
    errors: queue.SimpleQueue[int] = queue.SimpleQueue()
    handler, made.fake.handler = made.fake.handler, answer
    made.transport.submit(lambda error, *rest: errors.put(error), DESTROY, 0)
    try:
        return errors.get(timeout=DEADLINE_S)
    finally:
        made.fake.handler = handler


def test_a_daemon_that_dies_while_remove_waits_lets_it_go_on(held: Callable[..., Rig]) -> None:
    made = held()
    call = Background(lambda: destroy(made))
    made.fake.next()
    remove = Background(made.device.remove)
    assert eventually(lambda: error_of_submit(made) == ENOTCONN)
    made.fake.drop()
    try:
        remove.result(5)
    finally:
        made.transport.abort(EIO)
    assert error_of(call.result) == EIO


def test_descriptors_are_closed_when_remove_returns(rig: StartRig) -> None:
    """Not only when the device object goes, which a traceback may keep for long."""
    gc.collect()
    with FakeDaemon() as fake:
        files = descriptors()
        device = Device.connect(fake.path, queues=4)
        device.remove()
        assert eventually(lambda: fake._sock is None)
        assert descriptors() == files
    assert device.gone is None


def test_after_remove_requests_are_enotconn_and_forgets_dropped(rig: StartRig) -> None:
    made = rig()
    made.device.remove()
    assert error_of(lambda: destroy(made)) == ENOTCONN
    made.transport.forget(1, 1)
    made.transport.drain()
    assert error_of(made.device.reset) == ENODEV
    made.transport.connect()
    assert error_of(lambda: destroy(made)) == ENOTCONN


def test_100_devices_come_and_go_on_one_daemon(rig: StartRig) -> None:
    with FakeDaemon() as fake:
        for number in range(100):
            device = Device.connect(fake.path, order=list(ORDERS)[number % len(ORDERS)], queues=2, slots=4)
            device.transport.call(DESTROY, 0)
            device.remove()
            assert eventually(lambda: fake._sock is None)
        assert fake.connections == 100


def test_callers_that_race_with_close_all_get_an_error(rig: StartRig) -> None:
    """A request that is on its way to a queue while the worker ends must end too."""
    made = rig(queues=2)
    for _ in range(60):
        made.device.reset()
        race(made.transport)


def race(transport: Transport) -> None:
    ready = threading.Barrier(17)

    def hammer() -> int | None:
        ready.wait(DEADLINE_S)
        while True:
            try:
                transport.call(DESTROY, 0)
            except OSError as error:
                return error.errno

    threads = [Background(hammer) for _ in range(16)]
    ready.wait(DEADLINE_S)
    transport.close()
    assert {thread.result(5) for thread in threads} == {ENOTCONN}


# ---- the device disappears


def test_the_device_disappears_with_1000_requests_in_flight(held: Callable[..., Rig]) -> None:
    made, results = held(queue_size=1024, slots=1024, queues=2), Results()
    before = set(threading.enumerate())
    calls = [Background(lambda n=n: destroy(made, 1 + n % 2)) for n in range(100)]  # type: ignore[misc]
    for number in range(900):
        where = 1 + number % 2
        made.transport.submit(results.done(number), GETATTR, ROOT, bytes(16), out=ATTR_OUT, queue=where)
    made.fake.take(1000)
    assert made.transport.in_flight == 1000
    gone = threading.Event()
    made.device.on_gone = gone.set
    begin = time.monotonic()
    made.fake.drop()
    assert {error for _, error, _ in results.take(900)} == {EIO}
    assert {error_of(call.result) for call in calls} == {EIO}
    assert time.monotonic() - begin < 1
    assert gone.wait(DEADLINE_S)
    assert made.device.gone
    assert made.transport.in_flight == 0
    assert error_of(lambda: destroy(made)) == ENOTCONN
    made.device.remove()
    assert driver_threads() == []
    assert set(threading.enumerate()) <= before


def test_the_same_with_a_full_queue_and_callers_that_wait_for_a_slot(held: Callable[..., Rig]) -> None:
    made = held(queue_size=8, slots=100)
    calls = [Background(lambda: destroy(made)) for _ in range(300)]
    made.fake.take(8)
    assert eventually(lambda: made.transport.in_flight == 100)
    begin = time.monotonic()
    made.fake.drop()
    assert {error_of(call.result) for call in calls} <= {EIO, ENOTCONN}
    assert time.monotonic() - begin < 1


def test_a_real_daemon_killed_with_requests_in_flight(tmp_path: Path) -> None:
    started = Daemon(tmp_path)
    device = Device.connect(started.socket)
    client = Client(device.transport)
    node, fh = client.create(b"f")

    def hammer() -> int | None:
        while True:
            try:
                client.write(node, fh, 0, bytes(65536))
            except OSError as error:
                return error.errno

    threads = [Background(hammer) for _ in range(32)]
    assert eventually(lambda: device.transport.counters()["opcodes"].get("WRITE", 0) > 100)
    begin = time.monotonic()
    started.kill()
    assert {thread.result() for thread in threads} <= {EIO, ENOTCONN}
    assert time.monotonic() - begin < 1.5
    device.remove()
    assert driver_threads() == []


def test_a_lost_device_stays_lost_after_connect(held: Callable[..., Rig]) -> None:
    made = held()
    made.fake.drop()
    assert eventually(lambda: made.device.gone is not None)
    assert eventually(lambda: error_of_submit(made) == ENOTCONN)
    made.transport.connect()
    late = Background(lambda: destroy(made))
    try:
        assert error_of(lambda: late.result(2)) == ENOTCONN
    finally:
        made.transport.abort(EIO)


def test_no_thread_is_busy_after_an_abort_with_replies_unread(held: Callable[..., Rig]) -> None:
    made, results = held(slots=8), Results()
    for node in range(4):
        made.transport.submit(results.done(node), DESTROY, node)
    chains = made.fake.take(4)
    made.transport.abort(EIO)
    results.take(4)
    for chain in chains:
        chain.reply(call=False)
    chains[0].queue.call_always()
    assert cpu_of_idle() < IDLE_CPU_S
    assert error_of(lambda: destroy(made)) == ENOTCONN


def test_on_gone_may_remove_the_device(rig: StartRig) -> None:
    made = rig()
    removed = threading.Event()

    def gone() -> None:
        made.device.remove()
        removed.set()

    made.device.on_gone = gone
    made.fake.drop()
    assert removed.wait(DEADLINE_S)
    assert eventually(lambda: driver_threads() == [])


def test_a_process_that_ends_without_remove_ends(rig: StartRig) -> None:
    program = (
        "import sys; from vfsd.guest.driver.device import Device\n"
        "transport = Device.connect(sys.argv[1]).transport\n"
        "for node in range(20): transport.submit(print, 38, node); transport.forget(1, 1)\n"
    )
    with FakeDaemon() as fake:
        fake.handler = fake.hold
        run = subprocess.run(
            [sys.executable, "-c", program, fake.path],
            cwd=ROOT_DIR, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")


def test_a_device_removed_by_two_threads(rig: StartRig) -> None:
    made = rig()
    for remover in [Background(made.device.remove) for _ in range(4)]:
        remover.result()
    assert os.path.exists(made.fake.path)
