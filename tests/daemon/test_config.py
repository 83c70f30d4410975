"""`vfsd serve --config`: many shares of one daemon, and a file that changes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guests.daemon import eventually

from vfsd.guest import mount

VFSD = [sys.executable, "-m", "vfsd"]
STAYS = "everything stays as it is"


class Serving:
    """A daemon of `place`/vfsd.toml, its stderr in a file."""

    def __init__(self, place: Path) -> None:
        self.place = place
        with open(place / "log", "wb") as log:
            command = [*VFSD, "serve", "--config", str(place / "vfsd.toml")]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def log(self) -> str:
        return (self.place / "log").read_text()

    def says(self, text: str, times: int = 1) -> bool:
        return eventually(lambda: self.log.count(text) >= times or self.process.poll() is not None, 30) and (
            self.log.count(text) >= times
        )

    def reload(self, text: str) -> None:
        """With that file."""
        (self.place / "vfsd.toml").write_text(text)
        os.kill(self.process.pid, signal.SIGHUP)


@contextmanager
def serving(place: Path, text: str, shares: int) -> Iterator[Serving]:
    (place / "vfsd.toml").write_text(text)
    daemon = Serving(place)
    try:
        assert daemon.says("READY", shares), daemon.log
        yield daemon
        daemon.process.terminate()
        assert daemon.process.wait(30) == 0, daemon.log
        assert "Traceback" not in daemon.log, daemon.log
        assert not list(place.glob("*.sock")), "sockets stay"
    finally:
        daemon.process.kill()
        daemon.process.wait(30)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of-{name}").write_text(name)
    return tmp_path


def share(place: Path, name: str, *more: str) -> str:
    lines = [
        f"[share.{name}]",
        f'shared-dir = "{place}/{name}"',
        f'socket = "{place}/{name}.sock"',
        *more,
        "",
    ]
    return "\n".join(lines)


def refused(place: Path, text: str) -> list[str]:
    """What `vfsd config check` says of a file, a line each; serving it is refused too, with one line."""
    file = place / "vfsd.toml"
    file.write_text(text)
    check = subprocess.run([*VFSD, "config", "check", str(file)], capture_output=True, text=True, timeout=30)
    serve = subprocess.run(
        [*VFSD, "serve", "--config", str(file)], capture_output=True, text=True, timeout=30
    )
    assert (check.returncode, serve.returncode) == (2, 2), (check, serve)
    lines = check.stderr.splitlines()
    assert len(serve.stderr.splitlines()) == 1
    assert serve.stderr.startswith(lines[0])
    assert all(line.startswith(f"vfsd: {file}: ") for line in lines), lines
    assert not list(place.glob("*.sock"))
    return [line.removeprefix(f"vfsd: {file}: ") for line in lines]


def test_each_share_has_its_socket_and_its_options(place: Path) -> None:
    text = "[defaults]\nreadonly = true\n" + share(place, "one") + share(place, "two", "readonly = false")
    with serving(place, text, 2), mount(place / "one.sock") as one, mount(place / "two.sock") as two:
        assert one.listdir("/") == ["of-one"]
        assert two.listdir("/") == ["of-two"]
        two.mkdir("/made")
        with pytest.raises(OSError, match="Read-only"):
            one.mkdir("/made")
    assert (place / "two/made").is_dir()


def test_a_server_holds_nothing_of_another_share(place: Path) -> None:
    """Neither a descriptor nor the memory that servers of one share have in common."""
    with serving(place, share(place, "one") + share(place, "two"), 2) as daemon, mount(place / "one.sock"):
        (server,) = map(
            int, Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
        )
        held = {os.readlink(entry) for entry in Path(f"/proc/{server}/fd").iterdir()}
        assert str(place / "two") not in held
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
        segments = {line.split()[4] for line in maps.splitlines() if "memfd:" in line}
        kept = {
            line.split()[4]
            for line in Path(f"/proc/{server}/maps").read_text().splitlines()
            if "memfd:" in line
        }
        assert len(segments) == 2
        assert len(segments & kept) == 1


def test_reloading_adds_and_removes_shares_beside_those_in_use(place: Path) -> None:
    both = share(place, "one") + share(place, "two")
    with (
        serving(place, both, 2) as daemon,
        mount(place / "one.sock") as one,
        mount(place / "two.sock") as two,
    ):
        daemon.reload(share(place, "two") + share(place, "three"))
        assert daemon.says("READY", 3), daemon.log
        assert daemon.says("share one is removed"), daemon.log
        assert not (place / "one.sock").exists()
        one.mkdir("/after")
        two.mkdir("/after")
        with mount(place / "three.sock") as three, mount(place / "two.sock") as second:
            assert three.listdir("/") == ["of-three"]
            assert sorted(second.listdir("/")) == ["after", "of-two"]
        root = str(place / "one")
        assert root in links(daemon.process.pid)
        one.close()
        assert eventually(lambda: root not in links(daemon.process.pid)), (
            "what its last guest has left stays open"
        )
    assert (place / "one/after").is_dir()


def links(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def test_a_changed_share_is_for_the_guests_that_come(place: Path) -> None:
    """Also on the same socket: who connects meanwhile is not refused."""
    with serving(place, share(place, "one"), 1) as daemon, mount(place / "one.sock") as before:
        inode = (place / "one.sock").stat().st_ino
        daemon.reload(share(place, "one", "readonly = true"))
        assert daemon.says("READY", 2), daemon.log
        assert (place / "one.sock").stat().st_ino == inode
        before.mkdir("/still")
        with mount(place / "one.sock") as after, pytest.raises(OSError, match="Read-only"):
            after.mkdir("/refused")
        daemon.reload(share(place, "one", "socket-group = 0"))
        assert daemon.says("READY", 3), daemon.log
        assert (place / "one.sock").stat().st_mode & 0o777 == 0o770
        with mount(place / "one.sock") as again:
            assert sorted(again.listdir("/")) == ["of-one", "still"]


def test_shares_may_swap_their_sockets(place: Path) -> None:
    both = share(place, "one") + share(place, "two")
    with serving(place, both, 2) as daemon:
        swapped = both.replace("one.sock", "x").replace("two.sock", "one.sock").replace("x", "two.sock")
        daemon.reload(swapped)
        assert daemon.says("READY", 4), daemon.log
        with mount(place / "one.sock") as fs:
            assert fs.listdir("/") == ["of-two"]


@pytest.mark.parametrize(
    "wrong",
    ["[share.one", "", "[share.one]\ncahce = 1\n", "two", "foreign"],
)
def test_a_wrong_file_changes_nothing(place: Path, wrong: str) -> None:
    """two: a share is well, a further one is missing. foreign: its socket's path is that of a directory."""
    good = share(place, "one")
    if wrong == "two":
        wrong = share(place, "two") + share(place, "missing")
    if wrong == "foreign":
        (place / "three.sock").mkdir()
        wrong = share(place, "two") + share(place, "three")
    with serving(place, good, 1) as daemon, mount(place / "one.sock") as one:
        before = links(daemon.process.pid)
        daemon.reload(wrong)
        assert daemon.says(STAYS), daemon.log
        assert daemon.log.count("ERROR") == 1, daemon.log
        assert links(daemon.process.pid) == before
        one.mkdir("/after")
        with mount(place / "one.sock") as second:
            assert sorted(second.listdir("/")) == ["after", "of-one"]
        assert not (place / "two.sock").exists()
        daemon.reload(good + share(place, "two"))
        assert daemon.says("READY", 2), daemon.log
        if (place / "three.sock").exists():
            (place / "three.sock").rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_directory_that_does_not_answer_holds_nobody(place: Path) -> None:
    fuse = os.open("/dev/fuse", os.O_RDWR)
    hung = place / "two"
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
    subprocess.run(
        ["mount", "-i", "-t", "fuse", "-o", options, "hung", str(hung)],
        check=True,
        pass_fds=[fuse],
        timeout=30,
    )
    try:
        with serving(place, share(place, "one"), 1) as daemon:
            daemon.reload(share(place, "one") + share(place, "two"))
            os.read(fuse, 1 << 18)  # INIT, which nobody answers
            with mount(place / "one.sock") as one:
                assert one.listdir("/") == ["of-one"]
            assert STAYS not in daemon.log
            assert daemon.says(STAYS), daemon.log
            daemon.reload(share(place, "one") + share(place, "three"))
            assert daemon.says("READY", 2), daemon.log
    finally:
        os.close(fuse)
        subprocess.run(["umount", "-l", str(hung)], check=True, timeout=30)


