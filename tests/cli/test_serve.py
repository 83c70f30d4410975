"""What operators get wrong, and how the daemon begins and ends."""

import contextlib
import errno
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from guests import StartDaemon
from guests.daemon import eventually

from vfsd.errors import ConfigError
from vfsd.options.checks import check_seconds
from vfsd.options.o_list import Given, read_o
from vfsd.options.resolve import check_options

SERVE = [sys.executable, "-m", "vfsd", "serve"]
NOBODY = 65534


def refused(arguments: list[str], before: Sequence[str] = ()) -> str:
    """The one line a wrong command line gets."""
    done = subprocess.run(
        [*before, *SERVE, *arguments], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "v.sock"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--shared-dir", "/nonexistent", "does not exist"),
        ("--shared-dir", "/dev/null", "is neither a directory nor a regular file"),
        ("--cache", "sometimes", "use never, auto, metadata or always"),
        ("--tag", "t" * 37, "use at most 36"),
        ("--tag", "ü" * 19, "has 38 bytes"),
        ("--tag", "a\nb", "newline"),
        ("--tag", "", "is empty"),
        ("--socket", "/nonexistent/v.sock", "make it first"),
        ("--socket", "/tmp/" + "s" * 103, "use a shorter one"),
        ("--socket", "/etc/passwd", "is no socket"),
        ("--num-request-queues", "0", "from 1 to 64"),
        ("--dax-window", "0", "in steps of 2M"),
        ("--dax-policy", "always", "add --dax-window"),
        ("--num-request-queues", "two", "from 1 to 64"),
        ("--fd-budget", "63", "from 64 to 1048576"),
        ("--inode-file-handles", "always", "use never, prefer or mandatory"),
        ("--log-level", "loud", "'loud' is unknown"),
        ("--xattrmap", ":ok:all:::!bad:", "character 16: the type does not end"),
        ("--posix-acl", "perhaps", "use never, auto or always"),
        ("--translate-uid", "guest:0:1", "rule 1, character 10: the count is missing"),
        ("--translate-gid", "map:0:1:2:3", "rule 1, character 11: '3' is too much"),
        ("--uid-map", ":0:1:", "rule 1, character 6: "),
        ("--attr-timeout", "1e3", "'1e3' is no number of seconds up to 1000000000"),
        ("--parallel-direct-writes", "o_direct", "use never, direct or always"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_option(
    share: Path, place: Path, option: str, value: str, says: str
) -> None:
    given = {"--socket": str(place), "--shared-dir": str(share), option: value}
    line = refused([word for pair in given.items() for word in pair])
    assert option in line and says in line
    assert not place.exists()


def test_missing_and_unknown_options_are_named(share: Path, place: Path) -> None:
    assert "--socket" in refused(["--shared-dir", str(share)])
    assert "--shared-dir" in refused(["--socket", str(place)])
    assert "--bogus" in refused(["--socket", str(place), "--shared-dir", str(share), "--bogus"])
    assert not place.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cache", "auto"], "--cache always"),
        (["--cache", "always", "--writeback"], "--writeback"),
        (["--cache", "always", "--readonly"], "--readonly"),
        (["--cache", "always", "--flock"], "--flock"),
    ],
)
def test_what_can_not_be_combined_is_named(share: Path, place: Path, options: list[str], says: str) -> None:
    line = refused(["--socket", str(place), "--shared-dir", str(share), "--zero-message-open", *options])
    assert "--zero-message-open" in line and says in line
    assert not place.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("source={share},bogus", "-o bogus: is unknown"),
        ("source={share},no_bogus=1", "-o no_bogus: is unknown"),
        ("source={share},cache=sometimes", "-o cache: 'sometimes' is unknown"),
        ("source={share},cache", "-o cache: needs a value"),
        ("source={share},xattr=yes", "-o xattr: takes no value"),
        ("source={share},no_cache", "-o no_cache: is unknown"),
        ("source={share}/a,,b", "/a,b does not exist"),
        ("xattr,no_xattr", "--shared-dir: is missing"),
    ],
)
def test_a_bad_word_of_o_is_named(share: Path, place: Path, words: str, says: str) -> None:
    assert says in refused(["--socket", str(place), "-o", words.format(share=share)])
    assert not place.exists()


