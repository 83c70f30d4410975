"""A driver on a fake daemon, and proof that nothing of either stays behind."""

import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from vfsd.guest.driver._transport import Transport
from vfsd.guest.driver.device import Device

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from guests.daemon import eventually

from .fakedaemon import DEADLINE_S, FakeDaemon, Handler, answer


def driver_threads() -> list[str]:
    """Threads of this process that are neither the test's nor the fake daemon's."""
    return sorted(
        t.name for t in threading.enumerate() if t.name.startswith(("virtio", "hiprio", "requests."))
    )


def descriptors() -> list[str]:
    """What this process has open, without inode numbers."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0])
        except FileNotFoundError:
            continue  # the listing's own
    return sorted(found)


class Background:
    """A function in a thread of its own, which may hang without hanging the test."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="test-background", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error
        self._done.set()

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    def result(self, timeout_s: float = DEADLINE_S) -> Any:
        assert self._done.wait(timeout_s), f"hangs: {self._function}"
        self.thread.join()
        if self._error is not None:
            raise self._error
        return self._value


class Rig:
    """A fake daemon and a device on it."""

    def __init__(self, fake: FakeDaemon, device: Device) -> None:
        self.fake = fake
        self.device = device

    @property
    def transport(self) -> Transport:
        return self.device.transport

    def counter(self, queue: str, name: str) -> int:
        return self.transport.counters()[queue][name]

    def close(self) -> None:
        self.fake.close()
        if not self.device._removed:
            assert eventually(lambda: self.device.gone is not None)
        self.device.remove()


class StartRig(Protocol):
    def __call__(
        self, handler: Handler = ..., *, fake: dict[str, Any] | None = ..., **connect: Any
    ) -> Rig: ...


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """Descriptors and threads are back to what they were when the test has ended."""
    files, threads = Counter(descriptors()), Counter(driver_threads())

    def left() -> Counter[str]:
        return Counter(descriptors()) - files + (Counter(driver_threads()) - threads)

    yield
    if left():
        gc.collect()
        eventually(lambda: not left())  # the threads of ends that may block are nobody's to join
    assert not left()


@pytest.fixture
def rig(no_leak: None) -> Iterator[StartRig]:
    """Starts rigs: handler and fake for the daemon, the rest for Device.connect."""
    with ExitStack() as stack:

        def start(handler: Handler = answer, *, fake: dict[str, Any] | None = None, **connect: Any) -> Rig:
            daemon = stack.enter_context(FakeDaemon(handler, **(fake or {})))
            rig = Rig(daemon, Device.connect(daemon.path, **{"timeout_s": DEADLINE_S, **connect}))
            stack.callback(rig.close)
            return rig

        yield start


@pytest.fixture
def held(rig: StartRig) -> Callable[..., Rig]:
    """The same with a daemon that keeps all chains until the test answers them."""

    def start(**connect: Any) -> Rig:
        made = rig(**connect)
        made.fake.handler = made.fake.hold
        return made

    return start