def test_a_file_without_mistakes_is_checked_and_not_served(place: Path) -> None:
    file = place / "vfsd.toml"
    file.write_text(
        '[daemon]\nlog-level = "warning"\n' + share(place, "one", "attr-timeout = 1.5", "poll-us = 0")
    )
    done = subprocess.run([*VFSD, "config", "check", str(file)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (place / "one.sock").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('cahce = "auto"', "[share.one] cahce: is an unknown key; did you mean cache?"),
        ("read_only = true", "[share.one] read_only: is an unknown key; did you mean readonly?"),
        ('socket-path = "/s"', "[share.one] socket-path: is an unknown key; did you mean socket?"),
        ('cache = "sometimes"', "[share.one] cache: 'sometimes' is unknown; use never"),
        ("cache = true", "[share.one] cache: is true or false; write cache ="),
        ('readonly = "yes"', "[share.one] readonly: is a text; write readonly = true or false"),
        ("poll-us = -1", "[share.one] poll-us: '-1' is no number from 0"),
        ("timeout = nan", "[share.one] timeout: 'nan' is no number of seconds"),
        ("translate-uid = [1]", '[share.one] translate-uid: is a list; write translate-uid = ["'),
        ("tag = 1979-05-27", "[share.one] tag: is a date or time"),
        ("fd = 3", "[share.one] fd: is for the command line alone"),
        ('log-level = "debug"', "[share.one] log-level: is not for this table; put it into [daemon]"),
        ("readonly = true\nreadonly = true", "line 5: readonly is there twice"),
        ("[share.one]", "line 4: [share.one] is there twice"),
        ("[shares.two]", "shares: is an unknown table; did you mean share?"),
        ("[daemon]\ncache = 'auto'", "[daemon] cache: is not for this table; put it into [share.NAME]"),
        ("[defaults]\nreadonly = 1", "[defaults] readonly: is a number"),
        ("[share.'a b']", "[share.'a b']: a share's name has"),
        ("[share.two]", "[share.two] socket: is missing; add socket = \"/run/vfsd/two.sock\""),
        ("dax-policy = 'never'", "[share.one] dax-policy: there is no window"),
        ("cache = [", "Invalid value"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_remedy(place: Path, line: str, says: str) -> None:
    assert refused(place, share(place, "one", line))[0].startswith(says)


def test_each_mistake_has_a_line(place: Path) -> None:
    text = (
        share(place, "one", "cahce = 1", "readonly = 1") + share(place, "missing") + "[defaults]\npoll = 1\n"
    )
    said = refused(place, text)
    assert len(said) == 4, said
    assert "does not exist" in said[3]


def test_two_shares_on_one_socket_are_refused(place: Path) -> None:
    (place / "link").symlink_to(place)
    text = share(place, "one") + share(place, "two").replace("two.sock", "link/one.sock")
    (said,) = refused(place, text)
    assert said == "[share.two] socket: is that of [share.one] too; give each share its own"


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "binary", "deep"])
def test_what_is_no_such_file_is_refused(place: Path, kind: str) -> None:
    file = place / "file"
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "binary":
        file.write_bytes(b"\xff\xfe")
    elif kind == "deep":
        file.write_text("a = " + "[" * 100_000)
    for command in (["config", "check"], ["serve", "--config"]):
        done = subprocess.run([*VFSD, *command, str(file)], capture_output=True, text=True, timeout=30)
        assert done.returncode == 2, done
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"vfsd: {file}: "), done.stderr


def test_the_file_and_options_of_one_share_are_not_for_one_command(place: Path) -> None:
    (place / "vfsd.toml").write_text(share(place, "one"))
    for more in (["--cache", "auto"], ["-o", "xattr"]):
        command = [*VFSD, "serve", "--config", str(place / "vfsd.toml"), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done
        assert f"there is {more[0]} too" in done.stderr