def test_o_gives_what_its_options_give_and_the_last_word_holds() -> None:
    plain = {"socket": Given("--socket", "/tmp/v.sock")}
    by_o = read_o(["source=/tmp,cache=none", "xattr,no_xattr,xattr,loglevel=warn"]).given
    by_name = {"shared_dir": "/tmp", "cache": "never", "xattr": True, "log_level": "warning"}
    named = {key: Given(key, value) for key, value in by_name.items()}
    assert check_options(plain | by_o) == check_options(plain | named)
    assert not check_options(plain | read_o(["source=/tmp,xattr", "no_xattr"]).given).xattr


@pytest.mark.parametrize("text", ["", "-1", "1s", "nan", "1000000001", ".", "\u0661"])
def test_seconds_are_plain_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--entry-timeout: .+ is no number"):
        check_seconds("--entry-timeout", text)


def test_the_daemon_takes_o(share: Path, place: Path) -> None:
    with serving(place, f"source={share},cache=auto", source="-o") as process:
        end(process, signal.SIGTERM, place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_without_permission_is_refused(share: Path, place: Path) -> None:
    os.chown(share, NOBODY, NOBODY)
    share.chmod(0o700)
    without = "-dac_override,-dac_read_search"  # root like any other user
    line = refused(
        ["--socket", str(place), "--shared-dir", str(share)],
        before=["setpriv", f"--inh-caps={without}", f"--bounding-set={without}"],
    )
    assert "--shared-dir" in line and "permission" in line
    assert not place.exists()


def test_a_budget_beyond_the_limit_is_refused(share: Path, place: Path) -> None:
    line = refused(
        ["--socket", str(place), "--shared-dir", str(share), "--fd-budget", "1000"],
        before=["prlimit", "--nofile=1024:1024"],
    )
    assert "--fd-budget: 1000 of 1024 descriptors leave too few" in line and "at most 921" in line
    assert not place.exists()


def test_a_live_daemons_socket_is_refused_and_left_alone(daemon: StartDaemon, share: Path) -> None:
    first = daemon(share)
    line = refused(["--socket", str(first.socket), "--shared-dir", str(share)])
    assert "--socket" in line and "a daemon listens" in line
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(str(first.socket))


def test_a_stale_socket_is_replaced(share: Path, place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(place))
    with serving(place, share) as process:
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(place))
        end(process, signal.SIGTERM, place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_also_with_a_front_end(
    share: Path, place: Path, number: signal.Signals
) -> None:
    with serving(place, share) as process, socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(str(place))
        end(process, number, place)


def test_systemd_is_told_when_it_listens(share: Path, place: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        with serving(place, share, NOTIFY_SOCKET=str(tmp_path / "notify")) as process:
            assert notify.recv(100) == b"READY=1"
            end(process, signal.SIGTERM, place)


def test_socket_path_is_the_same_option(share: Path, place: Path) -> None:
    with serving(place, share, option="--socket-path") as process:
        end(process, signal.SIGTERM, place)


def test_out_of_descriptors_front_ends_wait_until_one_leaves(daemon: StartDaemon, share: Path) -> None:
    served = daemon(share)
    resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (64, 64))
    with contextlib.ExitStack() as stack:

        def another() -> bool:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)  # a full backlog is no reason to wait
            sock.connect_ex(str(served.socket))
            return "can't be" in served.log

        assert eventually(another, 20)
        before = cpu_seconds(served.pid)
        threading.Event().wait(0.5)
        assert cpu_seconds(served.pid) - before < 0.2, "it tries again and again"
        assert served.log.count("can't be") == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as late:
        assert eventually(lambda: late.connect_ex(str(served.socket)) in (0, errno.EISCONN))
        late.settimeout(20)
        late.sendall(struct.pack("=III", 1, 1, 0))  # GET_FEATURES
        assert len(late.recv(20)) == 20


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serving(
    place: Path, share: Path | str, option: str = "--socket", source: str = "--shared-dir", **environment: str
) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [*SERVE, option, str(place), source, str(share)],
        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert process.stderr is not None
    assert "READY" in process.stderr.readline()
    return process


def end(process: "subprocess.Popen[str]", number: signal.Signals, place: Path) -> None:
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert not place.exists()
