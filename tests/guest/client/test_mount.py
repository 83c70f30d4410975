"""Mounting and unmounting: by tag, shared, failing at each step, with INIT in the background."""

from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path

import pytest

from vfsd.guest import Device, Instances, mount, mount_device, mount_tag
from vfsd.guest.client import objects
from vfsd.guest.client.instances import STEPS
from vfsd.guest.client.options import parse_options

from .conftest import StartPeer

NOTHING = dict.fromkeys(objects.KINDS, 0)


def test_mount_finds_the_device_by_its_tag(start: StartPeer, shared: Path) -> None:
    (shared / "file").touch()
    device = Device.connect(start(options=("tag=music",)).socket, order="crosvm")
    instances = Instances()
    instances.add(device)
    assert device.tag == "music"
    with mount_tag(instances, "music") as fs:
        assert fs.listdir("/") == ["file"]
    for tag in ("other", ""):
        with pytest.raises(OSError, match="not found") as caught:
            mount_tag(instances, tag)
        assert caught.value.errno == errno.EINVAL
    instances.remove(device)
    with pytest.raises(OSError, match="not found"):
        mount_tag(instances, "music")
    device.remove()


def test_two_devices_of_a_guest_can_t_have_the_same_tag(device: Device, start: StartPeer) -> None:
    instances = Instances()
    instances.add(device, "same")  # QEMU's tag, which the daemon does not know
    other = Device.connect(start().socket)
    with pytest.raises(FileExistsError):
        instances.add(other, "same")
    other.remove()


def test_a_second_mount_shares_the_superblock(device: Device, shared: Path) -> None:
    with mount_device(device) as first:
        first.write_bytes("/file", b"x")
        with mount_device(device, "ro,dax=never") as second:
            assert second.sb is first.sb
            assert second.stat("/file").st_dev == first.stat("/file").st_dev
            assert second.conn.requests == first.conn.requests
            assert sum(n for op, n in first.conn.requests.items() if op.name == "INIT") == 1
            with pytest.raises(OSError):
                second.unlink("/file")  # its own ro counts
            assert objects.alive()["connections"] == objects.alive()["mounts"] == 1
        first.unlink("/file")  # not unmounted with the second
    assert objects.alive() == NOTHING


def test_a_read_only_superblock_stays_so_for_a_second_mount(device: Device) -> None:
    with mount_device(device, "ro") as first, mount_device(device, "rw,dax=inode") as second:
        assert (first.options, second.options) == ("ro", "ro")
        with pytest.raises(OSError) as caught:
            second.mkdir("/dir")
        assert caught.value.errno == errno.EROFS


def test_destroy_is_sent_once_with_the_last_mount(device: Device) -> None:
    first, second = mount_device(device), mount_device(device)
    first.stat("/")
    conn = first.conn
    names = lambda: [opcode.name for opcode, count in conn.requests.items() for _ in range(count)]  # noqa: E731
    second.close()
    assert "DESTROY" not in names()
    first.close()
    assert names().count("DESTROY") == 1


def test_nothing_is_forgotten_at_unmount_but_by_destroy(device: Device, shared: Path) -> None:
    for number in range(20):
        (shared / str(number)).touch()
    fs = mount_device(device)
    for number in range(20):
        fs.stat(f"/{number}")
    conn = fs.conn
    fs.close()
    sent = {opcode.name: count for opcode, count in conn.requests.items()}
    assert "FORGET" not in sent and sent["DESTROY"] == 1


def test_a_device_can_be_mounted_again(device: Device, shared: Path) -> None:
    for number in range(5):
        with mount_device(device) as fs:
            fs.write_bytes(f"/{number}", b"x")
            assert len(fs.listdir("/")) == number + 1
    device.reset()
    with mount_device(device) as fs:
        assert len(fs.listdir("/")) == 5


