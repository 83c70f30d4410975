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

from vfsd.doctor.confinement import confinements

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
    assert found["DAX window"][0] == "ok" and "none: " in found["DAX window"][1]
    assert "front end's security modules" in found


MAPS = """
import mmap, sys
kept = []
for path in filter(None, sys.argv[1].split(":")):
    with open(path, "r+b") as file:
        if path.endswith(".so"):
            kept.append(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE))
        else:
            kept.append(mmap.mmap(file.fileno(), 0))
            kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
print(flush=True)
sys.stdin.read()
"""
GENERIC = "vhost-user-test-device-pci,chardev=fs,virtio-id={},num_vqs=9,config_size=40"
JSON_DEVICE = '{"driver":"vhost-user-test-device-pci","virtio-id":26,"chardev":"fs"}'


@contextmanager
def called_qemu(mapped: list[Path], *arguments: str) -> Iterator[int]:
    """What QEMU 11.1 with a DAX window looks like from outside: `make test-dax` asks a real one."""
    words = ["bash", "-c", 'exec -a qemu-system-x86_64 "$@"', "bash", sys.executable, "-c", MAPS]
    words += [":".join(map(str, mapped)), *arguments]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize("device", [GENERIC.format(26), JSON_DEVICE])
@pytest.mark.parametrize(("library", "level"), [(True, "ok"), (False, "warning")])
def test_the_dax_window_of_a_front_end(tmp_path: Path, device: str, library: bool, level: str) -> None:
    """Parts of files are counted, and neither guest memory nor what is not mapped in whole ranges."""
    paths = {"share": 6 << 20, "ram": 8 << 20, "log": 4096, "qemu-shmem.so": 4096}
    for name, size in paths.items():
        (tmp_path / name).write_bytes(bytes(size))
    mapped = [tmp_path / name for name in paths if library or name != "qemu-shmem.so"]
    memory = f"memory-backend-file,id=mem,size=8M,mem-path={tmp_path}/ram,share=on"
    with called_qemu(mapped, "-m", "8M", "-object", memory, "-device", device) as pid:
        found = doctor("--pid", str(pid))
    assert found["guest memory"][0] == found["device"][0] == "ok"
    assert found["DAX window"][0] == level and "; 6 ranges of 2 MiB are mapped now" in found["DAX window"][1]


def test_a_generic_device_that_is_another() -> None:
    device = GENERIC.format(16)  # a GPU
    with called_qemu([], "-m", "0M", "-device", device) as pid:
        found = doctor("--pid", str(pid))
    assert found["device"][0] == "warning" and "DAX window" not in found


@pytest.mark.parametrize(
    ("apparmor", "current", "enforce", "expected"),
    [
        ("libvirt-1f3a (enforce)\n", "libvirt-1f3a (enforce)\n", None,
         ["AppArmor confines it by libvirt-1f3a"]),
        ("a profile//with a child (complain)\n", "", None,
         ["AppArmor would confine it by a profile//with a child"]),
        ("unconfined\n", "unconfined\n", None, []),
        ("vfsd (unconfined)\n", "vfsd (unconfined)\n", None, []),
        (None, "system_u:system_r:svirt_t:s0:c1,c2\0", "1",
         ["SELinux confines it by system_u:system_r:svirt_t:s0:c1,c2"]),
        (None, "system_u:system_r:svirt_t:s0:c1,c2\0", "0",
         ["SELinux would confine it by system_u:system_r:svirt_t:s0:c1,c2"]),
        (None, "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023\0", "1", []),
        (None, None, None, []),
    ],
)  # fmt: skip
def test_who_confines_a_process(
    tmp_path: Path, apparmor: str | None, current: str | None, enforce: str | None, expected: list[str]
) -> None:
    """From what the kernels with these modules write."""
    process, selinux = tmp_path / "process", tmp_path / "selinux"
    (process / "attr/apparmor").mkdir(parents=True)
    if enforce is not None:
        selinux.mkdir()
    files = {
        process / "attr/apparmor/current": apparmor,
        process / "attr/current": current,
        selinux / "enforce": enforce,
    }
    for path, text in files.items():
        if text is not None:
            path.write_text(text)
    assert [str(found) for found in confinements(process, selinux)] == expected


def test_a_process_that_is_not_there_and_the_output_for_people(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    words = [sys.executable, "-m", "vfsd", "doctor", "--pid", str(child.pid)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"wrong    front end: there is no process {child.pid}\n         name the" in done.stdout
