"""A daemon that comes back is connected to again."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guests.daemon import eventually

from vfsd.fuse import abi
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.driver.device import Device
from vfsd.vhost.orders import ORDERS


@contextmanager
def serving(place: Path, share: Path) -> Iterator["subprocess.Popen[str]"]:
    words = [sys.executable, "-m", "vfsd", "serve", "--socket", str(place), "--shared-dir", str(share)]
    process = subprocess.Popen(
        [*words, "--tag", "t"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stderr is not None and "READY" in process.stderr.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def session(device: Device) -> None:
    args = abi.INIT_IN.pack(abi.KERNEL_VERSION, abi.KERNEL_MINOR_VERSION, 0, 0, 0)
    device.transport.call(Opcode.INIT, 0, args, out=abi.INIT_OUT.size, argvar=True)
    args = abi.GETATTR_IN.pack(0, 0, 0)
    device.transport.call(Opcode.GETATTR, abi.ROOT_ID, args, out=abi.ATTR_OUT_SIZE)


@pytest.mark.parametrize("order", ORDERS)
def test_a_device_works_again_after_its_daemon_was_killed(tmp_path: Path, order: str) -> None:
    share, place = tmp_path / "share", tmp_path / "s"
    share.mkdir()
    with serving(place, share):
        device = Device.connect(place, order=order)
        session(device)
    try:
        assert eventually(lambda: device.gone is not None)
        with pytest.raises(ConnectionRefusedError):
            device.reconnect()
        held = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with serving(place, share):
                device.reconnect()
                assert device.gone is None
                session(device)
            assert eventually(lambda: device.gone is not None)
        assert len(os.listdir("/proc/self/fd")) == held
    finally:
        device.remove()
    with pytest.raises(OSError, match="removed"):
        device.reconnect()


def test_a_device_that_is_there_is_not_connected_twice(tmp_path: Path) -> None:
    share, place = tmp_path / "share", tmp_path / "s"
    share.mkdir()
    with serving(place, share):
        device = Device.connect(place)
        with pytest.raises(OSError, match="there already"):
            device.reconnect()
        session(device)
        device.remove()
