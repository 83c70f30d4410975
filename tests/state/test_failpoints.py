"""A server is killed at each stage of each request; what the guest and the share come to is as without.

Only a debug build has failpoints (vfsd/state/_failpoint.h).
"""

import fcntl
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import Daemon

from vfsd.fuse.abi import KERNEL_MINOR_VERSION
from vfsd.fuse.opcodes import NUMBER
from vfsd.guest import Filesystem, mount
from vfsd.state._journal import CHECKED, STAGES

pytestmark = pytest.mark.skipif(not CHECKED, reason="only a debug build has failpoints (make test-debug)")

Scenario = Callable[[Filesystem], object]
CONTENT = b"what it was before"
NOREPLACE, EXCHANGE = 1, 2


def prepare(share: Path) -> None:
    (share / "file").write_bytes(CONTENT)
    (share / "other").write_bytes(b"other")
    (share / "link").symlink_to("file")
    (share / "empty").mkdir()
    (share / "dir").mkdir()
    for n in range(40):
        (share / "dir" / f"entry{n}").write_bytes(b"%d" % n)
    os.setxattr(share / "file", "user.known", b"value")


def tree(share: Path) -> dict[str, tuple[object, ...]]:
    """What is in the share: kind, permissions, links, content or target, and attributes of each name."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(share.rglob("*")):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content: object = None
        attributes: dict[str, bytes] = {}
        if kind == stat.S_IFREG:
            content = path.read_bytes()
            attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        elif kind == stat.S_IFLNK:
            content = os.readlink(path)
        found[str(path.relative_to(share))] = (
            status.st_mode, status.st_nlink if kind != stat.S_IFDIR else 0, content, attributes,
        )  # fmt: skip
    return found


def create(fs: Filesystem) -> None:
    with fs.open("/made", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640) as file:
        file.write(b"content")


def append(fs: Filesystem) -> None:
    with fs.open("/file", os.O_WRONLY | os.O_APPEND) as file:
        assert file.write(b" and after") == 10


def write(fs: Filesystem) -> None:
    with fs.open("/file", os.O_RDWR) as file:
        assert file.pwrite(b"WHAT", 0) == 4


def on_a_file(act: Callable[[Filesystem, object], object]) -> Scenario:
    def run(fs: Filesystem) -> object:
        with fs.open("/file", os.O_RDWR) as file:
            return act(fs, file)

    return run


def copy(fs: Filesystem) -> object:
    with fs.open("/file", os.O_RDONLY) as source, fs.open("/other", os.O_RDWR) as target:
        return fs.copy_file_range(source, target, 5, 0, 10)


def nameless(fs: Filesystem) -> None:
    with fs.open("/", os.O_RDWR | os.O_TMPFILE, 0o600) as file:
        file.write(b"nameless")
        fs.link_open(file, "/named")


def lock(fs: Filesystem) -> None:
    with fs.open("/file", os.O_RDWR) as file:
        fs.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
        fs.lockf(file, fcntl.LOCK_UN, 10)


SCENARIOS: list[tuple[str, Scenario]] = [
    ("LOOKUP", lambda fs: fs.stat("/file").st_size),
    ("GETATTR", lambda fs: stat.S_ISDIR(fs.stat("/").st_mode)),
    ("SETATTR", lambda fs: fs.chmod("/file", 0o600)),
    ("SETATTR", lambda fs: fs.truncate("/file", 3)),
    ("READLINK", lambda fs: fs.readlink("/link")),
    ("SYMLINK", lambda fs: fs.symlink("target", "/made")),
    ("MKNOD", lambda fs: fs.mknod("/made", stat.S_IFIFO | 0o600)),
    ("MKDIR", lambda fs: fs.mkdir("/made", 0o750)),
    ("UNLINK", lambda fs: fs.unlink("/file")),
    ("RMDIR", lambda fs: fs.rmdir("/empty")),
    ("RENAME", lambda fs: fs.rename("/file", "/made")),
    ("RENAME", lambda fs: fs.rename("/file", "/other")),
    ("RENAME2", lambda fs: fs.rename("/file", "/made", NOREPLACE)),
    ("RENAME2", lambda fs: fs.rename("/file", "/other", EXCHANGE)),
    ("LINK", lambda fs: fs.link("/file", "/made")),
    ("OPEN", lambda fs: fs.read_bytes("/file")),
    ("READ", lambda fs: fs.read_bytes("/file")),
    ("WRITE", write),
    ("WRITE", append),
    ("STATFS", lambda fs: fs.statvfs("/").f_bsize),
    ("RELEASE", lambda fs: fs.read_bytes("/file")),
    ("FSYNC", on_a_file(lambda fs, file: fs.fsync(file))),
    ("SETXATTR", lambda fs: fs.setxattr("/file", "user.made", b"new", os.XATTR_CREATE)),
    ("SETXATTR", lambda fs: fs.setxattr("/file", "user.known", b"new", os.XATTR_REPLACE)),
    ("GETXATTR", lambda fs: fs.getxattr("/file", "user.known")),
    ("LISTXATTR", lambda fs: fs.listxattr("/file")),
    ("REMOVEXATTR", lambda fs: fs.removexattr("/file", "user.known")),
    ("FLUSH", write),
    ("OPENDIR", lambda fs: sorted(fs.listdir("/dir"))),
    ("READDIR", lambda fs: sorted(fs.listdir("/dir"))),
    ("READDIRPLUS", lambda fs: sorted(fs.listdir("/dir"))),
    ("RELEASEDIR", lambda fs: sorted(fs.listdir("/dir"))),
    ("CREATE", create),
    ("FALLOCATE", on_a_file(lambda fs, file: fs.fallocate(file, 0, 0, 8192))),
    ("LSEEK", on_a_file(lambda fs, file: fs.lseek(file, 0, os.SEEK_DATA))),
    ("COPY_FILE_RANGE", copy),
    ("COPY_FILE_RANGE_64", copy),
    ("TMPFILE", nameless),
    ("LINK", nameless),
    ("SETLK", lock),
    ("STATX", lambda fs: fs.birthtime_ns("/file") is not None),
    ("INIT", lambda fs: sorted(fs.listdir("/"))),
]


# How many entries of a listing are looked up with it depends on how long that takes.
LISTING = ("OPENDIR", "READDIR", "READDIRPLUS", "RELEASEDIR")


def run(share: Path, scenario: Scenario, minor: int) -> tuple[object, dict[str, tuple[object, ...]], str]:
    """The scenario's outcome, the share then, and what the daemon has said."""
    share.mkdir()
    prepare(share)
    options = ["--xattr", "--posix-lock", "--keeper", "--always-flush", "--log-level", "debug"]
    with Daemon(share, options=options) as daemon, mount(daemon.socket, minor=minor) as fs:
        outcome = scenario(fs)
    return outcome, tree(share), daemon.log


