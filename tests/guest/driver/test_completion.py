"""How requests end: which replies are believed, in which thread, and what drains."""

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Background, Rig, StartRig
from .fakedaemon import DEADLINE_S, Chain, FakeDaemon, answer
from .requests import ATTR_OUT, DESTROY, GETATTR, READ, ROOT

EIO, ENOTCONN = 5, 107
ROOT_DIR = Path(__file__).resolve().parents[3]
U32 = 0xFFFFFFFF

LIES: dict[str, Callable[[Chain], None]] = {
    "nothing written": lambda c: c.reply(bytes(c.room), used=0),
    "less than a header": lambda c: c.reply(bytes(c.room), used=15),
    "out.len too short": lambda c: c.reply(bytes(c.room), out_len=16),
    "out.len too long": lambda c: c.reply(bytes(c.room), out_len=16 + c.room + 1),
    "out.len 0": lambda c: c.reply(bytes(c.room), out_len=0),
    "out.len 4 GiB": lambda c: c.reply(bytes(c.room), out_len=U32),
    "used.len too short": lambda c: c.reply(bytes(c.room), used=16),
    "used.len too long": lambda c: c.reply(bytes(c.room), used=16 + c.room + 1),
    "used.len 4 GiB": lambda c: c.reply(bytes(c.room), used=U32),
    "both 4 GiB": lambda c: c.reply(bytes(c.room), used=U32, out_len=U32),
    "both a byte too long": lambda c: c.reply(bytes(c.room), used=17 + c.room, out_len=17 + c.room),
    "both 16 past 4 GiB": lambda c: c.reply(bytes(c.room), used=15, out_len=15),
    "unique of another": lambda c: c.reply(bytes(c.room), unique=c.unique + 2),
    "unique 0": lambda c: c.reply(bytes(c.room), unique=0),
    "unique with the interrupt bit": lambda c: c.reply(bytes(c.room), unique=c.unique | 1),
    "error 1": lambda c: c.reply(error=1),
    "error -512": lambda c: c.reply(error=-512),
    "error -2147483648": lambda c: c.reply(error=-(2**31)),
    "error 2147483647": lambda c: c.reply(error=2**31 - 1),
    "an error with a body": lambda c: c.reply(bytes(8), error=-2),
    "an error with a whole body": lambda c: c.reply(bytes(c.room), error=-2),
    "a short fixed reply": lambda c: c.reply(bytes(c.room - 8)),
    "a fixed reply without a body": lambda c: c.reply(),
    "a header that was never written": lambda c: c.give(16 + c.room),
}


@pytest.mark.parametrize("name", LIES)
def test_a_reply_that_is_none_is_eio_for_that_request_alone(rig: StartRig, name: str) -> None:
    made = rig(LIES[name], slots=4)
    with pytest.raises(OSError, match="Input/output") as caught:
        made.transport.call(GETATTR, ROOT, bytes(16), out=ATTR_OUT)
    assert caught.value.errno == EIO
    made.fake.handler = answer
    assert made.transport.call(GETATTR, ROOT, bytes(16), out=ATTR_OUT) == (bytes(ATTR_OUT), 0)
    assert made.device.gone is None
    made.transport.drain()


@pytest.mark.parametrize("name", LIES)
def test_the_same_lies_about_pages(rig: StartRig, name: str) -> None:
    """A reply of which no part may be missing; the caller's buffer stays within its bounds."""
    made = rig(LIES[name], slots=4)
    memory = bytearray(b"\xaa" * 9000)
    with pytest.raises(OSError, match="Input/output"):
        made.transport.call(READ, ROOT, bytes(40), into=memoryview(memory)[4:8004])
    assert memory == b"\xaa" * 9000


@pytest.mark.parametrize("errno", [1, 2, 38, 511])
def test_an_errno_from_1_to_511_is_the_caller_s(rig: StartRig, errno: int) -> None:
    made = rig(lambda chain: chain.reply(error=-errno), slots=4)
    with pytest.raises(OSError) as caught:
        made.transport.call(GETATTR, ROOT, bytes(16), out=ATTR_OUT)
    assert caught.value.errno == errno


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192])
def test_the_last_argument_may_be_short_where_it_is_allowed(rig: StartRig, size: int) -> None:
    made = rig(lambda chain: chain.reply(b"d" * size), slots=4)
    into = bytearray(8192)
    assert made.transport.call(READ, ROOT, bytes(40), into=into, argvar=True) == (b"", size)
    assert into == b"d" * size + bytes(8192 - size)


