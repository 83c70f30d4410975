"""systemd's units and the file for libvirt, as packages install them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
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
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "vfsd@share.socket", "vfsd@share.service"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "vfsd" in line]
    assert ours == []


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd is not installed")
def test_the_service_serves_what_connects_to_its_socket(tmp_path: Path) -> None:
    (tmp_path / "greeting").write_text("hello")
    found = re.search(r"^ExecStart=(.*)", (PACKAGING / "systemd/vfsd@.service").read_text(), re.M)
    assert found is not None
    values = {"${SHARED_DIR}": str(tmp_path), "$OPTIONS": "--cache=never"}
    program, *words = (values.get(word, word) for word in found[1].split())
    assert program == "/usr/bin/vfsd"
    listening = tmp_path / "socket"
    with subprocess.Popen(
        ["systemd-socket-activate", f"--listen={listening}", Path(sys.executable).with_name("vfsd"), *words],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            assert "Listening" in process.stderr.readline()
            with mount(str(listening)) as fs:
                assert fs.read_bytes("greeting") == b"hello"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_libvirt_is_told_what_the_program_can_do() -> None:
    told = json.loads((PACKAGING / "60-vfsd.json").read_text())
    assert (told["type"], told["binary"]) == ("fs", "/usr/bin/vfsd-virtiofsd")
    assert told["features"] == list(CAPABILITIES)