def test_unique_starts_again_with_each_mount(start: StartPeer) -> None:
    peer = start("qemu-virtiofsd", options=("log_level=debug",))
    device = Device.connect(peer.socket)
    for _ in range(2):
        with mount_device(device) as fs:
            fs.stat("/")
    device.remove()
    inits = [line for line in peer.log.splitlines() if "opcode: INIT" in line]
    assert len(inits) == 2
    assert all("unique: 2," in line for line in inits), inits


def test_mount_does_not_wait_for_init(start: StartPeer) -> None:
    peer = start()
    device = Device.connect(peer.socket)
    peer.stop()
    fs = mount_device(device)
    assert not fs.conn.initialized.is_set()
    found: list[os.stat_result] = []
    asker = threading.Thread(target=lambda: found.append(fs.stat("/")))
    asker.start()
    assert not found
    peer.go_on()
    asker.join(10)
    assert found
    fs.close()
    device.remove()


@pytest.mark.parametrize("step", [*STEPS, "mount_point"])
def test_a_mount_that_fails_at_any_step_leaks_nothing(device: Device, step: str) -> None:
    taken: list[str] = []

    def steps(name: str) -> None:
        taken.append(name)
        if name == step:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with pytest.raises(OSError) as caught:
        mount_device(device, steps=steps)
    assert caught.value.errno == errno.ENOMEM
    assert taken[-1] == step
    assert objects.alive() == NOTHING
    assert device.transport.in_flight == 0
    with mount_device(device) as fs:
        assert fs.listdir("/") == []


@pytest.mark.parametrize("step", ["queue_size", "alloc_conn", "alloc_mount", "sget", "mount_point"])
def test_a_second_mount_that_fails_leaves_the_first_alone(device: Device, step: str) -> None:
    def steps(name: str) -> None:
        if name == step:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with mount_device(device) as fs:
        fs.stat("/")
        before = objects.alive()
        with pytest.raises(OSError):
            mount_device(device, steps=steps)
        assert objects.alive() == before
        assert fs.listdir("/") == []


@pytest.mark.parametrize("option", ["mand", "foo", "foo=bar", "dax=sometimes", "ro=1", "nosuid,allow_other"])
def test_an_unknown_option_is_refused_by_name_and_leaks_nothing(device: Device, option: str) -> None:
    name = option.split(",")[-1].split("=")[0]
    with pytest.raises(OSError, match=f"'{name}'") as caught:
        mount_device(device, option)
    assert caught.value.errno == errno.EINVAL
    assert objects.alive() == NOTHING


def test_dax_without_a_window_is_refused(device: Device) -> None:
    for options in ("dax", "dax=always"):
        with pytest.raises(OSError, match="does not support it") as caught:
            mount_device(device, options)
        assert caught.value.errno == errno.EINVAL
        assert objects.alive() == NOTHING


@pytest.mark.parametrize(
    ("given", "shown"),
    [("", "rw"), ("ro", "ro"), ("ro,rw", "rw"), ("dax=inode", "rw,dax=inode"), ("dax", "rw,dax=always"),
     ("ro,nosuid,nodev,noexec,relatime,dirsync,lazytime,dax=never", "ro,dax=never")],
)  # fmt: skip
def test_options_are_shown_as_the_kernel_shows_them(given: str, shown: str) -> None:
    assert parse_options(given).show() == shown


@pytest.mark.parametrize("dax", ["dax=inode", "dax=never"])
def test_dax_modes_without_a_window_are_accepted_and_off(device: Device, dax: str) -> None:
    with mount_device(device, dax) as fs:
        fs.write_bytes("/file", b"x")
        assert fs.options == f"rw,{dax}"


def test_an_unmounted_file_system_says_so(device: Device) -> None:
    fs = mount_device(device)
    fs.close()
    fs.close()
    for call in (lambda: fs.stat("/"), lambda: fs.open("/file", "w"), lambda: fs.listdir("/"), fs.umount):
        with pytest.raises(OSError, match="unmounted"):
            call()
    assert fs.stats()["requests"]["DESTROY"] == 1


