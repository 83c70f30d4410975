"""Programs that people run on a share, in user-mode Linux, with their result seen by the host."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from share import Share
from workloads import manifest

pytestmark = pytest.mark.uml


def needs(program: str) -> None:
    """Skip when a program is not installed; the guest has the host's programs."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def test_tar_packs_and_unpacks(share: Share) -> None:
    host, guest = share.directory("tar")
    (host / "source").mkdir()
    manifest.make_tree(host / "source", 500)
    share.guest.check(
        f"cd {guest} && tar --create --file all.tar --format=posix --directory source . && "
        "mkdir back && tar --extract --file all.tar --directory back",
        120,
    )
    assert manifest.tree(host / "back") == manifest.tree(host / "source")


def git(*arguments: str, directory: Path) -> str:
    """Output of git on the host, without the settings of the user who runs this."""
    environment = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        **{f"GIT_{who}_NAME": "Test" for who in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{who}_EMAIL": "test@example.org" for who in ("AUTHOR", "COMMITTER")},
    }
    return subprocess.run(
        ["git", *arguments],
        cwd=directory,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_git_clones_commits_and_checks(share: Share) -> None:
    needs("git")
    host, guest = share.directory("git")
    origin = host / "origin"
    origin.mkdir()
    git("init", "--quiet", "--initial-branch=main", directory=origin)
    for commit in range(5):
        manifest.make_tree(origin / f"tree{commit}", 60)
        git("add", "--all", directory=origin)
        git("commit", "--quiet", "--message", f"commit {commit}", directory=origin)

    share.guest.check(
        f"cd {guest} && export GIT_CONFIG_GLOBAL=/tmp/gitconfig && "
        "git config --global user.name Guest && git config --global user.email g@example.org && "
        "git clone --quiet --no-hardlinks origin clone && cd clone && git fsck --full --strict && "
        "echo guest >added && git add added && git commit --quiet --message guest && "
        "git gc --quiet && git fsck --full --strict && test -z \"$(git status --porcelain)\"",
        180,
    )
    clone = host / "clone"
    assert git("fsck", "--full", "--strict", directory=clone) == ""
    assert git("rev-parse", "main~1", directory=clone) == git("rev-parse", "main", directory=origin)
    assert git("show", "main:added", directory=clone) == "guest\n"
    shutil.rmtree(clone / ".git")
    (clone / "added").unlink()
    shutil.rmtree(origin / ".git")
    assert manifest.tree(clone, times=False).keys() == manifest.tree(origin, times=False).keys()


def test_rsync_copies_and_then_finds_nothing_to_do(share: Share) -> None:
    needs("rsync")
    host, guest = share.directory("rsync")
    (host / "source").mkdir()
    manifest.make_tree(host / "source", 500)
    os.link(host / "source/d0/e0/file 1.bin", host / "source/hard")
    share.guest.check(f"rsync --archive --hard-links {guest}/source/ {guest}/copy", 120)
    assert manifest.tree(host / "copy") == manifest.tree(host / "source")
    assert (host / "copy/hard").samefile(host / "copy/d0/e0/file 1.bin")

    again = f"rsync --archive --hard-links --itemize-changes {guest}/source/ {guest}/copy"
    assert share.guest.check(again, 120) == ""
    with (host / "source/d0/e0/file 7.bin").open("ab") as file:
        file.write(b"changed")
    # The guest may keep the old attributes for a second.
    size = str((host / "source/d0/e0/file 7.bin").stat().st_size)
    assert share.workload("watch.py", f"{guest}/source/d0/e0/file 7.bin", "size", size, "10")
    assert share.guest.check(again, 120).split(maxsplit=1)[1] == "d0/e0/file 7.bin\n"
    assert manifest.tree(host / "copy") == manifest.tree(host / "source")


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist"])
def test_sqlite_keeps_its_promises(share: Share, mode: str) -> None:
    host, guest = share.directory(f"sqlite-{mode}")
    rows = 400
    answer = share.workload("database.py", f"{guest}/data.db", mode, str(rows), timeout=120)
    expected_rows = rows * 4 // 5
    assert answer == {
        "mode": mode,
        "journal": True,
        "integrity": "ok",
        "rows": expected_rows,
        "lost": 0,
    }
    database = sqlite3.connect(host / "data.db")
    try:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM t").fetchone() == (expected_rows,)
    finally:
        database.close()


def test_sqlite_program_works_on_the_share(share: Share) -> None:
    needs("sqlite3")
    host, guest = share.directory("sqlite-program")
    script = (
        "CREATE TABLE t (n INTEGER); WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 "
        "FROM c WHERE n < 5000) INSERT INTO t SELECT n FROM c; SELECT sum(n) FROM t;"
    )
    assert share.guest.check(f"sqlite3 {guest}/data.db '{script}'").strip() == "12502500"
    assert not (host / "data.db-journal").exists()


@pytest.mark.parametrize("direct", [0, 1], ids=["cached", "direct"])
def test_fio_verifies_its_random_writes(share: Share, direct: int) -> None:
    needs("fio")
    host, guest = share.directory(f"fio-{direct}")
    output = share.guest.check(
        f"cd {guest} && fio --name=verify --size=24m --rw=randwrite --bsrange=4k-64k "
        f"--ioengine=psync --direct={direct} --verify=crc32c --do_verify=1 --verify_fatal=1 "
        "--end_fsync=1 --thread --randseed=7",
        150,
    )
    assert "err= 0" in output
    assert [path.stat().st_size for path in host.iterdir() if path.suffix == ".0"] == [24 << 20]
