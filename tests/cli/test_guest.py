"""vfsd guest: the share from the command line, and through fsspec."""

import os
import pty
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from guests import Daemon, StartDaemon

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
def served(daemon: StartDaemon, tmp_path: Path) -> Daemon:
    share = tmp_path / "share"
    (share / "sub").mkdir(parents=True)
    (share / "hello").write_text("hello\n")
    (share / "sub" / "data").write_bytes(CONTENT)
    (share / "link").symlink_to("hello")
    return daemon(share)


# As another user, who may not be able to read these sources: with everything imported before.
AS_NOBODY = (
    "import difflib, os, sys, vfsd.cli.guest\n"
    "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
    "vfsd.cli.main(sys.argv[1:])"
)


def start(
    served: Daemon, name: str, *arguments: str | Path, nobody: bool = False
) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, *(["-c", AS_NOBODY] if nobody else ["-m", "vfsd"])]
    words += ["guest", name, "--socket", str(served.socket), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)


def run(served: Daemon, name: str, *arguments: str | Path, status: int = 0) -> bytes:
    """What the command prints; on standard error it says exactly one line if it fails, else nothing."""
    done = start(served, name, *arguments)
    assert done.returncode == status, done
    if status:
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr
    return done.stdout


def on_terminal(served: Daemon, name: str, *arguments: str) -> bytes:
    """What the command writes to a terminal."""
    ours, theirs = pty.openpty()
    try:
        words = [sys.executable, "-m", "vfsd", "guest", name, "--socket", str(served.socket), *arguments]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, timeout=60)
        assert done.returncode == 0
        os.close(theirs)
        theirs = -1
        written = b""
        with suppress(OSError):  # EIO, when nobody has the other end any more
            while data := os.read(ours, 65536):
                written += data
        return written
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def test_info_says_what_was_agreed(served: Daemon) -> None:
    said = run(served, "info", "--order", "uml").decode()
    for part in ("EVENT_IDX", "REPLY_ACK", "myfs", "7.45", "MAX_PAGES", "4177920 bytes", "median"):
        assert part in said, said


def test_looking(served: Daemon) -> None:
    assert run(served, "ls").split() == [b"hello", b"link", b"sub"]
    assert b"link -> hello" in run(served, "ls", "-l")
    assert run(served, "cat", "sub/data") == CONTENT
    assert run(served, "cat", "link") == b"hello\n"
    assert f"inode {(served.shared / 'hello').stat().st_ino}".encode() in run(served, "stat", "hello")
    assert "└── data" in run(served, "tree").decode()
    assert b"GiB" in run(served, "df")


def test_copying_through_the_dax_window(daemon: StartDaemon, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "data").write_bytes(CONTENT)
    served = daemon(share, options=("--dax-window", "4M"))
    assert b"DAX window          4 MiB" in run(served, "info", "--order", "qemu-generic")
    assert run(served, "cat", "--dax", "data") == CONTENT
    run(served, "cp", "--dax", ":data", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    run(served, "cp", "--dax", tmp_path / "copy", ":back")
    assert (share / "back").read_bytes() == CONTENT


def test_dax_without_a_window_is_an_error(served: Daemon) -> None:
    assert b"does not support it" in run(served, "cat", "--dax", "hello", status=1)


def test_changing(served: Daemon) -> None:
    run(served, "mkdir", "-p", "a/b")
    run(served, "mkdir", "-p", "a/b")
    assert (served.shared / "a" / "b").is_dir()
    run(served, "rm", "hello")
    run(served, "rm", "-r", "sub")
    assert sorted(os.listdir(served.shared)) == ["a", "link"]


def test_copying_a_tree_both_ways(served: Daemon, tmp_path: Path) -> None:
    run(served, "cp", "-r", ":/", tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "data").read_bytes() == CONTENT
    assert os.readlink(tmp_path / "out" / "link") == "hello"
    run(served, "cp", "-r", tmp_path / "out", ":back")
    assert (served.shared / "back" / "sub" / "data").read_bytes() == CONTENT
    run(served, "cp", tmp_path / "out" / "hello", tmp_path / "out" / "sub" / "data", ":back/sub")
    assert (served.shared / "back" / "sub" / "hello").read_text() == "hello\n"


def test_copying_keeps_what_a_file_is(served: Daemon, tmp_path: Path) -> None:
    (served.shared / "key").write_text("secret")
    (served.shared / "key").chmod(0o600)
    os.utime(served.shared / "key", ns=(0, 12345))
    os.mkfifo(served.shared / "sub" / "fifo")
    run(served, "cp", "-r", ":/", tmp_path / "out")
    st = (tmp_path / "out" / "key").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_mtime_ns) == (0o600, 12345)
    assert stat.S_ISFIFO((tmp_path / "out" / "sub" / "fifo").stat().st_mode)
    run(served, "cp", ":key", ":sub")
    assert (served.shared / "sub" / "key").read_text() == "secret"