def held(log: str) -> list[str]:
    """What each session held at its end: a lookup count too many shows in the inodes."""
    nothing = "0 inodes, 0 handles, 0 anchors"
    found = re.findall(f"the session held (.*), which leaves {nothing}", log)
    return [what for what in found if what != nothing]


@pytest.mark.parametrize(
    "opcode, scenario", SCENARIOS, ids=[f"{name}{n}" for n, (name, _) in enumerate(SCENARIOS)]
)
def test_nothing_is_lost_and_nothing_done_twice(
    opcode: str, scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minor = 41 if opcode == "COPY_FILE_RANGE" else KERNEL_MINOR_VERSION
    *expected, before = run(tmp_path / "without", scenario, minor)
    reached = []
    for stage in range(1, STAGES + 1):
        monkeypatch.setenv("VFSD_FAILPOINT", f"{stage}:{NUMBER[opcode]}:0")
        outcome, after, log = run(tmp_path / f"killed-at-{stage}", scenario, minor)
        deaths = len(re.findall("another one goes on", log))
        assert deaths <= 1, stage
        if deaths:
            reached.append(stage)
        assert [outcome, after] == expected, stage
        if opcode not in LISTING:
            assert held(log) == held(before), stage
    assert len(reached) >= STAGES - 1, "it is not sent"


def test_a_request_of_which_two_servers_crash_is_an_error_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beside it are answered, by the third server."""
    share = tmp_path / "share"
    share.mkdir()
    prepare(share)
    monkeypatch.setenv("VFSD_FAILPOINT", f"1:{NUMBER['STATFS']}:0:3")
    with (
        Daemon(share, options=["--keeper"]) as daemon,
        mount(daemon.socket, queues=2) as fs,
        fs.open("/file", os.O_RDWR) as file,
    ):
        with pytest.raises(OSError, match="Input/output error"):
            fs.statvfs("/")
        assert file.pread(100, 0) == CONTENT
        assert len(fs.listdir("/dir")) == 40
    assert daemon.log.count("was ended by SIGABRT") == 2
    assert "a request of which two servers have died is answered with an I/O error: STATFS" in daemon.log


def test_a_guest_whose_servers_go_on_crashing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = tmp_path / "share"
    share.mkdir()
    monkeypatch.setenv("VFSD_FAILPOINT", f"1:{NUMBER['STATFS']}:0:9")
    with Daemon(share, options=["--keeper"]) as daemon:
        fs = mount(daemon.socket)
        with pytest.raises(OSError, match="Input/output error"):
            fs.statvfs("/")
        with pytest.raises(OSError, match=r"Input/output error|not connected"):
            fs.statvfs("/")
        fs.close()
        assert "3 servers of a guest have ended within 10 s; the last one was ended by SIGABRT" in daemon.log
