"""How mounts begin and end: no hung mount, no descriptor and no thread left, whoever ends them."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import Daemon, eventually
from mounts import WORKLOADS, MountCommand, force_unmount, is_mounted, readable

from vfsd.cli.mount import check
from vfsd.errors import ConfigError
from vfsd.guest.bridge.device_mount import UNMOUNTED, DeviceMount
from vfsd.guest.bridge.mounting import MNT_DETACH, Mounted, abort, mount_flags, mount_table, unmount
from vfsd.guest.driver.device import Device

MOUNTS = 1000
CALLERS = 200
GONE = {errno.ECONNABORTED, errno.ENOTCONN}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "share"
    directory.mkdir()
    return directory


class Server(Daemon):
    """`vfsd serve`, which a test may crash."""

    crashed = False

    def crash(self) -> None:
        self.crashed = True
        os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def server(shared: Path) -> Iterator[Server]:
    daemon = Server(shared)
    yield daemon
    if daemon.crashed:
        daemon.kill()
    else:
        daemon.signal_all(signal.SIGCONT)
        daemon.stop()


@pytest.fixture
def command(server: Server, place: Path) -> Iterator[MountCommand]:
    running = MountCommand(server.socket, place)
    yield running
    running.kill()


def descriptors() -> list[str]:
    found = []
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(re.sub(r"\d+", "", os.readlink(entry.path)))
    return sorted(found)


class Callers:
    """workloads/callers.py, running."""

    def __init__(self, root: Path, count: int = CALLERS) -> None:
        self.count = count
        self.process = subprocess.Popen(
            [sys.executable, WORKLOADS / "callers.py", root, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert readable(self.process.stdout.fileno(), 20)
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def results(self, timeout: float) -> tuple[list[int], int]:
        """The errno of each caller, and of a call afterwards."""
        printed, _ = self.process.communicate(timeout=timeout)
        *errors, afterwards = printed.split("\n")[:-1]
        return [int(error) for error in errors], int(afterwards.split()[1])


@contextlib.contextmanager
def calling(server: Server, root: Path, count: int = CALLERS) -> Iterator[Callers]:
    """Callers, each with a request under way at a daemon that has stopped to work."""
    callers = Callers(root, count)
    try:
        stop(server)
        callers.go()
        yield callers
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.signal_all(signal.SIGCONT)
        callers.process.kill()
        callers.process.communicate()


def stop(server: Server) -> None:
    """SIGSTOP, and wait until no thread runs any more."""
    server.signal_all(signal.SIGSTOP)
    tasks = [task for pid in server.processes() for task in Path(f"/proc/{pid}/task").iterdir()]

    def state(task: Path) -> str:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]

    assert eventually(lambda: all(state(task) == "T" for task in tasks))


def files_for_callers(shared: Path, count: int = CALLERS) -> None:
    for number in range(count):
        (shared / f"f{number}").write_bytes(b"x" * 4096)


def test_a_thousand_mounts_leave_nothing(server: Server, place: Path) -> None:
    def once() -> None:
        with DeviceMount(Device.connect(server.socket), place):
            assert os.listdir(place) == ["here"]

    (server.shared / "here").touch()
    once()
    before = descriptors(), threading.active_count()
    assert eventually(lambda: server.log.count("the front end has left") == 1)
    held = server.descriptors()
    start = time.monotonic()
    for _ in range(MOUNTS):
        once()
    seconds = time.monotonic() - start
    print(f"{MOUNTS} mounts: {seconds / MOUNTS * 1000:.1f} ms each")
    assert (descriptors(), threading.active_count()) == before
    assert not is_mounted(place)
    assert eventually(lambda: server.log.count("the front end has left") == MOUNTS + 1)
    assert server.descriptors() == held
    assert os.listdir(place) == []


def test_a_killed_daemon_gives_every_caller_an_error(server: Server, place: Path) -> None:
    """With all requests in flight: within a second, and the mount is gone."""
    files_for_callers(server.shared)
    with DeviceMount(Device.connect(server.socket), place) as mount:
        with calling(server, place) as callers:
            assert eventually(lambda: mount.device.transport.in_flight >= CALLERS)
            start = time.monotonic()
            server.crash()
            errors, afterwards = callers.results(timeout=5)
            seconds = time.monotonic() - start
        print(f"{CALLERS} callers had their errors {seconds * 1000:.0f} ms after the daemon's end")
        assert seconds < 1
        assert len(errors) == CALLERS
        assert set(errors) <= GONE
        assert afterwards == errno.ENOTCONN
        assert mount.wait(timeout_s=5)
        assert eventually(lambda: not is_mounted(place))
        assert mount.why == mount.device.gone != UNMOUNTED
    assert not any(thread.name.startswith(("fuse.", "requests.")) for thread in threading.enumerate())


def test_the_command_ends_with_the_daemon(command: MountCommand, server: Server, place: Path) -> None:
    server.crash()
    assert command.wait(5) == 2
    assert command.log.splitlines()[-1].startswith("vfsd: --socket: ")
    assert "Traceback" not in command.log
    assert not is_mounted(place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(command: MountCommand, server: Server, place: Path, number: int) -> None:
    (place / "file").write_text("written")
    assert command.end(number, 5) == 0
    assert not is_mounted(place)
    assert (server.shared / "file").read_text() == "written"
    assert "Traceback" not in command.log


def test_a_signal_unmounts_what_is_in_use(command: MountCommand, place: Path, server: Server) -> None:
    with open(place / "open", "w") as file:
        file.write("in use")
        file.flush()
        assert command.end(signal.SIGTERM, 5) == 0
        assert "is still in use" in command.log
        assert not is_mounted(place)
        with pytest.raises(OSError) as found:
            os.fstat(file.fileno()), os.pwrite(file.fileno(), b"x", 0)
        assert found.value.errno in GONE
        with contextlib.suppress(OSError):
            file.close()
    assert (server.shared / "open").read_text() == "in use"


def test_unmounting_ends_the_command(command: MountCommand, place: Path, server: Server) -> None:
    unmount(str(place))
    assert command.wait(5) == 0
    assert UNMOUNTED in command.log
    assert eventually(lambda: "the front end has left" in server.log)


def test_a_lazy_unmount_waits_for_open_files(command: MountCommand, place: Path, server: Server) -> None:
    with open(place / "open", "wb", buffering=0) as file:
        unmount(str(place), MNT_DETACH)
        assert not is_mounted(place)
        file.write(b"still")
        assert (server.shared / "open").read_bytes() == b"still"
        assert command.process.poll() is None
    assert command.wait(5) == 0


def test_a_moved_mount_is_unmounted_where_it_is(command: MountCommand, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    try:
        subprocess.run(["mount", "--bind", place, other], check=True)
        assert command.end(signal.SIGTERM, 5) == 0
        assert not is_mounted(place)
        assert not is_mounted(other)
    finally:
        force_unmount(other)


def test_what_was_mounted_below_stays(server: Server, place: Path) -> None:
    """Also if several ways to end it are taken at a time."""
    subprocess.run(["mount", "-t", "tmpfs", "below", place], check=True)
    (place / "below").touch()
    for end in ("close", "abort", "kill"):
        with DeviceMount(Device.connect(server.socket), place) as mount:
            assert not (place / "below").exists()
            if end == "kill":
                server.crash()
                assert mount.wait(timeout_s=5)
            if end != "close":
                mount.abort()
                mount.abort()
        assert (place / "below").exists()


def test_a_connection_that_was_aborted_leaves_no_mount(command: MountCommand, place: Path) -> None:
    """Somebody writes to its abort file, as one does with a file system that hangs."""
    (number,) = [entry.number for entry in mount_table() if entry.point == str(place)]
    abort(Mounted(number, 0))
    assert command.wait(5) in (0, 2)
    assert not is_mounted(place)


def test_a_killed_command_leaves_no_caller_waiting(server: Server, place: Path) -> None:
    files_for_callers(server.shared, 8)
    command = MountCommand(server.socket, place)
    try:
        with calling(server, place, 8) as callers:
            os.kill(command.process.pid, signal.SIGKILL)
            command.wait(5)
            errors, _ = callers.results(timeout=5)
        assert set(errors) <= GONE
        with pytest.raises(OSError) as found:
            os.listdir(place)
        assert found.value.errno == errno.ENOTCONN
    finally:
        command.kill()


def test_a_daemon_that_hangs_is_given_up(server: Server, place: Path) -> None:
    files_for_callers(server.shared, 8)
    with (
        DeviceMount(Device.connect(server.socket), place, timeout_s=1) as mount,
        calling(server, place, 8) as callers,
    ):
        assert eventually(lambda: mount.device.transport.in_flight >= 8)
        start = time.monotonic()
        mount.close()
        print(f"closed after {time.monotonic() - start:.1f} s")
        errors, _ = callers.results(timeout=1)
        assert set(errors) <= GONE
    assert not is_mounted(place)


def test_a_daemon_that_never_answers_init(server: Server, place: Path) -> None:
    device = Device.connect(server.socket)
    stop(server)
    with pytest.raises(OSError, match="did not answer INIT"):
        DeviceMount(device, place, timeout_s=0.2)
    assert not is_mounted(place)
    device.remove()  # idempotent


def test_interrupts_are_not_sent_on(server: Server, place: Path) -> None:
    """A signal does not end a call, as on virtio-fs, and the device hears nothing of it."""
    files_for_callers(server.shared, 4)
    with DeviceMount(Device.connect(server.socket), place) as mount:
        with calling(server, place, 4) as callers:
            assert eventually(lambda: mount.device.transport.in_flight >= 4)
            callers.process.kill()
            assert eventually(lambda: mount.counters()["interrupts"] > 0)
            assert callers.process.poll() is None
            server.signal_all(signal.SIGCONT)
            callers.process.wait(5)
        assert os.listdir(place)
        opcodes = mount.device.transport.counters()["opcodes"]
        assert not {"36", "INTERRUPT"} & set(opcodes)


def test_forgets_go_to_hiprio_one_by_one(server: Server, place: Path) -> None:
    files_for_callers(server.shared)
    with DeviceMount(Device.connect(server.socket), place) as mount:
        subprocess.run(["rm", "-rf", *place.iterdir()], check=True)
        assert eventually(lambda: mount.counters()["forgets"] >= CALLERS)
        counters = mount.device.transport.counters()
        assert counters["opcodes"]["FORGET"] >= CALLERS
        assert "BATCH_FORGET" not in counters["opcodes"]
        assert mount.counters()["refused"] == 0


def test_requests_fit_in_a_queue_of_eight(server: Server, place: Path) -> None:
    """Four pages a request, whatever the daemon and the kernel would agree on."""
    with DeviceMount(Device.connect(server.socket, queue_size=8), place) as mount:
        (place / "file").write_bytes(b"x" * 65536)
        assert mount.device.transport.counters()["opcodes"]["WRITE"] == 4
        assert (place / "file").read_bytes() == b"x" * 65536
        assert mount.counters()["refused"] == 0


@pytest.mark.parametrize("queue_size", [8, 1024])
def test_a_daemon_that_promises_everything(shared: Path, place: Path, queue_size: int) -> None:
    """Splicing, passthrough, io_uring, timeouts: the kernel is not told."""
    (shared / "file").write_bytes(os.urandom(1 << 20))
    with contextlib.ExitStack() as stack:
        socket = shared.parent / "socket"
        daemon = subprocess.Popen(
            [sys.executable, WORKLOADS / "greedy.py", "serve", "--socket", socket, "--shared-dir", shared],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        stack.callback(daemon.communicate)
        stack.callback(daemon.kill)
        assert daemon.stderr is not None
        assert "READY" in daemon.stderr.readline()
        mount = stack.enter_context(DeviceMount(Device.connect(socket, queue_size=queue_size), place))
        assert (place / "file").read_bytes() == (shared / "file").read_bytes()
        (place / "new").write_bytes(b"x" * (2 << 20))
        assert (shared / "new").stat().st_size == 2 << 20
        assert mount.counters()["refused"] == 0


def test_options_of_mount(server: Server, place: Path) -> None:
    command = MountCommand(server.socket, place, "-o", "ro,nosuid,noexec")
    try:
        with pytest.raises(OSError) as found:
            (place / "file").touch()
        assert found.value.errno == errno.EROFS
        assert os.statvfs(place).f_flag & (os.ST_NOSUID | os.ST_NOEXEC) == os.ST_NOSUID | os.ST_NOEXEC
        assert command.end() == 0
    finally:
        command.kill()


def test_mistakes_are_told_in_one_line(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, expected in (
        (["--socket", tmp_path / "none", shared], "none: No such file or directory"),
        (["--socket", tmp_path / "file", shared], "is no socket"),
        (["--socket", tmp_path / "file", "/dev/null"], "is neither a directory nor a regular file"),
        (["--socket", tmp_path / "file", shared, "-o", "ro,mand"], "option mand is not known"),
        (["--socket", tmp_path / "file", shared, "--queue-size", "100"], "100 is no power of two"),
        ([shared], "Missing option '--socket'"),
        (["--socket", tmp_path / "file"], "Missing argument 'DIR'"),
    ):
        found = subprocess.run(
            [sys.executable, "-m", "vfsd", "mount", *words], capture_output=True, text=True, timeout=20
        )
        assert found.returncode == 2, found.stderr
        assert expected in found.stderr
        assert len(found.stderr.splitlines()) == 1, found.stderr
        assert found.stderr.startswith("vfsd: ")


def test_a_socket_without_a_daemon(server: Server, place: Path, tmp_path: Path) -> None:
    daemon_socket = str(server.socket)
    server.crash()
    assert eventually(lambda: not server.running())
    found = subprocess.run(
        [sys.executable, "-m", "vfsd", "mount", "--socket", daemon_socket, place],
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert found.returncode == 2
    assert "Connection refused" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_only_root_and_only_with_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The package has the command of the module's name.
    monkeypatch.setattr(sys.modules["vfsd.cli.mount"], "DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(ConfigError, match="load the module fuse"):
        check(str(tmp_path), str(tmp_path), 8)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="run it as root"):
        check(str(tmp_path), str(tmp_path), 8)


def test_later_options_win() -> None:
    assert mount_flags("ro,rw,noexec,,exec,nodev,allow_other") == 4