def test_mounts_do_not_keep_the_guest_s_memory(start: StartPeer) -> None:
    def held() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:vfsd-guest")

    peer = start()
    gc.collect()  # what other tests have left
    before = held()
    for _ in range(3):
        with mount(peer.socket) as fs:
            fs.write_bytes("/file", b"x")
            fs.listdir("/")
            assert held() == before + 1
        del fs
        assert held() == before


def test_a_busy_file_system_is_not_unmounted(device: Device) -> None:
    with mount_device(device) as fs:
        file = fs.open("/file", "w")
        with pytest.raises(OSError) as caught:
            fs.umount()
        assert caught.value.errno == errno.EBUSY
        file.close()
        fs.umount()
    assert objects.alive() == NOTHING


def test_the_end_of_the_with_block_closes_what_is_open(kind: str, start: StartPeer, shared: Path) -> None:
    with mount(start(kind).socket) as fs:
        file = fs.open("/file", "w")
        file.write(b"written")
    assert file.closed
    assert (shared / "file").read_bytes() == b"written"
    assert objects.alive() == NOTHING


def test_a_lost_device_fails_requests_and_can_be_unmounted(kind: str, start: StartPeer) -> None:
    peer = start(kind)
    with mount(peer.socket) as fs:
        fs.write_bytes("/file", b"x")
        file = fs.open("/file")
        peer.stop()
        failed: list[OSError] = []

        def ask() -> None:
            try:
                fs.statvfs("/")
            except OSError as problem:
                failed.append(problem)

        asker = threading.Thread(target=ask)
        asker.start()
        peer.kill()
        asker.join(10)
        assert failed[0].errno in (errno.EIO, errno.ENOTCONN)
        with pytest.raises(OSError) as caught:
            fs.statvfs("/")
        assert caught.value.errno == errno.ENOTCONN
        del file
    assert objects.alive() == NOTHING


def test_a_removed_device_can_t_be_mounted(start: StartPeer) -> None:
    peer = start()
    device = Device.connect(peer.socket)
    gone = threading.Event()
    device.on_gone = gone.set
    peer.kill()
    assert gone.wait(10)
    with pytest.raises(OSError, match="gone") as caught:
        mount_device(device)
    assert caught.value.errno == errno.EINVAL
    assert objects.alive() == NOTHING
    device.remove()


@pytest.mark.parametrize("order", ["qemu", "cloud-hypervisor", "crosvm", "uml", "libkrun"])
def test_mounts_by_the_order_of_each_front_end(start: StartPeer, order: str) -> None:
    with mount(start(options=("tag=fs",)).socket, order=order) as fs:
        fs.write_bytes("/file", b"x" * 100_000)
        assert fs.read_bytes("/file") == b"x" * 100_000


@pytest.mark.parametrize("minor", [38, 41, 45])
def test_speaks_as_older_kernels_do(kind: str, start: StartPeer, minor: int) -> None:
    with mount(start(kind).socket, minor=minor) as fs:
        fs.write_bytes("/file", b"x")
        assert fs.read_bytes("/file") == b"x"
        assert fs.conn.minor <= minor


@pytest.mark.parametrize("queue_size", [8, 16, 128])
def test_small_queues_carry_large_files(kind: str, start: StartPeer, queue_size: int, shared: Path) -> None:
    data = os.urandom(300_001)
    with mount(start(kind).socket, queue_size=queue_size) as fs:
        fs.write_bytes("/file", data)
        fs.drop_caches()
        assert fs.read_bytes("/file") == data
        assert fs.conn.max_pages == queue_size - 4
    assert (shared / "file").read_bytes() == data


def test_scrambled_framing_means_the_same(start: StartPeer, shared: Path) -> None:
    data = os.urandom(100_000)
    with mount(start().socket, scramble=7) as fs:
        fs.write_bytes("/file", data)
        fs.mkdir("/dir")
        fs.drop_caches()
        assert fs.read_bytes("/file") == data
        assert sorted(fs.listdir("/")) == ["dir", "file"]
