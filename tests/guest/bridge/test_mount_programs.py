"""Programs that people run, on a mounted share."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import WORKLOADS, Mounted, mounting

TREE_FILES = int(os.environ.get("VFSD_TREE_FILES", "60000"))
SHM = Path("/dev/shm")


def git(*words: str, cwd: Path) -> str:
    identity = ("-c", "user.name=vfsd", "-c", "user.email=vfsd@example.org")
    return subprocess.run(
        ["git", *identity, *words], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of 500 files with three commits."""
    directory = tmp_path_factory.mktemp("repository")
    git("init", "--quiet", cwd=directory)
    for commit in range(3):
        for number in range(500):
            file = directory / f"d{number % 20}" / f"f{number}"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{commit} {number}\n" * (number % 60 + 1))
        git("add", "--all", cwd=directory)
        git("commit", "--quiet", f"--message=commit {commit}", cwd=directory)
    return directory


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_git_clone(mounted: Mounted, repository: Path) -> None:
    mounted.run("git", "clone", "--quiet", "--no-hardlinks", repository, "clone")
    mounted.run("git", "-C", "clone", "fsck", "--strict", "--no-progress")
    assert mounted.run("git", "-C", "clone", "status", "--porcelain") == ""
    (mounted.root / "clone" / "d0" / "f0").write_text("changed")
    assert mounted.run("git", "-C", "clone", "status", "--porcelain") == " M d0/f0\n"
    mounted.run("git", "-C", "clone", "gc", "--quiet")
    log = mounted.run("git", "-C", "clone", "log", "--format=%H")
    assert log == git("log", "--format=%H", cwd=repository)
    mounted.run("rm", "-rf", "clone")


@pytest.mark.skipif(shutil.which("fio") is None, reason="there is no fio")
@pytest.mark.parametrize(
    "job",
    [
        "--ioengine=psync --rw=randwrite --bsrange=512-128k",
        "--ioengine=psync --rw=write --bs=1m --direct=1",
        "--ioengine=mmap --rw=randwrite --bs=4k",
        "--ioengine=libaio --rw=randwrite --bs=16k --direct=1 --iodepth=16",
    ],
    ids=["psync", "direct", "mmap", "libaio"],
)
def test_fio_verifies(mounted: Mounted, job: str) -> None:
    mounted.run(
        "fio", "--name=verify", "--size=24m", "--numjobs=2", "--verify=crc32c", "--verify_fatal=1",
        "--do_verify=1", "--fallocate=none", "--fsync_on_close=1", "--end_fsync=1",
        "--group_reporting", *job.split(),
    )  # fmt: skip
    for file in mounted.root.glob("verify.*"):  # on the host, names would be remembered for a second
        file.unlink()


@pytest.fixture
def roomy(peer: str, tmp_path: Path) -> Iterator[Mounted]:
    """A mounted directory of a file system in memory, if there is one: a disk's speed is not the point."""
    where = Path(tempfile.mkdtemp(prefix="vfsd-tree-", dir=SHM)) if SHM.is_dir() else tmp_path
    try:
        with mounting(where, peer) as it:
            yield it
    finally:
        shutil.rmtree(where, ignore_errors=True)


def test_a_tree_as_large_as_a_kernel(roomy: Mounted) -> None:
    """Made, searched, summed up and removed; VFSD_TREE_FILES says how many files."""
    files = TREE_FILES
    if roomy.peer == "qemu-virtiofsd":  # holds a descriptor for every inode the kernel knows
        files = min(files, resource.getrlimit(resource.RLIMIT_NOFILE)[1] * 3 // 4)
    times = {}
    for name, argv in (
        ("make", [sys.executable, WORKLOADS / "tree.py", "tree", files]),
        ("find", ["find", "tree", "-type", "f", "-printf", "x"]),
        ("du", ["du", "--apparent-size", "--block-size=1", "--summarize", "tree"]),
        ("rm", ["rm", "-rf", "tree"]),
    ):
        start = time.monotonic()
        printed = roomy.run(*argv, timeout=150)
        times[name] = round(time.monotonic() - start, 1)
        if name == "find":
            assert len(printed) == files
        elif name == "du":
            assert printed == roomy.run("env", "--chdir", roomy.share, *argv)
    assert os.listdir(roomy.share) == []
    print(f"{roomy.peer}: {files} files, seconds: {times}")
