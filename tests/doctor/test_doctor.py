"""vfsd doctor, on what is really there: a daemon, a directory, a QEMU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guests import Daemon, StartDaemon
from guests.daemon import eventually

QEMU = "qemu-system-x86_64"
BACKEND = "memory-backend-memfd,id=mem,size=256M"
USES_BACKEND = ("-machine", "q35,memory-backend=mem", "-m", "256M")


def doctor(*arguments: str | Path, status: int | None = 0) -> dict[str, tuple[str, str]]:
    """Level and text by check. Each that is not ok says what to do."""
    words = [sys.executable, "-m", "vfsd", "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert all(bool(finding["remedy"]) == (finding["level"] != "ok") for finding in found)
    assert done.returncode == int(any(finding["level"] == "wrong" for finding in found))
    assert status is None or done.returncode == status, found
    return {finding["check"]: (finding["level"], finding["text"]) for finding in found}


def test_this_host_can_serve() -> None:
    found = doctor(status=None)
    assert found["kernel"] == ("ok", f"Linux {os.uname().release}")
    assert found["namespaces"][0] == found["seccomp"][0] == "ok"
    assert {"landlock", "open files", "ids", "security modules"} <= found.keys()


def test_namespaces_that_can_not_be_made_are_wrong() -> None:
    """In a user namespace that may have no further ones."""
    code = (
        "from pathlib import Path\n"
        "for kind in ('user', 'mnt', 'pid', 'net', 'ipc'):\n"
        "    Path(f'/proc/sys/user/max_{kind}_namespaces').write_text('0')\n"
        "from vfsd.doctor.host import namespaces\n"
        "print(namespaces().level)"
    )
    words = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd="/")
    if "unshare failed" in done.stderr or "/proc/sys/user" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr}")
    assert done.stdout == "wrong\n", done


def test_a_shared_directory(tmp_path: Path) -> None:
    found = doctor("--shared-dir", tmp_path)
    assert found["writing"][0] == found["file system"][0] == "ok"
    assert doctor("--shared-dir", "/dev/shm")["file system"] == (
        "ok", "/dev/shm is on tmpfs: in memory, nothing waits for a disk",
    )  # fmt: skip
    assert doctor("--shared-dir", tmp_path / "none", status=1)["shared directory"][0] == "wrong"


def test_a_directory_that_is_read_only_or_on_a_file_system_without_handles(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "ro", "overlay"):
        (tmp_path / name).mkdir()
    script = (
        'mount --bind "$1/lower" "$1/ro" && mount -o remount,bind,ro "$1/ro" &&'
        ' mount -t overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" none "$1/overlay"'
        " || exit 77\n"
        'for name in ro overlay; do "$2" -m vfsd doctor --json --shared-dir "$1/$name" >"$1/$name.json"; done'
    )
    words = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip(f"no mounts here: {done.stderr}")
    levels = {
        name: {finding["check"]: finding["level"] for finding in json.loads((tmp_path / name).read_text())}
        for name in ("ro.json", "overlay.json")
    }
    assert levels["ro.json"]["writing"] == "warning"
    assert levels["overlay.json"]["file handles"] == "warning"
    assert levels["overlay.json"]["writing"] == "ok"


def test_a_daemon_that_answers(daemon: StartDaemon, tmp_path: Path) -> None:
    served: Daemon = daemon(tmp_path, options=("--dax-window", "4M"))
    for _ in range(3):
        found = doctor("--socket", served.socket)
        assert found["socket"][0] == "ok"
        level, text = found["daemon"]
        assert level == "ok" and "tag myfs" in text and "DAX window of 4 MiB" in text


def test_a_socket_nobody_listens_on_and_one_that_says_nothing(tmp_path: Path) -> None:
    assert doctor("--socket", tmp_path / "none", status=1)["socket"][0] == "wrong"
    (tmp_path / "file").touch()
    assert "is no socket" in doctor("--socket", tmp_path / "file", status=1)["socket"][1]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{tmp_path}/s")
        assert "nobody listens" in doctor("--socket", tmp_path / "s", status=1)["daemon"][1]
        sock.listen()
        assert "no reply" in doctor("--socket", tmp_path / "s", status=1)["daemon"][1]


@contextmanager
def qemu(tmp_path: Path, *arguments: str) -> Iterator[int]:
    """A QEMU whose guest never runs."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    monitor = tmp_path / "monitor"
    words = [QEMU, "-accel", "tcg", "-nodefaults", "-display", "none", "-S", *arguments]
    words += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            # It listens before it has its memory, and answers after that.
            assert eventually(lambda: monitor.exists() and sock.connect_ex(str(monitor)) == 0)
            sock.settimeout(60)
            assert b"QMP" in sock.recv(4096)
            yield process.pid
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "level", "text"),
    [
        (("-object", f"{BACKEND},share=on", *USES_BACKEND), "ok", "256 MiB are shared"),
        (("-object", f"{BACKEND},share=off", *USES_BACKEND), "wrong", "its memory backend has no share=on"),
        (("-machine", "q35", "-m", "256"), "wrong", "it has no memory backend"),
        (("-machine", "q35"), "wrong", "128 MiB"),
    ],
)
def test_the_memory_of_a_front_end(tmp_path: Path, arguments: tuple[str, ...], level: str, text: str) -> None:
    with qemu(tmp_path, *arguments) as pid:
        found = doctor("--pid", str(pid), status=int(level == "wrong"))
    assert found["guest memory"][0] == level and text in found["guest memory"][1]
    assert found["device"][0] == "warning"


def test_the_device_of_a_front_end(daemon: StartDaemon, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    served = daemon(share, tag=None)
    arguments = ("-object", f"{BACKEND},share=on", *USES_BACKEND)
    arguments += ("-chardev", f"socket,id=fs,path={served.socket}")
    with qemu(tmp_path, *arguments, "-device", "vhost-user-fs-pci,chardev=fs,tag=x") as pid:
        found = doctor("--pid", str(pid), "--socket", served.socket, "--shared-dir", share)
    assert found["device"][0] == found["guest memory"][0] == found["daemon"][0] == "ok"


def test_a_process_that_is_not_there_and_the_output_for_people(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    words = [sys.executable, "-m", "vfsd", "doctor", "--pid", str(child.pid)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"wrong    front end: there is no process {child.pid}\n         name the" in done.stdout
