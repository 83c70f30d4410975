"""Each launcher's command line and the life it expects, from exec to the end."""

import contextlib
import errno
import fcntl
import grp
import os
import signal
import sys
from pathlib import Path

import pytest
from guests.daemon import eventually

from launchers.launchers import LAUNCHERS, Launcher
from launchers.process import PATIENCE_S, Started, listening, started
from vfsd.guest import Filesystem, mount

DATA = os.urandom(300_000)


def words_of(launcher: Launcher, place: Path) -> list[str]:
    return [
        word.format(
            dir=place / "share", sock=place / "virtiofsd.sock", fd=launcher.fd,
            group=grp.getgrgid(os.getgid()).gr_name,
        )
        for word in launcher.words.split()
    ]  # fmt: skip


def wait_until_ready(launcher: Launcher, daemon: Started, sock: Path) -> None:
    """As that launcher does."""
    conditions = {
        "handed": lambda: True,
        "line": lambda: "Waiting for vhost-user socket connection" in daemon.log,
        "socket": sock.exists,
        "pidfile": lambda: Path(f"{sock}.pid").exists() and Path(f"{sock}.pid").read_text().strip() != "",
    }
    assert eventually(lambda: conditions[launcher.ready]() or not daemon.running(), PATIENCE_S), daemon.log
    assert daemon.running(), daemon.log
    if launcher.ready == "pidfile":
        assert int(Path(f"{sock}.pid").read_text()) == daemon.pid


def work(fs: Filesystem, host: Path, readonly: bool) -> None:
    (host / "from-host").write_bytes(DATA)
    assert fs.read_bytes("from-host") == DATA
    if readonly:
        with pytest.raises(OSError) as caught:
            fs.mkdir("d")
        assert caught.value.errno == errno.EROFS
        return
    fs.mkdir("d")
    fs.write_bytes("d/f", DATA)
    fs.rename("d/f", "d/g")
    assert fs.listdir("d") == ["g"]
    assert (host / "d" / "g").read_bytes() == DATA
    assert (host / "d" / "g").stat().st_uid == host.stat().st_uid


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_starts_it_works_with_it_and_ends_it(place: Path, name: str) -> None:
    launcher = LAUNCHERS[name]
    sock = place / "virtiofsd.sock"
    host = place / "share"
    if name == "libvirt-comma":
        host = place / "share" / "a,b"
        host.mkdir()
    if "translate" in launcher.words:
        os.chown(host, 1000000, 1000000)
    cwd = {"": None, "dir": place / "share", "sock": place}[launcher.local]
    handed = {}
    with listening(sock) if launcher.ready == "handed" else pytest.MonkeyPatch.context() as listener:
        if launcher.ready == "handed":
            handed[launcher.fd] = listener.fileno()  # type: ignore[union-attr]
        with started(
            words_of(launcher, place), place / "log", handed=handed, cwd=cwd,
            environment=launcher.environment,
        ) as daemon:  # fmt: skip
            wait_until_ready(launcher, daemon, sock)
            fs = mount(sock, order=launcher.order, queue_size=128)
            try:
                work(fs, host, "--readonly" in launcher.words)
                end(launcher, daemon)
            finally:
                leave(fs)
            if launcher.end == "leave":
                assert daemon.wait() == 0, daemon.log
            assert eventually(lambda: not daemon.group()), "processes are left"
            assert "Traceback" not in daemon.log


def end(launcher: Launcher, daemon: Started) -> None:
    if launcher.end == "term":
        os.killpg(daemon.pid, signal.SIGTERM)
        assert daemon.wait() == 1, daemon.log
    elif launcher.end == "kill":
        os.kill(daemon.pid, signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL


def leave(fs: Filesystem) -> None:
    with contextlib.suppress(OSError):  # the daemon has gone first
        fs.close()


# Opens the file that is named first, locks it as libvirt does before exec, and runs the rest.
LOCKING = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
os.set_inheritable(fd, True)
fcntl.lockf(fd, fcntl.LOCK_EX)
os.execv(sys.argv[2], sys.argv[2:])
"""


def is_locked(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_libvirts_lock_on_its_pid_file_lasts_as_long_as_the_daemon(place: Path) -> None:
    sock = place / "v.sock"
    pid_file = place / "fs.pid"
    with (
        listening(sock) as listener,
        started(
            ["--fd=30", "-o", f"source={place / 'share'}"], place / "log", handed={30: listener.fileno()},
            before=[sys.executable, "-c", LOCKING, str(pid_file)],
        ) as daemon,
    ):  # fmt: skip
        with mount(sock) as fs:
            work(fs, place / "share", False)
            assert is_locked(pid_file)
        assert daemon.wait() == 0, daemon.log
        assert not is_locked(pid_file)
