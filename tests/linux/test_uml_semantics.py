"""What programs rely on, through user-mode Linux: names, open files, kinds, metadata, holes."""

from __future__ import annotations

import os
import stat
import subprocess

import checks
import pytest
from guests import eventually
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


def test_mounts_below_the_share_are_mounts_in_the_guest(share: Share) -> None:
    """The same file system twice, and one that comes and goes while the guest runs."""
    host, guest = share.directory("submounts")
    # What was used lately survives the first time.
    forget = "for i in 1 2 3; do echo 2 >/proc/sys/vm/drop_caches; done"
    made = []

    def mount(*arguments: str, at: str) -> None:
        (host / at).mkdir(exist_ok=True)
        subprocess.run(["mount", *arguments, str(host / at)], check=True, timeout=20)
        made.append(host / at)

    def devices(*names: str) -> list[str]:
        paths = " ".join(f"{guest}/{name}" for name in names)
        # Going there mounts it; stat alone does not.
        return share.guest.check(f"ls {paths} >/dev/null && stat -c %d {paths}").split()

    def inodes(path: str) -> tuple[int, int]:
        return int(share.guest.check(f"stat -c %i {guest}/{path}")), (host / path).stat().st_ino

    try:
        mount("-t", "tmpfs", "vfsd-test", at="one")
        (host / "one" / "file").write_text("first")
        mount("--bind", str(host / "one"), at="two")
        (host / "plain").mkdir()
        assert len(set(devices(".", "one", "two", "one/file", "two/file"))) == 3
        assert devices("one") == devices("one/file")
        for path in ("one", "two", "one/file", "two/file", "plain"):
            assert len(set(inodes(path))) == 1
        # To the guest they are two files, each with a cache of its own.
        share.guest.check(f"echo more >>{guest}/one/file && sync && {forget}")
        assert share.guest.check(f"cat {guest}/two/file").strip() == "firstmore"
        assert f"{guest}/two" in share.guest.check("findmnt -rno TARGET -t virtiofs")

        assert devices("plain") == devices(".")
        mount("-t", "tmpfs", "vfsd-test", at="plain")
        (host / "plain" / "late").touch()
        share.guest.check(forget)
        assert devices("plain") != devices(".")
        assert share.guest.check(f"ls {guest}/plain").split() == ["late"]
        subprocess.run(["umount", "--lazy", host / "plain"], check=True)
        # A mount keeps its name in the guest's cache, until the name's second is over.
        assert eventually(lambda: devices("plain") == devices("."))
        assert share.guest.check(f"ls {guest}/plain").split() == []
        assert f"{guest}/plain" not in share.guest.check("findmnt -rno TARGET -t virtiofs")
    finally:
        share.guest.run(f"umount {guest}/one {guest}/two {guest}/plain")
        for place in reversed(made):
            subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
