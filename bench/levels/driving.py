"""Runs a load on a device, and says what was wrong when it does not end as it should."""

from __future__ import annotations

import errno
import os
import select
import time

from vfsd.fuse.opcodes import NAME
from vfsd.guest.driver.device import Device

from .._load import Load
from ..daemons import Running
from ..model import Failed, NotOffered, Setting
from ..steps import Wrong
from .place import Place

SLOTS = 256  # as `vfsd mount` has them
LOOK_S = 0.1  # how often a load is looked after
WRONG = {
    Wrong.LENGTH: "{got} bytes, not {want}",
    Wrong.NODE: "nodeid {got}, not {want}",
    Wrong.MODE: "mode {got:o}, not {want:o}",
    Wrong.SIZE: "size {got}, not {want}",
    Wrong.DATA: "wrong contents from byte {got} of the file on",
    Wrong.BYTES: "{got} bytes that are not the {want} expected",
    Wrong.LISTING: "a listing that breaks off in an entry, {got} of {want} bytes in",
    Wrong.ENTRIES: "{got} entries, not {want}",
}
GONE_S = 1.0  # from a closed connection to the end of the process


def connected(running: Running, setting: Setting, place: Place, poll: bool, slots: int = SLOTS) -> Device:
    """Our device on a daemon's socket. Failed; NotOffered: it can't have so many queues."""
    try:
        with place.pinning.use(place.pinning.front):
            return Device.connect(
                running.socket, queues=setting.queues, queue_size=setting.queue_size, slots=slots,
                poll=poll, timeout_s=place.no_reply,
            )  # fmt: skip
    except OSError as problem:
        running.expect_alive("during the handshake")
        kind = NotOffered if problem.errno == errno.EINVAL else Failed
        raise kind(problem.strerror or str(problem)) from problem


def expect_device(device: Device, running: Running, when: str) -> None:
    """Failed: the process or the connection has ended."""
    running.expect_alive(when)
    if device.gone is None:
        return
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        running.expect_alive(when)
        time.sleep(0.01)
    raise Failed(f"{device.gone} {when}{running.last_words()}")


def expect_right(load: Load) -> None:
    """Failed: a reply was wrong."""
    if load.failure is None:
        return
    step, code, got, wanted = load.failure
    opcode = load.program.steps[step].opcode
    if code == Wrong.ERROR:
        text = f"{errno_name(got)}, not {errno_name(wanted)}"
    else:
        text = WRONG[Wrong(code)].format(got=got, want=wanted)
    raise Failed(f"{NAME.get(opcode, f'opcode {opcode}')} answered {text}")


def errno_name(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "success"


def abandon(device: Device, load: Load) -> None:
    """Get the slots back from a daemon that does not answer."""
    load.stop()
    device.transport.abort(errno.ETIMEDOUT)
    select.select([load.wait_fd], [], [])
    load.finish()


def wait(device: Device, load: Load, patience: float) -> None:
    """Until it has ended. Failed: nothing was answered for so many seconds; the device is lost then."""
    seen, since = -1, time.monotonic()
    try:
        while not select.select([load.wait_fd], [], [], LOOK_S)[0]:
            now = time.monotonic()
            if load.progress != seen:
                seen, since = load.progress, now
            elif now - since > patience:
                raise Failed(f"did not answer for {patience:g} s")
    except BaseException:
        abandon(device, load)
        raise
    load.finish()


def drive(
    device: Device, running: Running, load: Load, name: str, patience: float, seconds: float,
    ops_min: int = 0, whole: bool = False, seed: int = 0,
) -> float:  # fmt: skip
    """Run it, see Load.start: seconds from the first request to the last reply. Failed."""
    began = time.monotonic_ns()
    load.start(seconds, ops_min, whole, seed)
    wait(device, load, patience)
    expect_device(device, running, f"in the middle of {name}")
    expect_right(load)
    return (load.totals()[4] - began) / 1e9


def seed() -> int:
    """Of contents that no run before has written."""
    return int.from_bytes(os.urandom(7), "little") | 1
