"""Many threads on few names: nothing is lost, nothing leaks, both sides agree in the end."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from vfsd.guest import Filesystem, mount
from vfsd.guest.client import objects

from .conftest import StartPeer
from .test_cache import settle, settled

STEPS = int(os.environ.get("VFSD_STRESS_STEPS", "400"))
EXPECTED = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL,
            errno.EPERM, errno.ELOOP, errno.EBUSY}  # fmt: skip


def one_step(fs: Filesystem, rng: random.Random) -> None:
    def path() -> str:
        return "/" + "/".join(rng.choice("abc") for _ in range(rng.randint(1, 3)))

    match rng.randrange(13):
        case 0 | 1:
            fs.mkdir(path())
        case 2:
            fs.rmdir(path())
        case 3 | 4:
            fs.write_bytes(path(), rng.randbytes(rng.randrange(10_000)))
        case 5:
            fs.unlink(path())
        case 6 | 7:
            fs.rename(path(), path())
        case 8:
            fs.link(path(), path())
        case 9:
            for entry in fs.scandir(path()):
                entry.stat()
        case 10:
            fs.read_bytes(path())
        case 11:
            fs.symlink(path(), path())
        case 12 if rng.random() < 0.1:
            fs.drop_caches()
        case _:
            fs.stat(path())


@pytest.mark.parametrize("kind", ["vfsd", "qemu-virtiofsd"])
def test_more_threads_than_slots_all_end(start: StartPeer, shared: Path, kind: str) -> None:
    data = os.urandom(3 << 20)
    for number in range(4):
        (shared / str(number)).write_bytes(data)
    wrong: list[int] = []
    with mount(start(kind).socket, queue_size=32, slots=4) as fs:

        def read(number: int) -> None:
            with fs.open(f"/{number % 4}", os.O_RDONLY | (os.O_DIRECT if number % 3 == 0 else 0)) as file:
                if file.pread(len(data), 0) != data:
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not wrong


def tree(top: Path) -> dict[str, object]:
    """Every name below: what it is, and what a file holds."""
    found: dict[str, object] = {}
    for where, dirs, files in os.walk(top):
        for name in dirs + files:
            at = Path(where, name)
            key = f"/{at.relative_to(top)}"
            found[key] = os.readlink(at) if at.is_symlink() else at.read_bytes() if at.is_file() else None
    return found


def tree_of(fs: Filesystem) -> dict[str, object]:
    found: dict[str, object] = {}
    for where, dirs, files in fs.walk("/"):
        for name in dirs + files:
            at = os.path.join(where, name)
            entry = fs.lstat(at)
            found[at] = (
                fs.readlink(at) if (entry.st_mode & 0o170000) == 0o120000
                else fs.read_bytes(at) if (entry.st_mode & 0o170000) == 0o100000 else None
            )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("kind", "cache"), [("vfsd", "never"), ("vfsd", "auto"), ("vfsd", "always"), ("qemu-virtiofsd", "always")]
)
def test_threads_on_the_same_names_lose_nothing(
    start: StartPeer, shared: Path, kind: str, cache: str
) -> None:
    peer = start(kind, cache=cache)
    queues = 2 if kind == "vfsd" else 1
    unexpected: list[BaseException] = []
    with mount(peer.socket, queues=queues, queue_size=16) as fs:
        fs.listdir("/")
        settle(fs)
        before = peer.descriptors()

        def work(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(STEPS):
                try:
                    one_step(fs, rng)
                except OSError as problem:
                    if problem.errno not in EXPECTED:
                        unexpected.append(problem)
                except BaseException as problem:
                    unexpected.append(problem)
                    return

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive()
        assert not unexpected, unexpected[:5]
        assert tree_of(fs) == tree(shared)
        settle(fs)
        assert objects.alive()["inodes"] == objects.alive()["dentries"] == 1
        assert settled(peer, before)