def test_only_the_last_argument_may_be_short(rig: StartRig) -> None:
    made = rig(lambda chain: chain.reply(bytes(15)), slots=4)
    with pytest.raises(OSError, match="Input/output"):
        made.transport.call(39, ROOT, bytes(32), out=16, into=bytearray(4096), argvar=True)
    made.fake.handler = lambda chain: chain.reply(b"a" * 16)
    reply = made.transport.call(39, ROOT, bytes(32), out=16, into=bytearray(4096), argvar=True)
    assert reply == (b"a" * 16, 0)


def test_replies_may_come_in_any_order(held: Callable[..., Rig]) -> None:
    made = held(slots=64)
    calls = [
        Background(lambda node=node: made.transport.call(GETATTR, node, bytes(16), out=ATTR_OUT))  # type: ignore[misc]
        for node in range(50)
    ]
    for chain in reversed(made.fake.take(50)):
        chain.reply(chain.nodeid.to_bytes(ATTR_OUT, "little"))
    for node, call in enumerate(calls):
        assert call.result() == (node.to_bytes(ATTR_OUT, "little"), 0)


# ---- in which thread


@pytest.mark.parametrize("why", ["disconnected", "too large"])
def test_errors_end_from_the_worker_and_may_take_the_submitter_s_lock(rig: StartRig, why: str) -> None:
    made = rig(queue_size=8, slots=4)
    lock = threading.Lock()
    ended: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def done(error: int, body: bytes, data: bytes) -> None:
        with lock:
            ended.put((error, threading.current_thread().name))

    if why == "disconnected":
        made.transport.disconnect()

    def submit() -> None:
        with lock:
            data = bytes(4 * 4096)
            made.transport.submit(done, 39, ROOT, bytes(32), out=16, data=data, into=len(data))
            assert ended.empty()

    Background(submit).result()
    assert ended.get(timeout=DEADLINE_S) == (ENOTCONN if why == "disconnected" else 7, "virtiofs-worker")
    assert made.transport.in_flight == 0  # what waits only for its end is not counted


def depend(made: Rig, may_block: bool, wait_s: float) -> bool:
    """Whether the end of a request could wait for the reply to a later one."""
    second_came, first_ended = threading.Event(), threading.Event()
    waited: list[bool] = []

    def first(error: int, body: bytes, data: bytes) -> None:
        waited.append(second_came.wait(wait_s))
        first_ended.set()

    def second(error: int, body: bytes, data: bytes) -> None:
        second_came.set()

    made.transport.submit(first, GETATTR, 1, bytes(16), out=ATTR_OUT, may_block=may_block, queue=1)
    made.transport.submit(second, GETATTR, 2, bytes(16), out=ATTR_OUT, may_block=may_block, queue=1)
    for chain in made.fake.take(2):
        answer(chain)
    assert first_ended.wait(DEADLINE_S)
    return waited[0]


def test_two_ends_that_depend_on_each_other_do_not_deadlock_with_may_block(held: Callable[..., Rig]) -> None:
    assert depend(held(slots=4), may_block=True, wait_s=DEADLINE_S)


def test_without_may_block_the_same_two_deadlock(held: Callable[..., Rig]) -> None:
    """What may_block is for; the wait is bounded here, so that the test ends."""
    assert not depend(held(slots=4), may_block=False, wait_s=0.5)


def test_each_of_two_may_wait_for_the_other(held: Callable[..., Rig]) -> None:
    made, barrier = held(slots=4), threading.Barrier(2)
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for _ in range(2):
        made.transport.submit(
            lambda *result: ended.put(barrier.wait(DEADLINE_S)), DESTROY, 0, may_block=True
        )
    for chain in made.fake.take(2):
        answer(chain)
    assert sorted(ended.get(timeout=DEADLINE_S) for _ in range(2)) == [0, 1]


def test_an_end_with_may_block_may_send_requests_itself(rig: StartRig) -> None:
    made = rig(slots=2)
    results: queue.SimpleQueue[tuple[bytes, int]] = queue.SimpleQueue()

    def done(error: int, body: bytes, data: bytes) -> None:
        results.put(made.transport.call(GETATTR, ROOT, bytes(16), out=ATTR_OUT))

    for _ in range(10):
        made.transport.submit(done, DESTROY, 0, may_block=True)
    for _ in range(10):
        assert results.get(timeout=DEADLINE_S) == (bytes(ATTR_OUT), 0)


