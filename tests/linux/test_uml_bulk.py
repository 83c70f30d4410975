"""Much of everything, through user-mode Linux: many files, large files, long directories."""

from __future__ import annotations

import resource

import checks
import pytest
from share import Share
from workloads.listing import listing_sum

pytestmark = pytest.mark.uml

ENTRIES = 20_000


def test_tree_of_5000_files_goes_both_ways(share: Share) -> None:
    checks.tree_goes_both_ways(share, 5000)


def test_file_of_512_mib_goes_both_ways(share: Share) -> None:
    checks.large_file_goes_both_ways(share, 512)


def test_directory_of_20000_entries_is_listed_completely(share: Share) -> None:
    host, guest = share.directory("listing")
    for number in range(ENTRIES):
        (host / f"entry-{number:05}-{'x' * (number % 60)}").write_bytes(b"x" * (number % 17))
    answer = share.workload("listing.py", guest, timeout=120)
    assert answer["names"] == answer["distinct"] == ENTRIES
    assert answer["first"] == answer["second"] == listing_sum(host)
    assert answer["while_changing"] == answer["while_changing_distinct"] == ENTRIES

    # The lines count because no name here holds a newline; "total" and the directory are one each.
    counted = share.guest.check(f"ls -l {guest} | wc -l; find {guest} -ls | wc -l", 120)
    assert counted.split() == [str(ENTRIES + 1), str(ENTRIES + 1)]

    # The guest's kernel holds all of these inodes now, and the daemon has so many descriptors at
    # most. It has to stay usable.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert len(share.daemon.descriptors()) < most
    share.guest.check(f"echo still here >{guest}/after; cat {guest}/after {guest}/entry-00016-*")
    assert (host / "after").read_text() == "still here\n"


def test_directory_of_20000_entries_is_made_and_removed(share: Share) -> None:
    host, guest = share.directory("making")
    share.guest.check(
        f"{share.guest.python} -S -c 'import os\nfor n in range({ENTRIES}): "
        f'os.close(os.open(f"{guest}/{{n}}", os.O_CREAT))\'',
        120,
    )
    assert {path.name for path in host.iterdir()} == {str(number) for number in range(ENTRIES)}
    share.guest.check(f"rm -r {guest}", 120)
    assert not host.exists()
