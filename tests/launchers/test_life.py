"""How vfsd-virtiofsd begins and ends, and what becomes of it when something is wrong."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from guests.daemon import eventually

from launchers.process import BINARY, PATIENCE_S, Started, listening, started
from vfsd.guest import mount

NOBODY = 65534
AS_NOBODY = [shutil.which("setpriv") or "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
GET_FEATURES = struct.pack("=III", 1, 1, 0)
NONSENSE = struct.pack("=III", 1, 2, 0)  # of version 2


def run(words: Sequence[str], *, before: Sequence[str] = (), path: str | None = None) -> tuple[int, str]:
    """Exit status, and what it says, of one that does not come to serve."""
    done = subprocess.run(
        [*before, BINARY, *words], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        env=None if path is None else os.environ | {"PATH": path},
    )  # fmt: skip
    return done.returncode, done.stderr


def assert_refused(
    words: Sequence[str], status: int, says: str, *, before: Sequence[str] = (), path: str | None = None
) -> None:
    found, text = run(words, before=before, path=path)
    assert (found, text.count("\n")) == (status, 1), text
    assert text.startswith("vfsd-virtiofsd: ") and says in text


@contextlib.contextmanager
def serving(place: Path, *words: str) -> Iterator[Started]:
    """One that listens at `place`/v.sock."""
    argv = ["--shared-dir", str(place / "share"), "--socket-path", str(place / "v.sock"), *words]
    with started(argv, place / "log") as daemon:
        assert eventually(lambda: (place / "v.sock").exists() or not daemon.running(), PATIENCE_S)
        assert daemon.running(), daemon.log
        yield daemon


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()} - {"log", "share"}


# ---- the end


def test_it_ends_with_its_front_end_and_leaves_nothing(place: Path) -> None:
    with serving(place) as daemon:
        with mount(place / "v.sock") as fs:
            fs.mkdir("d")
        assert daemon.wait() == 0
        assert not daemon.group()
    assert names(place) == set()


@pytest.mark.parametrize("words", [b"", GET_FEATURES[:5], GET_FEATURES, NONSENSE])
def test_it_ends_with_a_front_end_of_few_words(place: Path, words: bytes) -> None:
    with serving(place) as daemon:
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(place / "v.sock"))
            front_end.sendall(words)
        assert daemon.wait() == 0, daemon.log


def test_there_is_one_front_end(place: Path) -> None:
    with serving(place), mount(place / "v.sock") as fs:
        with socket.socket(socket.AF_UNIX) as second, pytest.raises(ConnectionRefusedError):
            second.connect(str(place / "v.sock"))
        assert fs.listdir("/") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("connected", [True, False])
def test_a_signal_ends_it_with_status_1(place: Path, number: signal.Signals, connected: bool) -> None:
    with serving(place) as daemon, socket.socket(socket.AF_UNIX) as front_end:
        if connected:
            front_end.connect(str(place / "v.sock"))
            front_end.sendall(GET_FEATURES)
            front_end.recv(20)
        else:
            assert eventually(lambda: "READY" in daemon.log, PATIENCE_S)
        os.killpg(daemon.pid, number)
        assert daemon.wait() == 1, daemon.log
    assert names(place) == set()


def test_a_server_that_is_killed_ends_it_with_status_1(place: Path) -> None:
    with serving(place) as daemon, socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(str(place / "v.sock"))
        front_end.sendall(GET_FEATURES)
        front_end.recv(20)
        for pid in set(daemon.group()) - {daemon.pid}:
            os.kill(pid, signal.SIGKILL)
        assert daemon.wait() == 1, daemon.log


def test_in_the_background_the_command_ends_once_it_listens(place: Path) -> None:
    words = ["--shared-dir", str(place / "share"), "--socket-path", str(place / "v.sock"), "--daemonize"]
    assert run(words)[0] == 0
    pid = int((place / "v.sock.pid").read_text())
    with mount(place / "v.sock") as fs:
        assert fs.listdir("/") == []
        assert os.getsid(pid) == pid
    assert eventually(lambda: names(place) == set(), PATIENCE_S)
    words[1] = "/nonexistent"
    assert run(words)[0] == 1


# ---- sockets and pid files


def test_the_pid_file_is_locked_and_a_second_one_is_refused(place: Path) -> None:
    with serving(place) as daemon:
        pid_file = place / "v.sock.pid"
        assert int(pid_file.read_text()) == daemon.pid
        assert stat.S_IMODE(pid_file.stat().st_mode) == 0o600
        with pid_file.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = ["--shared-dir", str(place / "share"), "--socket-path", str(place / "v.sock")]
        assert_refused(same, 1, "v.sock.pid is locked")
        with mount(place / "v.sock") as fs:
            assert fs.listdir("/") == []


def test_what_a_killed_one_left_is_replaced(place: Path) -> None:
    with serving(place) as daemon:
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait()
    assert names(place) == {"v.sock", "v.sock.pid"}
    (place / "v.sock.pid").write_text("123456789\n")
    with serving(place) as daemon:
        assert eventually(lambda: "READY" in daemon.log, PATIENCE_S)
        assert int((place / "v.sock.pid").read_text()) == daemon.pid
        with mount(place / "v.sock") as fs:
            assert fs.listdir("/") == []


def test_a_file_in_the_sockets_place_is_left_alone(place: Path) -> None:
    (place / "v.sock").write_text("mine")
    words = ["--shared-dir", str(place / "share"), "--socket-path", str(place / "v.sock")]
    assert_refused(words, 1, "is no socket; remove it")
    assert names(place) == {"v.sock"}
    assert (place / "v.sock").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives the socket to another group")
def test_the_socket_is_the_owners_or_the_groups_too(place: Path) -> None:
    with serving(place):
        assert stat.S_IMODE((place / "v.sock").stat().st_mode) == 0o700
    (place / "v.sock").unlink()
    with serving(place, "--socket-group=nogroup"):
        found = (place / "v.sock").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o770, NOBODY)


@pytest.mark.skipif(os.geteuid() != 0, reason="root may give a file to any group")
def test_a_group_that_is_not_ones_own_is_refused(place: Path) -> None:
    place.chmod(0o777)
    words = ["--shared-dir", str(place / "share"), "--socket-path", str(place / "v.sock"), "--socket-group=0"]
    assert_refused(words, 1, "--socket-group", before=AS_NOBODY)
    assert names(place) == set()


def test_a_connected_socket_is_served(place: Path) -> None:
    with listening(place / "v.sock") as listener, contextlib.ExitStack() as stack:
        front_end = stack.enter_context(socket.socket(socket.AF_UNIX))
        front_end.settimeout(PATIENCE_S)
        front_end.connect(str(place / "v.sock"))
        accepted, _ = listener.accept()
        words = ["--fd=30", "--shared-dir", str(place / "share")]
        daemon = stack.enter_context(started(words, place / "log", handed={30: accepted.fileno()}))
        accepted.close()
        front_end.sendall(GET_FEATURES)
        assert len(front_end.recv(20)) == 20
        front_end.close()
        assert daemon.wait() == 0, daemon.log


def wrong_descriptors() -> Iterator[tuple[str, int]]:
    reader, _ = os.pipe()
    yield "is no socket", reader
    yield "is no stream socket", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    yield "is no stream socket", socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
    yield "neither listens nor is connected", socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


def test_a_descriptor_that_is_no_such_socket_is_named(place: Path) -> None:
    words = ["--fd=30", "--shared-dir", str(place / "share")]
    for number, (says, fd) in enumerate(wrong_descriptors()):
        log = place / f"log.{number}"
        with started(words, log, handed={30: fd}) as daemon:
            assert daemon.wait() == 1
        os.close(fd)
        assert f"--fd: descriptor 30 {says}" in log.read_text() and log.read_text().count("\n") == 1
    assert_refused(["--fd=999", *words[1:]], 1, "--fd: descriptor 999 is no socket")


# ---- what the host refuses


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--shared-dir=/nonexistent"], 1, "--shared-dir: /nonexistent does not exist"),
        (["--socket-path=/nonexistent/v.sock"], 1, "there is no directory /nonexistent"),
        (["--socket-group=no-such-group"], 1, "there is no group 'no-such-group'"),
        (["--rlimit-nofile=1000000000"], 1, "--rlimit-nofile: 1000000000 is more than is allowed"),
        (["--fd-budget=1000000", "--rlimit-nofile=5000"], 2, "leave too few for the rest"),
        (["--cache=sometimes"], 2, "use never, auto, metadata or always"),
        (["--thread-pool-size=100000"], 2, "from 0 to 1024"),
        (["-o", "cache=none,sources=/tmp"], 2, "-o sources: is unknown"),
        (["--zero-message-open"], 2, "--zero-message-open: needs --cache always"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    place: Path, words: list[str], status: int, says: str
) -> None:
    usual = ["--shared-dir", str(place / "share"), "--socket-path", str(place / "v.sock")]
    assert_refused([*usual, *words], status, says)
    assert names(place) == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_without_newuidmap_no_ids_are_mapped(place: Path) -> None:
    place.chmod(0o777)
    words = ["--shared-dir", str(place / "share"), "--socket-path", str(place / "v.sock")]
    maps = [":0:65534:1:", ":1:900000:1000:"]
    words += [f"--uid-map={one}" for one in maps] + [f"--gid-map={one}" for one in maps]
    assert_refused(words, 1, "map; install it (uidmap", before=AS_NOBODY, path="/nonexistent")
    assert names(place) == set()


def test_what_only_asks_needs_no_rights(place: Path) -> None:
    before = AS_NOBODY if os.geteuid() == 0 else []
    for words in (["--version"], ["--print-capabilities"], ["--help"], ["--fd=3", "-V"]):
        assert run(words, before=before) == (0, "")
    assert run([])[0] == 2