def test_an_end_that_raises_hurts_nobody_else(rig: StartRig, caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: int, body: bytes, data: bytes) -> None:
        raise ZeroDivisionError

    made = rig(slots=2)
    for _ in range(5):
        made.transport.submit(fail, DESTROY, 0)
    assert made.transport.call(GETATTR, ROOT, bytes(16), out=ATTR_OUT) == (bytes(ATTR_OUT), 0)
    made.transport.drain()
    assert caplog.text.count("the end of a request failed") == 5


# ---- in flight


def test_in_flight_counts_what_is_on_rings_and_queued_and_drain_waits_for_the_last(
    held: Callable[..., Rig],
) -> None:
    made = held(queues=2, queue_size=8, slots=64)
    for _ in range(12):
        made.transport.submit(lambda *result: None, GETATTR, ROOT, bytes(16), out=ATTR_OUT, queue=2)
    for node in range(10):
        made.transport.forget(node, 1)
    chains = made.fake.take(16)
    assert made.transport.in_flight == 22
    assert made.counter("requests.1", "in_flight") == 12
    assert made.counter("hiprio", "in_flight") == 10
    drain, other = Background(made.transport.drain), Background(lambda: made.transport.drain_queue(1))
    other.result()
    for answered in range(22):
        chain = chains.pop(0)
        if answered == 21:
            assert drain.running
            begin = time.process_time()
            threading.Event().wait(0.3)
            assert time.process_time() - begin < 0.05
            assert drain.running
        answer(chain)
        if len(chains) < 2 and answered < 20:
            chains.append(made.fake.next())
    drain.result()
    assert made.transport.in_flight == 0


def test_many_may_drain_at_once(held: Callable[..., Rig]) -> None:
    made = held(slots=4)
    made.transport.submit(lambda *result: None, DESTROY, 0)
    drains = [Background(made.transport.drain) for _ in range(8)]
    answer(made.fake.next())
    for drain in drains:
        drain.result()


@pytest.mark.parametrize("may_block", [False, True])
def test_a_request_is_in_flight_until_its_end_function_has_returned(
    held: Callable[..., Rig], may_block: bool
) -> None:
    """virtio_fs_request_complete: fuse_request_end, then in_flight--."""
    made = held(slots=4)
    began, go, returned = threading.Event(), threading.Event(), threading.Event()

    def done(*result: object) -> None:
        began.set()
        assert go.wait(DEADLINE_S)
        returned.set()

    made.transport.submit(done, DESTROY, 0, may_block=may_block)
    answer(made.fake.next())
    assert began.wait(DEADLINE_S)
    drain = Background(made.transport.drain)
    in_flight = made.transport.in_flight
    go.set()
    drain.result()
    assert (in_flight, returned.is_set()) == (1, True)


# ---- disconnect


def test_a_disconnected_queue_is_enotconn_and_the_others_go_on(rig: StartRig) -> None:
    made = rig(queues=2)
    made.transport.disconnect(1)
    with pytest.raises(OSError) as caught:
        made.transport.call(DESTROY, 0, queue=1)
    assert caught.value.errno == ENOTCONN
    made.transport.call(DESTROY, 0, queue=2)
    made.transport.connect()
    made.transport.call(DESTROY, 0, queue=1)


def test_disconnect_leaves_what_is_on_the_ring_to_its_reply(held: Callable[..., Rig]) -> None:
    made = held()
    call = Background(lambda: made.transport.call(DESTROY, 0))
    chain = made.fake.next()
    made.transport.disconnect()
    with pytest.raises(OSError):
        made.transport.call(DESTROY, 0)
    assert call.running
    answer(chain)
    assert call.result() == (b"", 0)


@pytest.mark.parametrize("method", ["disconnect", "drain_queue"])
@pytest.mark.parametrize("number", [-1, 3, 200])
def test_a_queue_that_is_not_there_is_refused_by_every_method(method: str, number: int) -> None:
    """In a process of its own, which an access outside the queues may crash or hang."""
    program = (
        "import sys; from vfsd.guest.driver.device import Device\n"
        "transport = Device.connect(sys.argv[1], queues=2).transport\n"
        "try: getattr(transport, sys.argv[2])(int(sys.argv[3]))\n"
        "except (ValueError, IndexError, OverflowError): print('refused', flush=True)\n"
        "import os; os._exit(0)\n"
    )
    with FakeDaemon() as fake:
        run = subprocess.run(
            [sys.executable, "-c", program, fake.path, method, str(number)],
            cwd=ROOT_DIR, capture_output=True, text=True, timeout=5,
        )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "refused\n")
