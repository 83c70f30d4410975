"""libvirt starts a guest whose <filesystem> names vfsd-virtiofsd: the guest works, and each kind of end."""

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests.daemon import eventually
from guests.libvirt import Libvirt, LibvirtGuest

from launchers.process import BINARY

pytestmark = pytest.mark.libvirt

ALL_THAT_XML_HAS = (
    "<cache mode='none'/><sandbox mode='chroot'/><lock posix='on' flock='on'/><thread_pool size='4'/>"
)


@pytest.fixture(scope="module")
def libvirt() -> Iterator[Libvirt]:
    if missing := Libvirt.missing():
        pytest.skip(missing)
    with Libvirt() as libvirt:
        yield libvirt


@pytest.fixture
def guest(libvirt: Libvirt, place: Path) -> Iterator[LibvirtGuest]:
    guest = LibvirtGuest(libvirt, place / "share", Path(BINARY))
    yield guest
    guest.kill()


def work(guest: LibvirtGuest) -> None:
    guest.mount()
    guest.check(f"cd {guest.share} && echo from the guest >g && mkdir -p d && cp /bin/busybox d")
    assert (guest.shared / "g").read_text() == "from the guest\n"
    (guest.shared / "h").write_text("from the host\n")
    assert guest.check(f"cat {guest.share}/h") == "from the host\n"
    guest.check(f"cd {guest.share} && cmp /bin/busybox d/busybox && rm -r d")


def begin(guest: LibvirtGuest) -> int:
    """The id of the daemon's first process."""
    try:
        guest.start()
    except BaseException as problem:
        raise AssertionError(f"{problem}\n{guest.daemon_log()}") from problem
    first, *_ = guest.daemons()
    return first


def assert_no_daemon(guest: LibvirtGuest) -> None:
    assert eventually(lambda: not guest.daemons()), guest.daemon_log()
    assert "Traceback" not in guest.daemon_log()


def test_a_guest_works_powers_off_and_is_started_again(guest: LibvirtGuest) -> None:
    begin(guest)
    work(guest)
    assert "Waiting for vhost-user socket connection" in guest.daemon_log()
    guest.poweroff()
    assert_no_daemon(guest)
    guest.inside_binary = ALL_THAT_XML_HAS
    begin(guest)
    work(guest)
    with (guest.shared / "h").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = guest.run(f"{guest.python} -c 'import fcntl; fcntl.flock(open(\"{guest.share}/h\"), 6)'")
        assert "BlockingIOError" in refused.output
    guest.destroy()
    assert_no_daemon(guest)


def test_the_domain_outlives_a_killed_daemon_and_gets_another_when_it_is_started_again(
    guest: LibvirtGuest,
) -> None:
    os.kill(begin(guest), signal.SIGKILL)
    assert_no_daemon(guest)
    assert guest.running
    guest.destroy()
    begin(guest)
    work(guest)
    guest.destroy()
    assert_no_daemon(guest)
