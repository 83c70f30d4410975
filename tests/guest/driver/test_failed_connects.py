"""A connect that fails leaves nothing behind, whatever it failed at and however often."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from guests.daemon import eventually

from vfsd.guest.driver.device import Device
from vfsd.vhost import messages
from vfsd.vhost.messages import FrontendRequest, Message
from vfsd.vhost.orders import ORDERS

from .conftest import driver_threads
from .fakedaemon import FakeDaemon
from .test_lies import ASKS, messages_of

TIMES = 100
LAST = FrontendRequest.SET_VRING_ENABLE  # of user-mode Linux


@contextmanager
def nothing_stays_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) == before and not driver_threads())


@contextmanager
def no_more_threads() -> Iterator[None]:
    """A new thread's stack would not fit into the address space."""
    before = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(before)


def connect_in_vain(fake: FakeDaemon, order: str, timeout_s: float = 10.0) -> None:
    """Where the daemon goes after its last word, the device is lost a moment later."""
    try:
        device = Device.connect(fake.path, order=order, slots=4, queue_size=8, timeout_s=timeout_s)
    except (OSError, RuntimeError):
        return
    assert eventually(lambda: device.gone is not None)
    device.remove()


@pytest.mark.parametrize("order", ORDERS)
def test_the_daemon_closes_at_each_message(order: str) -> None:
    count = len(messages_of(order, 1))
    with FakeDaemon() as fake, nothing_stays_open():
        for number in range(max(TIMES, count)):
            fake.close_at = number % count
            connect_in_vain(fake, order)


def test_the_daemon_stops_answering_at_each_message() -> None:
    asked = [n for n, request in enumerate(messages_of("uml", 1)) if request in ASKS]
    with nothing_stays_open():
        for number in range(TIMES):
            with FakeDaemon(mute_at=asked[number % len(asked)]) as fake:
                connect_in_vain(fake, "uml", 0.01)


def test_the_daemon_lies_in_each_answer() -> None:
    sent: list[Message] = []

    def garble(message: Message, data: bytes) -> bytes:
        sent.append(message)
        return data if len(sent) < lie_at else bytes(len(data))

    lie_at = 10**6
    with FakeDaemon(garble=garble) as fake:
        Device.connect(fake.path, order="uml", slots=4, queue_size=8).remove()
        answers = sent.index(next(message for message in sent if message.request == LAST))
    with FakeDaemon(garble=garble) as fake, nothing_stays_open():
        for number in range(TIMES):
            sent.clear()
            lie_at = 1 + number % answers
            connect_in_vain(fake, "uml")


@pytest.mark.parametrize("order", ["qemu", "uml"])
def test_there_are_no_threads_to_be_had(order: str) -> None:
    with FakeDaemon() as fake, nothing_stays_open():
        for _ in range(TIMES):
            with no_more_threads(), pytest.raises(RuntimeError, match="thread"):
                Device.connect(fake.path, order=order, slots=4, queue_size=8)


def test_there_is_no_thread_for_the_watcher_alone() -> None:
    """It is started last, after the tag has been read from a daemon that was not asked before."""
    size = threading.stack_size()

    def garble(message: Message, data: bytes) -> bytes:
        if message.request == FrontendRequest.GET_CONFIG:
            threading.stack_size(1 << 46)
        return data

    try:
        with FakeDaemon(garble=garble) as fake, nothing_stays_open():
            for _ in range(TIMES):
                threading.stack_size(size)
                with pytest.raises(RuntimeError, match="thread"):
                    Device.connect(fake.path, order="libkrun", slots=4, queue_size=8)
    finally:
        threading.stack_size(size)


@pytest.mark.parametrize(
    "impossible",
    [
        {"slots": 1 << 32},  # no C type has room for
        {"slots": 1 << 31, "max_pages_limit": 1 << 30},  # no memory
        {"queues": 5000},
    ],
)
def test_what_can_not_be_made(impossible: dict[str, int]) -> None:
    with FakeDaemon() as fake, nothing_stays_open():
        for _ in range(TIMES):
            with pytest.raises((OSError, OverflowError, MemoryError)):
                Device.connect(fake.path, **impossible)


def test_resets_and_reconnects_that_fail() -> None:
    def refuse(message: Message, data: bytes) -> bytes:
        return messages.encode(message.request, b"", messages.REPLY) if refusing else data

    refusing = False
    with FakeDaemon(garble=refuse) as fake, nothing_stays_open():
        device = Device.connect(fake.path, order="uml", slots=4, queue_size=8)
        for step in [device.reset, *[device.reconnect] * TIMES]:
            refusing = True
            with pytest.raises(OSError, match="broke off"):
                step()
            assert device.gone is not None
        refusing = False
        device.reconnect()
        assert device.gone is None
        failing: Callable[[], None] = device.reset
        with no_more_threads(), pytest.raises(RuntimeError, match="thread"):
            failing()
        device.reconnect()
        device.remove()
