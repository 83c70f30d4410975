"""The same through a virtual machine: QEMU's PCI device, Debian's cloud kernel, no KVM."""

from __future__ import annotations

import checks
import pytest
from guests.qemu import QemuGuest
from share import Share

pytestmark = pytest.mark.qemu


def test_device_has_the_queues_it_was_given(qemu_share: Share) -> None:
    interrupts = qemu_share.guest.check("grep -c virtio0-requests /proc/interrupts")
    assert int(interrupts) == getattr(qemu_share.guest, "request_queues", None)


def test_tree_goes_both_ways(qemu_share: Share) -> None:
    checks.tree_goes_both_ways(qemu_share, 300, times=False)


def test_large_file_goes_both_ways(qemu_share: Share) -> None:
    checks.large_file_goes_both_ways(qemu_share, 64)


def test_awkward_names_are_exact(qemu_share: Share) -> None:
    checks.awkward_names(qemu_share)


def test_open_files_are_readable_after_rename_and_unlink(qemu_share: Share) -> None:
    checks.open_files_lose_their_names(qemu_share)


def test_links_fifos_sockets_and_errors(qemu_share: Share) -> None:
    checks.links_fifos_sockets_and_errors(qemu_share)


def test_mode_owner_and_nanoseconds_reach_the_host(qemu_share: Share) -> None:
    checks.metadata_reaches_the_host(qemu_share)


def test_sparse_files_stay_sparse(qemu_share: Share) -> None:
    checks.holes_stay_holes(qemu_share)


def test_appends_from_two_processes_keep_every_record(qemu_share: Share) -> None:
    checks.appends_keep_every_record(qemu_share, 500)


def test_random_writes_are_read_back(qemu_share: Share) -> None:
    checks.random_writes_are_read_back(qemu_share, 500)


def test_a_paused_guest_goes_on_with_its_open_files(qemu_share: Share) -> None:
    guest = qemu_share.guest
    assert isinstance(guest, QemuGuest)
    guest.check(f"exec 7>{guest.share}/open; echo before >&7; sleep 1000 7>&7 & echo $! >/tmp/holder")
    guest.monitor("stop")
    guest.monitor("cont")
    guest.check("echo after >>/proc/$(cat /tmp/holder)/fd/7 && kill $(cat /tmp/holder)")
    assert (qemu_share.host / "open").read_text() == "before\nafter\n"
