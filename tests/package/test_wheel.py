"""The wheel, installed into an environment that is else empty, does all that it says."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD_SECONDS = 400
# What is in the package is asked here, not how fast it is; optimising takes three times as long.
UNATTENDED = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "CFLAGS": "-O0"}

# vhost-user: request, flags (version 1, reply bit 2), size of the payload; one message.
HEADER = struct.Struct("<III")
GET_FEATURES = 1
REPLY = 0x5
VIRTIO_F_VERSION_1 = 32

CONTENT = "of the share\n"
# Prints every command and group of commands, as words.
LIST_COMMANDS = """
import click
from vfsd.cli import vfsd

def show(command, words):
    print(*words)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            show(command.get_command(context, name), [*words, name])

show(vfsd, [])
"""


def run(*command: str | Path, cwd: Path, timeout: float = BUILD_SECONDS) -> None:
    """Run a command; what it printed is part of the failure."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=os.environ | UNATTENDED,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-8000:]}"


def alone() -> dict[str, str]:
    """The environment without what could lead to another installation's modules."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    assert select.select([process.stderr], [], [], 20)[0], "no READY in time"
    return process.stderr.readline()


def output(*command: str | Path, cwd: Path, status: int = 0) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=alone(), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr, done
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vfsd` of a new environment that holds the wheel and what it depends on, nothing else."""
    work = tmp_path_factory.mktemp("package")
    # A copy, so that nothing built here before gets into the package; the sdist comes first, so
    # that the wheel is made of what an sdist holds.
    source = work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    built = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
    for name in ("vfsd", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=built)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", cwd=source)
    wheels = list((work / "dist").glob("*.whl"))
    assert len(wheels) == 1

    environment = work / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=work)
    run(environment / "bin/pip", "install", "--quiet", wheels[0], cwd=work)
    run(environment / "bin/pip", "check", cwd=work)
    return environment / "bin/vfsd"


@pytest.fixture
def served(installed: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running daemon and its socket, below a directory that does not hold this project."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text(CONTENT)
    # Relative, because a socket's path is at most 107 bytes long.
    process = subprocess.Popen(
        [installed, "serve", "--socket", "socket", "--shared-dir", shared],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=alone(),
    )
    try:
        first = first_line(process)
        assert "READY" in first, first + process.communicate(timeout=20)[1]
        yield process, "socket"
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_wheel_serves_from_an_empty_environment(
    served: tuple[subprocess.Popen[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, path = served
    assert process.stderr is not None
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.settimeout(10)
        front_end.connect(path)
        front_end.sendall(HEADER.pack(GET_FEATURES, 1, 0))
        answer = front_end.recv(HEADER.size + 8, socket.MSG_WAITALL)
    assert HEADER.unpack_from(answer) == (GET_FEATURES, REPLY, 8)
    (features,) = struct.unpack_from("<Q", answer, HEADER.size)
    assert features >> VIRTIO_F_VERSION_1 & 1

    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert "Traceback" not in process.stderr.read()
    assert not (tmp_path / path).exists()


def test_every_command_explains_itself(installed: Path, tmp_path: Path) -> None:
    commands = output(installed.parent / "python", "-c", LIST_COMMANDS, cwd=tmp_path).splitlines()
    assert {"serve", "mount", "guest cp", "bench compare"} <= set(commands)
    for command in commands:
        shown = output(installed, *command.split(), "--help", cwd=tmp_path)
        assert shown.startswith(f"Usage: {' '.join(['vfsd', *command.split()])}"), shown


def test_the_bench_says_what_it_lacks(installed: Path, tmp_path: Path) -> None:
    assert "pip install 'vfsd[bench]'" in output(installed, "bench", cwd=tmp_path, status=2)


def test_vfsd_guest_from_the_wheel(
    installed: Path, served: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    _, path = served
    assert output(installed, "guest", "cat", "--socket", path, "file", cwd=tmp_path) == CONTENT
    code = f"import vfsd.guest\nwith vfsd.guest.mount({path!r}) as fs: print(fs.listdir())"
    assert output(installed.parent / "python", "-c", code, cwd=tmp_path) == "['file']\n"


def test_vfsd_mount_from_the_wheel(
    installed: Path, served: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("vfsd mount needs root and /dev/fuse")
    _, path = served
    place = tmp_path / "place"
    place.mkdir()
    # In a mount namespace of its own, which ends with it.
    mounted = subprocess.Popen(
        ["unshare", "--mount", installed, "mount", place, "--socket", path],
        cwd=tmp_path, env=alone(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "READY" in first_line(mounted)
        inside = Path(f"/proc/{mounted.pid}/root{place}")
        assert (inside / "file").read_text() == CONTENT
        mounted.send_signal(signal.SIGTERM)
        assert mounted.wait(20) == 0
    finally:
        mounted.kill()
        mounted.wait()
        assert mounted.stderr is not None
        mounted.stderr.close()
