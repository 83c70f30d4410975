"""vfsd guest: the share from the command line, and through fsspec."""

import os
import subprocess
import sys
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


def run(served: Daemon, name: str, *arguments: str | Path, status: int = 0) -> bytes:
    """What the command prints; on standard error it says exactly one line if it fails, else nothing."""
    words = [sys.executable, "-m", "vfsd", "guest", name, "--socket", str(served.socket)]
    words += map(str, arguments)
    done = subprocess.run(words, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == status, done
    if status:
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr
    return done.stdout


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
