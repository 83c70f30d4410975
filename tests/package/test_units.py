"""systemd's units and the file for libvirt, as packages install them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfsd.guest import mount
from vfsd.virtiofsd.main import CAPABILITIES

PACKAGING = Path(__file__).resolve().parent.parent.parent / "packaging"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    # As an instance, of the command that is there.
    shutil.copy(PACKAGING / "systemd/vfsd@.socket", tmp_path)
    text = (PACKAGING / "systemd/vfsd@.service").read_text()
    (tmp_path / "vfsd@.service").write_text(text.replace("/usr/bin/vfsd", "/bin/true"))
    verified = analyze(tmp_path, "verify", "--man=no", "vfsd@share.socket", "vfsd@share.service")
    ours = [line for line in verified.splitlines() if "vfsd" in line]
    assert ours == []
    # What would confine it further stands in the way of the sandbox that it makes for each guest.
    analyze(tmp_path, "security", "--offline=true", "--threshold=73", "vfsd@share.service")


def analyze(units: Path, *words: str) -> str:
    """What systemd-analyze says on stderr of the units there, which it accepts."""
    done = subprocess.run(
        ["systemd-analyze", *words],
        cwd=units,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "SYSTEMD_UNIT_PATH": f"{units}:"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def exec_start(config: Path) -> list[str]:
    """The service's command, for the instance whose file that is."""
    found = re.search(r"^ExecStart=(.*)", (PACKAGING / "systemd/vfsd@.service").read_text(), re.M)
    assert found is not None
    program, *words = found[1].split()
    assert (program, words[-1]) == ("/usr/bin/vfsd", "/etc/vfsd/%i.toml")
    return [str(Path(sys.executable).with_name("vfsd")), *words[:-1], str(config)]


def config_of(place: Path, socket_path: Path) -> Path:
    share = place / "shared"
    share.mkdir()
    (share / "greeting").write_text("hello")
    config = place / "data.toml"
    config.write_text(f'[share.data]\nsocket = "{socket_path}"\nshared-dir = "{share}"\n')
    return config


@contextmanager
def activated(listening: Path, config: Path) -> Iterator[subprocess.Popen[str]]:
    """The service's command, which systemd's socket starts when somebody connects."""
    with subprocess.Popen(
        ["systemd-socket-activate", f"--listen={listening}", *exec_start(config)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            assert "Listening" in process.stderr.readline()
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> str:
    """With SIGTERM, in order: what it has said."""
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    return said


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd is not installed")
def test_the_service_serves_what_connects_to_its_socket(tmp_path: Path) -> None:
    listening = tmp_path / "data.sock"
    config = config_of(tmp_path, listening)
    with activated(listening, config) as process:
        with mount(str(listening)) as fs:
            assert fs.read_bytes("greeting") == b"hello"
            process.send_signal(signal.SIGHUP)  # systemctl reload: the socket stays systemd's
            assert fs.read_bytes("greeting") == b"hello"
        with mount(str(listening)) as fs:
            assert fs.read_bytes("greeting") == b"hello"
        end(process)
        assert listening.is_socket()


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd is not installed")
def test_a_socket_of_no_share_is_refused(tmp_path: Path) -> None:
    listening = tmp_path / "other.sock"
    config = config_of(tmp_path, tmp_path / "data.sock")
    with activated(listening, config) as process:
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(listening))
            _, said = process.communicate(timeout=20)
        assert process.returncode == 2
        assert f"vfsd: LISTEN_FDS: {listening} is no share's socket; " in said
        assert not (tmp_path / "data.sock").exists()


def test_systemd_hears_of_guests_and_that_it_lives(tmp_path: Path) -> None:
    listening = tmp_path / "data.sock"
    config = config_of(tmp_path, listening)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(20)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with subprocess.Popen(
            exec_start(config), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                heard: list[bytes] = []

                def hear(what: bytes) -> None:
                    while not heard or heard[-1] != what:
                        heard.append(told.recv(200))

                hear(b"READY=1")
                hear(b"WATCHDOG=1")
                with mount(str(listening)):
                    hear(b"STATUS=guests: 1, shares: 1")
                    hear(b"WATCHDOG=1")
                hear(b"STATUS=guests: 0, shares: 1")
                # A queue that nobody reads holds up neither its guests nor its end.
                for _ in range(50):
                    with mount(str(listening)) as fs:
                        assert fs.read_bytes("greeting") == b"hello"
                end(process)
            finally:
                process.kill()


def test_libvirt_is_told_what_the_program_can_do() -> None:
    told = json.loads((PACKAGING / "60-vfsd.json").read_text())
    assert (told["type"], told["binary"]) == ("fs", "/usr/bin/vfsd-virtiofsd")
    assert told["features"] == list(CAPABILITIES)