def test_what_can_not_be_done_is_told_and_the_rest_goes_on(served: Daemon, tmp_path: Path) -> None:
    os.mkfifo(served.shared / "fifo")
    done = start(served, "cat", "nowhere", "fifo", "sub", "hello")
    assert (done.returncode, done.stdout) == (1, b"hello\n")
    assert [line.split(b":")[1] for line in done.stderr.splitlines()] == [b" nowhere", b" fifo", b" sub"]
    done = start(served, "ls", "nowhere", "hello", "sub")
    assert (done.returncode, done.stdout) == (1, b"hello\nsub:\ndata\n")
    done = start(served, "stat", "nowhere", "hello")
    assert done.returncode == 1 and done.stdout.startswith(b"hello: -rw")
    done = start(served, "mkdir", "nowhere/x", "made", "hello")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 2 and (served.shared / "made").is_dir()
    (tmp_path / "out").mkdir()
    done = start(served, "cp", ":nowhere", ":hello", tmp_path / "out")
    assert done.returncode == 1 and (tmp_path / "out" / "hello").read_text() == "hello\n"
    done = start(served, "rm", "nowhere", "fifo", "sub")
    assert done.returncode == 1 and sorted(os.listdir(served.shared)) == ["hello", "link", "made", "sub"]


def test_what_may_not_be_read_or_removed(served: Daemon) -> None:
    shared = served.shared
    for path in (served.socket.parent, served.socket):
        path.chmod(0o777)
    shared.chmod(0o777)
    for name in ("secret", "kept"):
        (shared / name).mkdir(mode=0o700 if name == "secret" else 0o755)
        (shared / name / "file").touch()
    (shared / "mine").mkdir()
    os.chown(shared / "mine", 65534, 65534)
    done = start(served, "ls", "-R", nobody=True)
    assert done.returncode == 1 and b"/sub:\ndata\n" in done.stdout and b"/kept:\nfile\n" in done.stdout
    assert done.stderr == b"vfsd: /secret: Permission denied\n"
    done = start(served, "tree", nobody=True)
    assert done.returncode == 1 and b"secret" in done.stdout and "└── data" in done.stdout.decode()
    assert done.stderr == b"vfsd: /secret: Permission denied\n"
    done = start(served, "rm", "-r", "kept", "mine", "secret", nobody=True)
    assert done.returncode == 1
    assert done.stderr == b"vfsd: kept/file: Permission denied\nvfsd: secret: Permission denied\n"
    assert sorted(os.listdir(shared)) == ["hello", "kept", "link", "secret", "sub"]


def test_odd_names(served: Daemon) -> None:
    for name in (b"new\nline", b"bad\xff", b"\x1b[31mred", b"-rf", b"back\\slash"):
        with open(os.path.join(os.fsencode(served.shared), b"sub", name), "wb"):
            pass
    (served.shared / "sub" / "self").symlink_to("self")
    (served.shared / "sub" / "up").symlink_to("..")
    raw = run(served, "ls", "sub")
    assert b"new\nline\n" in raw and b"bad\xff\n" in raw and b"\x1b[31mred\n" in raw
    for command in (["ls", "sub"], ["ls", "-lR", "/"], ["tree"]):
        seen = on_terminal(served, *command)
        for shown in (rb"new\nline", rb"bad\377", rb"\033[31mred", rb"back\\slash"):
            assert shown in seen, seen
        assert b"\x1b" not in seen
    assert b"self -> self" in run(served, "ls", "-l", "sub")
    assert start(served, "cat", "sub/\x1b[0m").stderr == b"vfsd: sub/\\033[0m: No such file or directory\n"
    run(served, "rm", "-r", "--", "sub")
    assert not (served.shared / "sub").exists()
    (served.shared / "-rf").touch()
    run(served, "rm", "--", "-rf")


def test_errors_are_one_line(served: Daemon, tmp_path: Path) -> None:
    assert b"nowhere" in run(served, "cat", "nowhere", status=1)
    assert b"add -r" in run(served, "cp", ":sub", tmp_path / "x", status=2)
    assert b"colon" in run(served, "cp", "a", "b", status=2)
    assert b"is no directory" in run(served, "cp", ":hello", ":sub/data", tmp_path / "x", status=2)
    words = [sys.executable, "-m", "vfsd", "guest", "ls", "--socket", str(tmp_path / "none")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "none" in done.stderr


def test_fsspec(served: Daemon) -> None:
    fs = fsspec.filesystem("virtiofs", socket=str(served.socket), skip_instance_cache=True)
    try:
        assert fs.ls("/", detail=False) == ["/hello", "/link", "/sub"]
        assert fs.cat("virtiofs://sub/data") == CONTENT
        assert fs.info("/sub")["type"] == "directory"
        assert fs.find("/") == ["/hello", "/link", "/sub/data"]
        with fs.open("/new/deep/file", "wb") if fs.makedirs("/new/deep") is None else None as file:
            file.write(b"written")
        assert (served.shared / "new" / "deep" / "file").read_bytes() == b"written"
        fs.copy("/new", "/copy", recursive=True)
        fs.mv("/copy", "/moved")
        assert fs.cat("/moved/deep/file") == b"written"
        fs.rm("/moved", recursive=True)
        assert not fs.exists("/moved")
        with fs.open("/hello", "rt") as file:
            assert file.read() == "hello\n"
    finally:
        fs.close()
