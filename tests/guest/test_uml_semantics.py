"""What programs rely on, through user-mode Linux: names, open files, kinds, metadata, holes."""

from __future__ import annotations

import os
import stat

import checks
import pytest
from share import Share

pytestmark = pytest.mark.uml


def test_awkward_names_are_exact(share: Share) -> None:
    checks.awkward_names(share)


def test_open_files_are_readable_after_rename_and_unlink(share: Share) -> None:
    checks.open_files_lose_their_names(share)


def test_links_fifos_sockets_and_errors(share: Share) -> None:
    checks.links_fifos_sockets_and_errors(share)


def test_mode_owner_and_nanoseconds_reach_the_host(share: Share) -> None:
    checks.metadata_reaches_the_host(share)


def test_sparse_files_stay_sparse(share: Share) -> None:
    checks.holes_stay_holes(share)


def test_what_only_a_local_file_system_can_do(share: Share) -> None:
    host = checks.all_true(share, "hostops.py")
    assert (host / "copy").stat().st_size == 3 << 20
    assert (host / "named").read_bytes() == b"data"


def test_appends_from_two_processes_keep_every_record(share: Share) -> None:
    checks.appends_keep_every_record(share, 3000)


def test_random_writes_are_read_back(share: Share) -> None:
    checks.random_writes_are_read_back(share, 2000)


def test_files_belong_to_the_user_who_makes_them(share: Share) -> None:
    uid, gid, extra = 1234, 2345, 3456
    host, guest = share.directory("owner")
    host.chmod(0o777)
    # A directory whose group its files inherit, root's own directory, and root's own file.
    (host / "inherited").mkdir()
    os.chown(host / "inherited", 0, 4567)
    (host / "inherited").chmod(0o2777)
    (host / "private").mkdir(0o755)
    (host / "secret").write_text("secret")
    (host / "secret").chmod(0o600)

    refused = share.workload("owner.py", guest, str(uid), str(gid), str(extra))
    assert refused == {
        "chown": "EPERM",
        "create in root's directory": "EACCES",
        "read root's file": "EACCES",
        "mknod": "EPERM",
        "chmod root's file": "EPERM",
    }
    found = {name: os.lstat(host / name) for name in os.listdir(host)}
    found |= {f"inherited/{name}": os.lstat(host / "inherited" / name)
              for name in os.listdir(host / "inherited")}
    owners = {name: (status.st_uid, status.st_gid) for name, status in found.items()}
    assert owners == {
        "file": (uid, extra),
        "hard": (uid, extra),
        "directory": (uid, gid),
        "link": (uid, gid),
        "fifo": (uid, gid),
        "socket": (uid, gid),
        "inherited": (0, 4567),
        "inherited/file": (uid, 4567),
        "inherited/directory": (uid, 4567),
        "private": (0, 0),
        "secret": (0, 0),
    }
    assert stat.S_IMODE(found["file"].st_mode) == 0o640
    assert stat.S_IMODE(found["directory"].st_mode) == 0o750
    assert stat.S_IMODE(found["inherited/directory"].st_mode) == 0o2750
