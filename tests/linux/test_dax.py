"""A Linux guest with a DAX window, in QEMU 11.1: `make test-dax` runs this.

The share is mounted with dax=always through a window of 64 MiB. Programs come from a second share, a
Debian root, that is mounted in the same way: they run out of its own window.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checks
import pytest
from guests import Daemon, DaxGuest, GuestError, StartDaemon, StockDaxGuest
from guests.dax import ROOT
from share import WORKLOADS, Share
from test_uml_programs import git, needs
from workloads import manifest, pages

pytestmark = pytest.mark.dax

WINDOW_MIB = 64
PROGRAMS_MIB = 64  # git and its libraries alone are more: their ranges change hands all the time
QUEUES = ("--num-request-queues", "2")
LARGE_MIB = int(os.environ.get("VFSD_DAX_LARGE_MIB", "4096"))
PROGRAMS = "/mnt/root"


@pytest.fixture(scope="module")
def dax_module(
    module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Share]:
    host = tmp_path_factory.mktemp("shared")
    window = f"--dax-window={PROGRAMS_MIB}M"
    programs = module_daemon(ROOT, tag="root", options=(*QUEUES, window))
    with Share(
        host,
        module_daemon,
        lambda daemon: DaxGuest([daemon.socket, programs.socket], files=WORKLOADS),
        options=(*QUEUES, f"--dax-window={WINDOW_MIB}M"),
    ) as share:
        yield share


@pytest.fixture
def dax_share(dax_module: Share) -> Share:
    share = dax_module.ready()
    share.guest.check(
        f"grep -q ' {PROGRAMS} ' /proc/mounts || {{ mkdir -p {PROGRAMS} && "
        f"mount -t virtiofs -o dax=always root {PROGRAMS} && "
        f"mount -t tmpfs tmpfs {PROGRAMS}/tmp && mount -o bind /dev {PROGRAMS}/dev && "
        f"mkdir {PROGRAMS}/tmp/share && mount -o bind {share.guest.share} {PROGRAMS}/tmp/share; }}"
    )
    return share


def inside(share: Share, command: str, timeout: float = 180) -> str:
    """Output of a command with the programs of Debian; the share is /tmp/share."""
    quoted = command.replace("'", "'\\''")
    return share.guest.check(f"chroot {PROGRAMS} /bin/sh -c '{quoted}'", timeout)


def test_the_window_is_there_and_used(dax_share: Share) -> None:
    log = dax_share.guest.check("dmesg | grep 'Cache len'")
    sizes = re.findall(r"Cache len: (0x[0-9a-f]+) @", log)
    assert [int(size, 16) for size in sizes] == [WINDOW_MIB << 20, PROGRAMS_MIB << 20]
    assert "dax=always" in dax_share.guest.check(f"grep ' {dax_share.guest.share} ' /proc/mounts")


def test_files_are_read_and_written(dax_share: Share) -> None:
    checks.large_file_goes_both_ways(dax_share, 32)
    checks.random_writes_are_read_back(dax_share, 500)
    checks.appends_keep_every_record(dax_share, 200)
    checks.open_files_lose_their_names(dax_share)


def test_files_are_mapped_shared_and_private_and_truncated_meanwhile(dax_share: Share) -> None:
    host = checks.all_true(dax_share, "mapped.py")
    data = (host / "shared").read_bytes()
    assert data[5 * 4096 :][:6] == b"mapped" and data[599 * 4096 :][:4] == b"last"
    assert b"mine" not in (host / "private").read_bytes()


def test_a_program_runs_from_the_share(dax_share: Share) -> None:
    host, guest = dax_share.directory("run")
    shutil.copy("/bin/busybox", host / "busybox")
    assert dax_share.guest.check(f"{guest}/busybox echo from here") == "from here\n"
    assert inside(dax_share, "sqlite3 :memory: 'select 6 * 7'") == "42\n"


def test_what_is_mapped_stays_so_while_the_file_is_opened_again(dax_share: Share) -> None:
    """Linux drops what is mapped, in use or not, where it takes it for a cache that may be stale."""
    host, guest = dax_share.directory("reopened")
    (host / "file").write_bytes(bytes(5000))
    shutil.copy("/bin/busybox", host / "busybox")
    assert dax_share.workload("reopened.py", f"{guest}/file", "20") == []
    dax_share.guest.check(
        f"{guest}/busybox sleep 600 & for i in 1 2 3; do "
        f"cat {guest}/busybox >/dev/null && {guest}/busybox true || exit 1; done; kill $!"
    )
    assert "cut here" not in dax_share.guest.check("dmesg")


def test_a_file_much_larger_than_the_window(dax_share: Share) -> None:
    host, guest = dax_share.directory("beyond")
    with (host / "file").open("wb") as file:
        checksum = pages.write(file, LARGE_MIB)
    answer = dax_share.workload("pages.py", f"{guest}/file", str(LARGE_MIB), "change", timeout=1800)
    assert answer == {"checksum": checksum, "wrong": []}
    with (host / "file").open("rb") as file:
        for page in pages.probes(LARGE_MIB):
            file.seek(page * pages.PAGE)
            assert file.read(16) == struct.pack("<QQ", page + 1, page)
    (host / "file").unlink()


@pytest.fixture(scope="module")
def repository(dax_module: Share) -> Path:
    needs("git")
    origin = dax_module.host / "origin"
    origin.mkdir()
    git("init", "--quiet", "--initial-branch=main", directory=origin)
    for commit in range(3):
        manifest.make_tree(origin / f"tree{commit}", 60)
        git("add", "--all", directory=origin)
        git("commit", "--quiet", "--message", f"commit {commit}", directory=origin)
    return origin


def clone(share: Share, target: str) -> str:
    """What is checked out there then, of the repository on the share."""
    return inside(
        share,
        "export HOME=/tmp && git config --global safe.directory '*' && "
        f"git clone --quiet --no-hardlinks /tmp/share/origin {target} && cd {target} && "
        "git fsck --full --strict --no-progress && git rev-parse HEAD",
        600,
    )


def test_git_clones_what_is_on_the_share(dax_share: Share, repository: Path) -> None:
    assert clone(dax_share, "/tmp/clone") == git("rev-parse", "main", directory=repository)


def test_git_clones_onto_the_share(dax_share: Share, repository: Path) -> None:
    assert clone(dax_share, "/tmp/share/clone") == git("rev-parse", "main", directory=repository)
    assert git("fsck", "--full", "--strict", directory=dax_share.host / "clone") == ""


def test_sqlite_with_a_write_ahead_log(dax_share: Share) -> None:
    host, guest = dax_share.directory("wal")
    answer = dax_share.workload("wal.py", f"{guest}/data.db", "300", timeout=300)
    assert answer == {"mode": "wal", "statuses": [0, 0], "index": True, "rows": 600, "integrity": "ok"}
    database = sqlite3.connect(host / "data.db")
    try:
        assert database.execute("SELECT count(*) FROM t").fetchone() == (600,)
    finally:
        database.close()


def test_two_guests_see_what_the_other_stores(dax_share: Share) -> None:
    host, guest = dax_share.directory("together")
    (host / "file").write_bytes(bytes(8192))
    rounds, seen = "50", []
    with DaxGuest([dax_share.daemon.socket], files=WORKLOADS) as second:
        second.mount()

        def run(who: Any, me: str) -> None:
            seen.append(int(who.workload("together.py", f"{guest}/file", me, rounds, timeout=200)))

        other = threading.Thread(target=run, args=(second, "1"))
        other.start()
        run(dax_share.guest, "0")
        other.join()
    assert max(seen) == 100 and min(seen) >= 99
    assert struct.unpack_from("<Q", (host / "file").read_bytes(), 4096) == (100,)


def test_nothing_stays_mapped_after_an_unmount(dax_share: Share) -> None:
    daemon = dax_share.daemon

    def maps() -> list[str]:
        names = daemon.descriptors()  # a queue's own memory is told as if it lay there
        return [name for name in names if name.startswith(str(dax_share.host)) and "/memfd:" not in name]

    host, guest = dax_share.directory("again")
    (host / "file").write_bytes(b"x" * (8 << 20))
    for _ in range(3):
        dax_share.guest.check(f"cmp {guest}/file {guest}/file && umount {PROGRAMS}/tmp/share && "
                              f"umount {dax_share.guest.share}")  # fmt: skip
        dax_share.guest.mount()
        dax_share.guest.check(f"mount -o bind {dax_share.guest.share} {PROGRAMS}/tmp/share")
    assert set(maps()) <= {str(dax_share.host)}


def test_a_qemu_with_the_library_maps_every_file_that_is_left_to_the_daemon(dax_share: Share) -> None:
    host, guest = dax_share.directory("left")
    (host / "small").write_bytes(b"content")
    unmount = f"umount {PROGRAMS}/tmp/share && umount {dax_share.guest.share}"
    dax_share.guest.check(unmount)
    dax_share.guest.mount("dax=inode")
    try:
        assert dax_share.workload("isdax.py", f"{guest}/small") == [True]
        assert dax_share.guest.check(f"cat {guest}/small") == "content"
    finally:
        dax_share.guest.check(f"umount {dax_share.guest.share}")
        dax_share.guest.mount()
        dax_share.guest.check(f"mount -o bind {dax_share.guest.share} {PROGRAMS}/tmp/share")
    assert "the front end maps" not in dax_share.daemon.log


# ---- QEMU as it is, and files that the daemons choose

SIZED = "/mnt/sized"


@pytest.fixture(scope="module")
def sized(module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    host = tmp_path_factory.mktemp("chosen")
    options = (*QUEUES, f"--dax-window={WINDOW_MIB}M", "--dax-policy=size:4M")
    return module_daemon(host, tag="sized", options=options)


@pytest.fixture(scope="module")
def stock_module(module_daemon: StartDaemon, sized: Daemon) -> Iterator[Share]:
    """One directory twice: for the files that this QEMU can map, and for those of 4 MiB and more."""
    with Share(
        sized.shared,
        module_daemon,
        lambda daemon: StockDaxGuest([daemon.socket, sized.socket], files=WORKLOADS),
        options=(*QUEUES, f"--dax-window={WINDOW_MIB}M"),
    ) as share:
        yield share


@pytest.fixture
def stock_share(stock_module: Share) -> Share:
    return stock_module.ready()


@pytest.mark.parametrize("options", ["dax=inode", "dax=never", ""])
def test_the_daemon_says_which_files_are_mapped(stock_share: Share, options: str) -> None:
    sizes = (5000, 2 << 20, (2 << 20) + 1, 6 << 20)
    host, guest = stock_share.directory(f"chosen{options}")
    for size in sizes:
        (host / str(size)).write_bytes(bytes(size))

    def are_mapped(directory: str) -> list[bool]:
        paths = [f"{directory}/{size}" for size in sizes]
        return list(stock_share.workload("isdax.py", *paths))

    flag = f"-o {options}" if options else ""
    stock_share.guest.check(f"mkdir -p {SIZED}; mount -t virtiofs {flag} sized {SIZED}")
    assert are_mapped(f"{SIZED}/{host.name}") == [False, False, False, options != "dax=never"]
    stock_share.guest.check(f"umount {SIZED}")
    assert are_mapped(guest) == [False, True, False, True]


def test_a_qemu_without_the_library_maps_what_fills_its_ranges(stock_share: Share) -> None:
    host, guest = stock_share.directory("whole")
    (host / "whole").write_bytes(data := os.urandom(4 << 20))
    (host / "rest").write_bytes(data[:5000])
    shutil.copy("/bin/busybox", host / "busybox")
    for name in ("whole", "rest"):
        stock_share.guest.check(f"cp {guest}/{name} /tmp/{name} && cmp {guest}/{name} /tmp/{name}")
        stock_share.guest.check(f"dd if=/dev/zero of={guest}/{name} bs=1000 count=1 conv=notrunc")
        assert (host / name).read_bytes() == bytes(1000) + data[1000 : (host / name).stat().st_size]
    assert stock_share.guest.check(f"{guest}/busybox echo from here") == "from here\n"
    checks.random_writes_are_read_back(stock_share, 200)


@pytest.mark.parametrize(
    ("kind", "level", "text"),
    [("dax_share", "ok", "every file can be"), ("stock_share", "warning", "only files of whole 2 MiB")],
)
def test_the_doctor_knows_what_qemu_can_map(
    kind: str, level: str, text: str, request: pytest.FixtureRequest
) -> None:
    share: Share = request.getfixturevalue(kind)
    host, guest = share.directory("examined")
    (host / "file").write_bytes(bytes(4 << 20))
    share.guest.check(f"cat {guest}/file >/dev/null")
    words = [sys.executable, "-m", "vfsd", "doctor", "--json", "--pid", str(share.guest.pid)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["guest memory"]["level"] == found["device"]["level"] == "ok"
    window = found["DAX window"]
    assert window["level"] == level and text in window["text"]
    mapped = re.search(r"(\d+) ranges of 2 MiB are mapped", window["text"])
    assert mapped and int(mapped[1]) >= 2


def test_a_guest_that_maps_all_files_is_told_what_to_do(stock_share: Share, sized: Daemon) -> None:
    host, _ = stock_share.directory("told")
    (host / "small").write_bytes(b"content")
    start = len(sized.log)
    check = stock_share.guest.check
    check(f"mkdir -p {SIZED}; mount -t virtiofs -o dax=always sized {SIZED}")
    try:
        assert stock_share.guest.run(f"cat {SIZED}/{host.name}/small >/dev/null 2>&1").status != 0
    finally:
        check(f"umount {SIZED}")
    (line,) = [line for line in sized.log[start:].splitlines() if "the others are EIO" in line]
    assert "mount with -o dax=inode" in line


def test_the_end_of_a_file_that_has_grown_comes_with_its_next_open(stock_share: Share) -> None:
    """Of one that was mapped when it filled its ranges, as long as somebody has it open."""
    host, guest = stock_share.directory("grown")
    (host / "file").write_bytes(bytes(2 << 20))
    status = stock_share.guest.check(
        f"exec 3<{guest}/file; cat <&3 >/dev/null; echo more >>{guest}/file; stat {guest}/file >/dev/null;"
        f"cat <&3 2>/dev/null; echo $?; exec 3<&-; cat {guest}/file >/dev/null 2>&1; tail -c 5 {guest}/file"
    )
    assert status.splitlines() == ["1", "more"]


def test_a_file_that_the_host_cuts_off_ends_the_machine_alone(stock_share: Share) -> None:
    host, guest = stock_share.directory("cut")
    (host / "file").write_bytes(bytes(4 << 20))
    stock_share.guest.check(
        f"printf 'import mmap, time\\nfile = open(\"{guest}/file\", \"rb\")\\n"
        "memory = mmap.mmap(file.fileno(), 4 << 20, prot=mmap.PROT_READ)\\n"
        "while True:\\n print(memory[3 << 20], flush=True)\\n time.sleep(0.05)\\n' >/tmp/touch.py; "
        f"{stock_share.guest.python} -S /tmp/touch.py >/tmp/touched & "
        "until grep -q 0 /tmp/touched; do sleep 0.1; done"
    )
    os.truncate(host / "file", 0)
    with pytest.raises(GuestError, match="went away"):
        stock_share.guest.run("sleep 60", 70)
    assert stock_share.daemon.running()
    again = stock_share.ready().guest
    assert again.check(f"stat -c %s {guest}/file") == "0\n"
