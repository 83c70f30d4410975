"""Random calls on a share and on a directory of this machine: the same results, the same errors."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vfsd.guest import Filesystem

LIBC = ctypes.CDLL(None)
STEPS = int(os.environ.get("VFSD_STRESS_STEPS", "600"))
LINKS = ("a", "b/c", "a/b/../c", "./b/", "nowhere", "d")  # none leads out of the directory
OPEN_FLAGS = (os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_DIRECT)


class Host:
    """The calls of Filesystem, on a directory of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(os, name)

    def at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def content(self, path: str) -> bytes:
        with open(self.at(path), "rb", buffering=0) as file:
            return file.read()

    def use(self, path: str, flags: int, data: bytes, offset: int) -> list[Any]:
        fd = os.open(self.at(path), flags, 0o640)
        try:
            return [outcome(call) for call in (
                lambda: os.pwrite(fd, data, offset),
                lambda: os.write(fd, data),
                lambda: os.pread(fd, 9000, offset // 2),
                lambda: os.ftruncate(fd, offset // 3),
                lambda: plain(os.fstat(fd)),
            )]  # fmt: skip
        finally:
            os.close(fd)


class Guest:
    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self.fs, name)

    def at(self, path: str) -> str:
        return path

    def content(self, path: str) -> bytes:
        return self.fs.read_bytes(path)

    def use(self, path: str, flags: int, data: bytes, offset: int) -> list[Any]:
        with self.fs.open(path, flags, 0o640) as file:
            return [outcome(call) for call in (
                lambda: file.pwrite(data, offset),
                lambda: file.write(data),
                lambda: file.pread(9000, offset // 2),
                lambda: self.fs.ftruncate(file, offset // 3),
                lambda: plain(self.fs.fstat(file)),
            )]  # fmt: skip


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as problem:
        return os.strerror(problem.errno or 0)


def plain(stat: os.stat_result) -> tuple[int, ...]:
    """What does not depend on where it is."""
    size = stat.st_size if (stat.st_mode & 0o170000) != 0o040000 else 0
    return stat.st_mode, stat.st_nlink, stat.st_uid, stat.st_gid, size


def step(rng: random.Random, modes: bool) -> tuple[str, Callable[[Any], Any]]:
    def path() -> str:
        text = "/".join(rng.choice(("a", "b", "c", "d", ".", "..")[: rng.choice((4, 4, 4, 6))])
                        for _ in range(rng.randint(1, 3)))  # fmt: skip
        return text + rng.choice(("", "", "", "", "", "/"))

    one, two = path(), path()
    if ".." in one or ".." in two:
        one, two = one.replace("..", "."), two.replace("..", ".")
    mode, number = rng.choice((0o600, 0o755, 0o4711, 0)), rng.randrange(20_000)
    data = rng.randbytes(rng.randrange(9000))
    if modes:
        # Not sticky, and no links: there the host's sysctls fs.protected_* decide.
        mode = rng.choice((0o777, 0o777, 0o700, 0o750, 0o2775, 0o4711, rng.randrange(0o10000))) & ~0o1000
    else:
        mode |= 0o700
    owner = rng.choice((-1, 1000, 1001, number)) if modes else number
    link, follow = rng.choice(LINKS), rng.random() < 0.5
    flags = rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR)) | os.O_CREAT * (rng.random() < 0.6)
    for flag in OPEN_FLAGS[1:-1]:
        flags |= flag * (rng.random() < 0.12)
    calls: dict[str, Callable[[Any], Any]] = {
        f"mkdir {one} {mode:o}": lambda at: at.mkdir(at.at(one), mode),
        f"rmdir {one}": lambda at: at.rmdir(at.at(one)),
        f"unlink {one}": lambda at: at.unlink(at.at(one)),
        f"rename {one} {two}": lambda at: at.rename(at.at(one), at.at(two)),
        f"link {one} {two}": lambda at: at.link(at.at(one), at.at(two)),
        f"symlink {link} {one}": lambda at: at.symlink(link, at.at(one)),
        f"readlink {one}": lambda at: at.readlink(at.at(one)),
        f"stat {one} {follow}": lambda at: plain(at.stat(at.at(one), follow_symlinks=follow)),
        f"listdir {one}": lambda at: sorted(at.listdir(at.at(one))),
        f"chmod {one} {mode:o}": lambda at: at.chmod(at.at(one), mode),
        f"chown {one}": lambda at: at.chown(at.at(one), owner, -1, follow_symlinks=follow),
        f"truncate {one} {number}": lambda at: at.truncate(at.at(one), number),
        f"content {one}": lambda at: at.content(one),
        f"open {one} {flags:o}": lambda at: at.use(one, flags, data, number),
        f"open {two} {flags:o}": lambda at: at.use(two, flags, data, number),
    }
    if modes:
        del calls[f"link {one} {two}"]
    else:  # access(2) goes by the real ids, which no thread can have for itself
        calls[f"access {one} {mode & 7}"] = lambda at: at.access(at.at(one), mode & 7)
    return rng.choice(list(calls.items()))


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """This thread's access to files is that user's."""
    LIBC.setfsgid(uid)
    LIBC.setfsuid(uid)
    yield
    LIBC.setfsuid(0)
    LIBC.setfsgid(0)


@pytest.mark.parametrize("seed", range(3))
def test_random_calls_agree_with_os(fs: Filesystem, tmp_path: Path, seed: int) -> None:
    compare(fs, tmp_path, random.Random(seed), 0.0)


@pytest.mark.skipif(os.geteuid() != 0 or os.getgroups() not in ([], [0]), reason="only root can be others")
@pytest.mark.parametrize("seed", range(3))
def test_random_calls_of_users_agree_with_os(fs: Filesystem, tmp_path: Path, seed: int) -> None:
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(0o755)  # pytest's own directories
    fs.chmod("/", 0o777)
    compare(fs, tmp_path, random.Random(seed), 0.8)


def compare(fs: Filesystem, tmp_path: Path, rng: random.Random, users: float) -> None:
    """users: how many of the calls are not root's."""
    twin = tmp_path / "twin"
    twin.mkdir()
    os.chmod(twin, fs.stat("/").st_mode & 0o7777)
    host, guest = Host(twin), Guest(fs)
    done: list[str] = []
    for _ in range(STEPS):
        what, call = step(rng, users > 0)
        if rng.random() < users:
            uid = rng.choice((1000, 1001))
            what = f"{uid}: {what}"
            with acting_as(uid):
                expected = outcome(lambda call=call: call(host))
            with fs.as_user(uid, uid):
                found = outcome(lambda call=call: call(guest))
        else:
            expected, found = outcome(lambda call=call: call(host)), outcome(lambda call=call: call(guest))
        done.append(f"{what} -> {expected if not isinstance(expected, bytes | list) else '...'}")
        assert found == expected, "\n".join(done[-12:])
    shutil.rmtree(twin)
