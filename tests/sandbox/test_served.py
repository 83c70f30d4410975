"""The sandbox of a daemon that runs: what its servers hold and open, and what a guest reaches."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import StartDaemon, eventually

from vfsd.sandbox import capabilities

KEPT = capabilities.bits(capabilities.kept())
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="looks at capabilities of root")


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """`share` with a directory in it, and `outside` beside it."""
    (tmp_path / "share/dir").mkdir(parents=True)
    (tmp_path / "share/dir/file").write_text("inside")
    (tmp_path / "share").chmod(0o777)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("outside")
    return tmp_path / "share"


@pytest.fixture
def guest(share: Path, daemon: StartDaemon) -> Iterator[Guest]:
    with guests_of(daemon(share)) as start:
        guest = start()
        guest.init()
        yield guest


def status_of(pid: int, thread: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def busy_guest(guest: Guest) -> None:
    """Threads have come, one of them has been another user."""
    nodeid = guest.create(ROOT, b"made", uid=1234, gid=1234)[0].nodeid
    fh = guest.open(nodeid, os.O_RDWR)
    guest.write(nodeid, fh, 0, b"x")


@needs_root
def test_every_thread_is_behind_every_wall(share: Path, daemon: StartDaemon) -> None:
    server = daemon(share)
    with guests_of(server) as start:
        guest = start(request_queues=2)
        guest.init()
        busy_guest(guest)
        for thread in os.listdir(f"/proc/{server.server}/task"):
            status = status_of(server.server, thread)
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
            for kind in ("CapPrm", "CapEff", "CapBnd"):
                assert int(status[kind], 16) & ~KEPT == 0, kind
            assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
        for kind in ("mnt", "pid", "net", "ipc"):
            assert os.readlink(f"/proc/{server.server}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        mounts = Path(f"/proc/{server.server}/mountinfo").read_text().splitlines()
        assert len(mounts) == 1 and mounts[0].split()[4] == "/", mounts
        assert {"nosuid", "nodev"} <= set(mounts[0].split()[5].split(","))
        limits = Path(f"/proc/{server.server}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.M)


@needs_root
def test_capabilities_as_the_operator_wants_them(share: Path, daemon: StartDaemon) -> None:
    server = daemon(share, options=["--modcaps=+sys_admin:-setfcap", "--nodev"])
    with guests_of(server) as start:
        guest = start()
        guest.init()
        expected = KEPT | capabilities.bits(frozenset({"sys_admin"}))
        expected &= ~capabilities.bits(frozenset({"setfcap", "mknod"}))
        assert int(status_of(server.server, str(server.server))["CapEff"], 16) == expected
        with refused(errno.EPERM):
            guest.mknod(ROOT, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        assert stat.S_ISFIFO(guest.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o666).attr.mode)


@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace (Debian package strace)")
def test_nothing_is_opened_by_path_in_the_sandbox(share: Path, daemon: StartDaemon, tmp_path: Path) -> None:
    """But what the guest asks for, by one name in a directory that is held."""
    server = daemon(share)
    trace = tmp_path / "trace"
    calls = (
        "openat,openat2,open,stat,newfstatat,statx,access,faccessat,faccessat2,readlink,readlinkat,seccomp"
    )
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", trace, "-e", f"trace={calls}", "-p", str(server.pid)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        attached = Path(f"/proc/{server.pid}/status")
        assert eventually(lambda: "TracerPid:\t0" not in attached.read_text())
        with guests_of(server) as start:
            guests = [start(request_queues=4) for _ in range(2)]
            for guest in guests:
                guest.init()
                busy_guest(guest)
                guest.unlink(ROOT, b"made")
                guest.getattr(guest.walk("dir/file"))
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()
    lines = trace.read_text().splitlines()
    inside: set[str] = set()  # threads of servers and their keepers
    for line in lines:
        thread, _, call = line.partition(" ")
        if "seccomp(" in call:
            inside.add(thread)
        if thread in inside and (path := re.search(r'"(/[^"]*)"', call)):
            assert path[1] == "/" and "RESOLVE_CACHED" in call, line  # whether the kernel has it
        assert "AT_FDCWD" not in call or thread not in inside, line
    assert len(inside) == 2 * 2, "their sandboxes were not seen"


def test_a_directory_that_the_host_swaps_leads_nowhere(guest: Guest, share: Path) -> None:
    """For a symlink to what is outside, while the guest has it and while it looks it up."""
    held = guest.walk("dir")
    file = guest.lookup(held, b"file").nodeid
    (share / "dir").rename(share / "old")
    (share / "dir").symlink_to(share.parent / "outside")
    assert guest.read(file, guest.open(file, os.O_RDONLY), 0, 100) == b"inside"
    assert stat.S_ISLNK(guest.lookup(ROOT, b"dir").attr.mode)
    with refused(errno.ENOTDIR, errno.ESTALE, errno.ENOENT):
        guest.lookup(guest.lookup(ROOT, b"dir").nodeid, b"file")
    with refused(errno.ELOOP, errno.EBADF, errno.ESTALE):
        link = guest.lookup(ROOT, b"dir").nodeid
        guest.read(link, guest.open(link, os.O_RDONLY), 0, 100)


def test_what_the_host_moves_out_of_the_share_has_no_way_up(guest: Guest, share: Path) -> None:
    held = guest.walk("dir")
    (share / "dir").rename(share.parent / "moved")
    for name in (b"..", b"../outside", b"../outside/file"):
        with refused(errno.EINVAL, errno.ENOENT, errno.ESTALE):
            guest.lookup(held, name)


@needs_root
def test_a_device_node_of_the_guest_is_no_device(guest: Guest) -> None:
    nodeid = guest.mknod(ROOT, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3)).nodeid
    with refused(errno.EBADF, errno.EACCES):
        guest.open(nodeid, os.O_RDONLY)


@needs_root
def test_a_way_out_by_the_hosts_attributes_is_refused(share: Path, daemon: StartDaemon) -> None:
    with guests_of(daemon(share, options=["--xattr"])) as start:
        guest = start()
        guest.init()
        for name in (b"trusted.overlay.opaque", b"security.any"):
            with refused(errno.EPERM, errno.EOPNOTSUPP):
                guest.setxattr(guest.walk("dir/file"), name, b"y")


INJECTED = """
import runpy, socket, sys
from vfsd.daemon import server
serve = server.serve
def served(*arguments):
    if arguments[0].backend is not None:
        socket.socket()
    return serve(*arguments)
server.serve = served
sys.argv[:] = ["vfsd", *sys.argv[3:]]
runpy.run_module("vfsd", run_name="__main__", alter_sys=False)
"""


def test_a_server_that_makes_a_refused_call_is_named_with_it(
    share: Path, daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that was put into it asks for a socket."""
    script = tmp_path / "python"
    (tmp_path / "injected.py").write_text(INJECTED)
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {tmp_path}/injected.py "$@"\n')
    script.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(script))
        server = daemon(share)
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(os.fspath(server.socket))
        front_end.sendall(struct.pack("=III", 1, 1, 0))  # GET_FEATURES
        with contextlib.suppress(ConnectionResetError):
            assert front_end.recv(1) == b""
    said = r"the server of a guest made a system call that --seccomp refuses: socket\(2\)"
    assert eventually(lambda: re.search(said, server.log) is not None), server.log
