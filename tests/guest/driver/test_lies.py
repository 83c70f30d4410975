"""Daemons that lie or break off: an OSError or the end of the device, never a crash, hang or leak."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guests.daemon import eventually

from vfsd.guest.driver.device import Device
from vfsd.vhost import messages
from vfsd.vhost.messages import HEADER, U64, BackendRequest, FrontendRequest, Message
from vfsd.vhost.orders import ORDERS

from .conftest import Background, Rig, StartRig, driver_threads
from .fakedaemon import DEADLINE_S, FakeDaemon, FakeQueue
from .requests import DESTROY
from .test_full_queue import IDLE_CPU_S, Results, cpu_of_idle
from .test_life import EIO, ENOTCONN, destroy, error_of

ROOT_DIR = Path(__file__).resolve().parents[3]

# ---- the used ring

RING_LIES: dict[str, Callable[[FakeQueue, int], None]] = {
    "a used index that runs away": lambda q, head: q.move_used(30_000),
    "a used index one too far": lambda q, head: q.move_used(5),
    "a used index that goes back": lambda q, head: q.move_used(-1),
    "an id outside the ring": lambda q, head: q.push_raw(q.num, 16),
    "an id of 4 GiB": lambda q, head: q.push_raw(0xFFFFFFFF, 16),
    "an id that is not in flight": lambda q, head: q.push_raw(q.num - 1, 16),
}


@pytest.mark.parametrize("name", RING_LIES)
def test_a_used_ring_that_cannot_be_true_ends_the_device_with_the_reason(
    held: Callable[..., Rig], name: str
) -> None:
    made, results = held(queues=2, queue_size=8, slots=16), Results()
    gone: list[str | None] = []
    made.device.on_gone = lambda: gone.append(made.device.gone)
    for node in range(4):
        made.transport.submit(results.done(node), DESTROY, node, queue=1)
    chains = made.fake.take(4)
    RING_LIES[name](made.fake.queues[1], chains[0].head)
    assert {error for _, error, _ in results.take(4)} == {EIO}
    assert error_of(lambda: destroy(made, 1)) == ENOTCONN
    assert eventually(lambda: len(gone) == 1)
    assert made.device.gone is not None
    assert "requests.0" in made.device.gone
    assert error_of(lambda: destroy(made, 2)) == ENOTCONN
    assert cpu_of_idle() < IDLE_CPU_S


@pytest.mark.parametrize("name", RING_LIES)
def test_the_same_on_hiprio(held: Callable[..., Rig], name: str) -> None:
    made = held(queue_size=8, slots=16)
    for node in range(4):
        made.transport.forget(node, 1)
    chains = made.fake.take(4)
    RING_LIES[name](made.fake.queues[0], chains[0].head)
    assert eventually(lambda: made.device.gone is not None)
    assert made.device.gone is not None
    assert "hiprio" in made.device.gone
    made.transport.drain()
    assert made.transport.in_flight == 0


def test_the_same_id_twice(held: Callable[..., Rig]) -> None:
    made = held(slots=8)
    call, other = Background(lambda: destroy(made)), Background(lambda: destroy(made))
    chain, second = made.fake.take(2)
    with chain.queue.lock:
        chain.reply(call=False)
        chain.give(16, call=False)
        chain.queue.call_always()
    ended = [one for one in (call, other) if ended_well(one)]
    assert len(ended) == 1
    second.reply()
    assert error_of(lambda: destroy(made)) == ENOTCONN


def ended_well(call: Background) -> bool:
    try:
        call.result()
    except OSError as error:
        assert error.errno == EIO
        return False
    return True


def test_a_reply_given_back_a_second_time_does_not_end_another_request_well(held: Callable[..., Rig]) -> None:
    """The head is in use again when it comes back the second time."""
    made = held(slots=1, queue_size=8)
    for _ in range(3):
        call = Background(lambda: destroy(made))
        chain = made.fake.next()
        chain.reply()
        call.result()
    call = Background(lambda: destroy(made))
    made.fake.next()
    chain.give(16)
    assert error_of(call.result) == EIO


# ---- the connection


def test_a_daemon_that_closes_ends_every_request_at_once(held: Callable[..., Rig]) -> None:
    made = held()
    call = Background(lambda: destroy(made))
    made.fake.next()
    made.fake.drop()
    assert error_of(lambda: call.result(2)) == EIO
    assert made.device.gone == "the daemon closed the connection"


@pytest.mark.parametrize(
    "what", ["garbage", "half a message", "a reply", "a huge message", "closed in a message"]
)
def test_garbage_on_the_back_end_channel_ends_the_device_with_the_reason(
    held: Callable[..., Rig], what: str
) -> None:
    made = held(order="uml")
    call = Background(lambda: destroy(made))
    made.fake.next()
    whole = messages.encode(BackendRequest.VRING_CALL, messages.VRING_STATE.pack(1, 0))
    made.fake.write_channel({
        "garbage": b"\xff" * 100,
        "half a message": whole[:-3],
        "a reply": messages.encode(BackendRequest.VRING_CALL, bytes(8), messages.REPLY),
        "a huge message": HEADER.pack(BackendRequest.VRING_CALL, 1, 2**32 - 1),
        "closed in a message": whole[:5],
    }[what])  # fmt: skip
    if what in ("half a message", "closed in a message"):
        assert cpu_of_idle() < IDLE_CPU_S
        assert made.device.gone is None
        made.fake.close_channel()
    assert error_of(lambda: call.result(5)) == EIO
    assert made.device.gone is not None
    assert "back-end channel" in made.device.gone


def test_calls_for_queues_that_are_not_there_and_unknown_messages_are_ignored(rig: StartRig) -> None:
    made = rig(order="uml")
    for index in (0, 1, 2, 7, 2**32 - 1):
        state = messages.VRING_STATE.pack(index, 0)
        made.fake.write_channel(messages.encode(BackendRequest.VRING_CALL, state))
    made.fake.write_channel(messages.encode(77, bytes(10)))
    destroy(made)
    assert made.device.gone is None


def test_a_daemon_that_truncates_guest_memory_does_not_kill_the_guest() -> None:
    """In a process of its own, which a SIGBUS would end."""
    program = (
        "import sys; from vfsd.guest.driver.device import Device\n"
        "device = Device.connect(sys.argv[1])\n"
        "print('connected', flush=True); sys.stdin.readline()\n"
        "try: device.transport.call(38, 0)\n"
        "except OSError: pass\n"
        "print('alive', flush=True); device.remove()\n"
    )
    with (
        FakeDaemon(keep_memory=True) as fake,
        subprocess.Popen(
            [sys.executable, "-c", program, fake.path],
            cwd=ROOT_DIR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as guest,
    ):  # fmt: skip
        assert guest.stdin is not None
        assert guest.stdout is not None
        assert guest.stdout.readline() == "connected\n"
        refused = []
        for fd in fake.memory_fds:
            try:
                os.ftruncate(fd, 0)
            except PermissionError:
                refused.append(fd)
        # This process maps the memory, too: it must not be used any more if it is gone.
        if len(refused) < len(fake.memory_fds):
            fake.handler = lambda chain: None
            guest.kill()
        print("go", file=guest.stdin, flush=True)
        assert guest.stdout.readline() == "alive\n"
        assert guest.wait(DEADLINE_S) == 0


# ---- the handshake


def outcome(fake: FakeDaemon, order: str, timeout_s: float, queues: int = 2) -> str:
    """What connect raises; where the daemon goes after its last word, the device is lost later."""
    try:
        device = Device.connect(
            fake.path, order=order, queues=queues, slots=4, queue_size=8, timeout_s=timeout_s
        )
    except OSError as error:
        assert error.errno
        assert error.filename == fake.path
        return str(error)
    try:
        assert eventually(lambda: device.gone is not None)
    finally:
        device.remove()
    return "lost later"


_F = FrontendRequest
ASKS = (
    *(_F.GET_FEATURES, _F.GET_PROTOCOL_FEATURES, _F.GET_QUEUE_NUM, _F.GET_CONFIG, _F.GET_MAX_MEM_SLOTS),
    *(_F.SET_VRING_KICK, _F.SET_VRING_ENABLE),
)


def messages_of(order: str, queues: int = 2) -> list[int]:
    """What connect sends."""
    with FakeDaemon() as fake:
        device = Device.connect(fake.path, order=order, queues=queues, slots=4, queue_size=8)
        device.frontend.get_features()  # the daemon has read all by then
        seen = fake.seen[:-1]
        device.remove()
        return seen


@pytest.mark.parametrize("order", ORDERS)
def test_a_daemon_that_closes_at_any_message_of_the_handshake(order: str) -> None:
    """The last messages of an order may have no answer: then connect succeeds and loses the device."""
    for number in range(len(messages_of(order))):
        with FakeDaemon(close_at=number) as fake:
            text = outcome(fake, order, DEADLINE_S)
        assert "broke off the handshake" in text or text == "lost later"
        assert "closed" in text or text == "lost later", (number, text)
    assert driver_threads() == []


@pytest.mark.parametrize("order", ["qemu", "uml"])
def test_a_daemon_that_never_answers_any_message_is_given_up(order: str) -> None:
    asked = [n for n, request in enumerate(messages_of(order, 1)) if request in ASKS]
    assert len(asked) > 5
    for number in asked:
        with FakeDaemon(mute_at=number) as fake:
            text = outcome(fake, order, 0.05, queues=1)
        assert "no reply for 0.05 s" in text, (number, text)


def _encode(message: Message, payload: bytes) -> bytes:
    return messages.encode(message.request, payload, messages.REPLY)


def _swap(message: Message, data: bytes) -> bytes:
    _, flags, size = HEADER.unpack_from(data)
    return HEADER.pack(FrontendRequest.SET_OWNER, flags, size) + data[HEADER.size :]


def _flags(change: int) -> Callable[[Message, bytes], bytes]:
    def garble(message: Message, data: bytes) -> bytes:
        request, flags, size = HEADER.unpack_from(data)
        return HEADER.pack(request, flags ^ change, size) + data[HEADER.size :]

    return garble


def _refuse(message: Message, data: bytes) -> bytes:
    acknowledges = messages.FRONTEND_SHAPES[message.request].reply is None
    return _encode(message, U64.pack(1)) if acknowledges else data


GARBLES: dict[str, Callable[[Message, bytes], bytes]] = {
    "another message": _swap,
    "no reply flag": _flags(messages.REPLY),
    "version 0": _flags(1),
    "version 2": _flags(3),
    "a payload too short": lambda m, data: _encode(m, data[HEADER.size : -1]),
    "a payload too long": lambda m, data: _encode(m, data[HEADER.size :] + b"x"),
    "4 GiB of payload": lambda m, data: HEADER.pack(m.request, 5, 2**32 - 1) + data[HEADER.size :],
    "random bytes": lambda m, data: os.urandom(64),
    "zeros": lambda m, data: bytes(64),
    "an acknowledgement that refuses": _refuse,
}


@pytest.mark.parametrize("name", GARBLES)
@pytest.mark.parametrize("order", ["qemu", "uml"])
def test_a_garbled_reply_to_any_message_is_an_oserror(order: str, name: str) -> None:
    with FakeDaemon(garble=lambda message, data: data) as fake:
        Device.connect(fake.path, order=order, queues=1, slots=4, queue_size=8).remove()
        kinds = dict.fromkeys(fake.seen)
    for kind in kinds:
        sent: list[int] = []

        def garble(message: Message, data: bytes, kind: int = kind, sent: list[int] = sent) -> bytes:
            if message.request == kind:
                sent.append(kind)
                return GARBLES[name](message, data)
            return data

        with FakeDaemon(garble=garble) as fake:
            try:
                Device.connect(fake.path, order=order, queues=1, slots=4, queue_size=8, timeout_s=2).remove()
            except OSError as error:
                assert sent
                assert "broke off the handshake: " in str(error)
                assert not str(error).endswith(": '")
                continue
        # Not answered, or only by the part of the order that stops, or not an acknowledgement.
        assert not sent or kind in (_F.GET_VRING_BASE, _F.GET_FEATURES) or name.startswith("an ")


@pytest.mark.parametrize("order", ORDERS)
def test_too_few_queues_are_named(order: str) -> None:
    with FakeDaemon(request_queues=2) as fake, pytest.raises(OSError, match="2 request queues, not 5"):
        Device.connect(fake.path, order=order, queues=5).remove()


def test_too_few_queues_in_the_config_space_are_named() -> None:
    with FakeDaemon(config_queues=1) as fake, pytest.raises(OSError, match="1 request queue"):
        Device.connect(fake.path, order="uml", queues=3).remove()


@pytest.mark.parametrize("tag", [b"", b"a\nb", b"\0hidden", b"\n"])
@pytest.mark.parametrize("order", ["crosvm", "uml"])
def test_a_tag_that_is_empty_or_has_a_newline_is_refused(order: str, tag: bytes) -> None:
    with FakeDaemon(tag=tag) as fake, pytest.raises(OSError, match="tag") as caught:
        Device.connect(fake.path, order=order).remove()
    assert caught.value.errno == errno.EINVAL


def test_a_config_space_without_request_queues_is_refused() -> None:
    with FakeDaemon(config_queues=0) as fake, pytest.raises(OSError, match="no request queue"):
        Device.connect(fake.path, order="uml").remove()


def test_no_socket_is_the_system_s_error_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{path}'"):
        Device.connect(path)


def test_a_socket_nobody_listens_on_is_refused(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        with pytest.raises(ConnectionRefusedError, match=f"Connection refused: '{path}'"):
            Device.connect(path)
    with pytest.raises(ConnectionRefusedError):
        Device.connect(path)


def test_what_is_no_socket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConnectionRefusedError):
        Device.connect(path)


def test_a_path_too_long_for_a_socket_is_named_as_that(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long") as caught:
        Device.connect(tmp_path / ("x" * 200))
    assert caught.value.errno


def test_a_daemon_that_does_not_accept_is_given_up(tmp_path: Path) -> None:
    """It listens, and its backlog takes us, but it never reads."""
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        with pytest.raises(OSError, match=r"no reply for 0\.1 s"):
            Device.connect(path, timeout_s=0.1)


def test_too_few_descriptors_at_any_step_leak_nothing() -> None:
    """In a process of its own, whose limit goes up by one until connect succeeds."""
    with FakeDaemon() as fake:
        run = subprocess.run(
            [sys.executable, "-c", COUNT_LEAKS, fake.path],
            cwd=ROOT_DIR, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    failures, leaks = map(int, run.stdout.split())
    assert failures > 10
    assert leaks == 0


# Prints how often connect failed for want of descriptors, and how many stayed open.
COUNT_LEAKS = """
import errno, os, resource, sys
from vfsd.guest.driver.device import Device
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
begin = {*os.listdir("/proc/self/fd")}
failures = 0
for limit in range(len(begin) - 1, len(begin) + 40):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        Device.connect(sys.argv[1], queues=2, slots=4, order="uml").remove()
    except OSError as error:
        assert error.errno in (errno.EMFILE, errno.EIO), error
        failures += 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(failures, len({*os.listdir("/proc/self/fd")} - begin))
"""
