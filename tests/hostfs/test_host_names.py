"""What acts on the host is the host's: a guest stores none of it unless the operator asks for that."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EPERM
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import StartDaemon

NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # of revision 2
HOSTS_NAMES = {b"trusted.a": b"1", b"security.a": b"1", b"security.capability": NET_RAW}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="nothing that another user stores acts on the host")


@contextmanager
def guest_on(daemon: StartDaemon, share: Path, *options: str) -> Iterator[Guest]:
    """A guest that knows the file `f`."""
    (share / "f").write_bytes(b"program")
    with guests_of(daemon(share, options=options)) as start:
        guest = start()
        guest.init()
        yield guest


@pytest.mark.parametrize("name", HOSTS_NAMES)
@pytest.mark.parametrize("sandbox", ["namespace", "chroot", "none"])
def test_a_guest_stores_no_attribute_that_acts_on_the_host(
    daemon: StartDaemon, tmp_path: Path, sandbox: str, name: bytes
) -> None:
    with guest_on(daemon, tmp_path, "--xattr", f"--sandbox={sandbox}") as guest:
        nodeid = guest.walk("f")
        with refused(EPERM):
            guest.setxattr(nodeid, name, HOSTS_NAMES[name])
        guest.setxattr(nodeid, b"user.a", b"1")
    assert os.listxattr(tmp_path / "f") == ["user.a"]


def test_a_guest_may_take_the_hosts_file_capabilities_away(daemon: StartDaemon, tmp_path: Path) -> None:
    with guest_on(daemon, tmp_path, "--xattr") as guest:
        os.setxattr(tmp_path / "f", "security.capability", NET_RAW)
        nodeid = guest.walk("f")
        assert guest.getxattr(nodeid, b"security.capability") == NET_RAW
        guest.removexattr(nodeid, b"security.capability")
    assert os.listxattr(tmp_path / "f") == []


def test_what_is_asked_for_is_stored(daemon: StartDaemon, tmp_path: Path) -> None:
    with guest_on(daemon, tmp_path, "--xattr", "--modcaps=+sys_admin:+setfcap") as guest:
        nodeid = guest.walk("f")
        for name, value in HOSTS_NAMES.items():
            guest.setxattr(nodeid, name, value)
    assert sorted(map(os.fsencode, os.listxattr(tmp_path / "f"))) == sorted(HOSTS_NAMES)


def test_under_other_names_a_guest_has_them_all(daemon: StartDaemon, tmp_path: Path) -> None:
    with guest_on(daemon, tmp_path, "--xattrmap=:map::user.virtiofs.:") as guest:
        nodeid = guest.walk("f")
        for name, value in HOSTS_NAMES.items():
            guest.setxattr(nodeid, name, value)
            assert guest.getxattr(nodeid, name) == value
    assert all(name.startswith("user.virtiofs.") for name in os.listxattr(tmp_path / "f"))


def test_a_guest_makes_device_nodes_only_where_it_may(daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    with guest_on(daemon, tmp_path / "with") as guest:
        guest.mknod(ROOT, b"null", 0o020600, os.makedev(1, 3))
    with guest_on(daemon, tmp_path / "without", "--nodev") as guest:
        with refused(EPERM):
            guest.mknod(ROOT, b"null", 0o020600, os.makedev(1, 3))
        guest.mknod(ROOT, b"fifo", 0o010600)
    assert sorted(os.listdir(tmp_path / "without")) == ["f", "fifo"]
