"""vfsd ctl and its socket, beside guests that are served and clients that mean harm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, eventually

from vfsd.control import rpc
from vfsd.control.client import call
from vfsd.control.methods import METHODS
from vfsd.control.rpc import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    LINE_MAX,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    RpcError,
)
from vfsd.control.server import CLIENTS_MAX, UNREAD_MAX


class Controlled(NamedTuple):
    daemon: Daemon
    control: Path

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(str(self.control))
        return sock

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vfsd", "ctl", "--socket", str(self.control), *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Controlled]:
    (tmp_path / "share").mkdir()
    control = tmp_path / "control"
    with Daemon(tmp_path / "share", options=["--control-socket", str(control)]) as daemon:
        yield Controlled(daemon, control)
    assert not control.exists()


def said(sock: socket.socket, line: bytes) -> Any:
    sock.sendall(line + b"\n")
    with sock.makefile("rb") as replies:
        return json.loads(replies.readline())


def test_the_status_tells_of_shares_and_guests(served: Controlled) -> None:
    status = json.loads(served.ctl("status").stdout)
    assert status["guests"] == []
    with Guest(served.daemon.socket) as one, Guest(served.daemon.socket) as other:
        one.init()
        other.init()
        for _ in range(10):
            one.getattr(ROOT)
        status = json.loads(served.ctl("status").stdout)
        first, second = sorted(status["guests"], key=lambda guest: -guest["requests"])
        assert {first["server"], second["server"]} == set(served.daemon.children())
        assert (first["requests"], second["requests"]) == (11, 1)
        assert first["fuse"].startswith("7.") and first["errors"] == 0
    assert status["shares"] == [
        {"shared_dir": str(served.daemon.shared), "socket": str(served.daemon.socket), "guests": 2}
    ]
    assert status["pid"] == served.daemon.pid


def test_a_guest_that_is_stopped_leaves_the_other(served: Controlled) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(Guest(served.daemon.socket)).init()
        (pid,) = served.daemon.children()
        other = stack.enter_context(Guest(served.daemon.socket))
        other.init()
        assert served.ctl("stop", "--guest", str(pid)).stdout == "true\n"
        assert eventually(lambda: pid not in served.daemon.children())
        other.getattr(ROOT)
        again = served.ctl("stop", "--guest", str(pid))
        assert again.returncode == 1
        assert again.stderr == f"vfsd: no guest has the server {pid}; ask for the status\n"


def test_the_daemon_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    daemon = Daemon(tmp_path / "share", options=["--control-socket", str(tmp_path / "control")])
    assert call(tmp_path / "control", "stop", {}) is True
    assert eventually(lambda: not daemon.running(), 20)
    daemon.kill()
    asked = Controlled(daemon, tmp_path / "control").ctl("status")
    assert asked.returncode == 1
    assert asked.stderr.startswith(f"vfsd: {tmp_path}/control: No such file or directory; name the ")


def test_running_servers_follow_the_log_level(served: Controlled) -> None:
    with Guest(served.daemon.socket) as guest:
        guest.init()
        served.ctl("log-level", "--level", "debug")
        status = json.loads(served.ctl("status").stdout)  # the server has heard of both
        assert status["guests"][0]["requests"] == 1
        assert "agreed:" not in served.daemon.log
        guest.init()
        assert eventually(lambda: "agreed:" in served.daemon.log)
    refused = served.ctl("log-level", "--level", "loud")
    assert refused.returncode == 2 and "loud" in refused.stderr


def test_what_can_be_asked_is_told(served: Controlled) -> None:
    told = call(served.control, "methods", {})
    assert told.keys() == METHODS.keys()
    assert told["stop"]["params"]["guest"]["type"] == "integer"


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (b"status", PARSE_ERROR, "no JSON"),
        (b"\xff\xfe", PARSE_ERROR, "no JSON"),
        (b"[" * 60000, PARSE_ERROR, "no JSON"),
        (b"[]", INVALID_REQUEST, "an object"),
        (b'{"method": "status", "id": 1}', INVALID_REQUEST, "jsonrpc"),
        (b'{"jsonrpc": "2.0", "method": 5, "id": 1}', INVALID_REQUEST, "method"),
        (b'{"jsonrpc": "2.0", "method": "status", "id": [1]}', INVALID_REQUEST, "id"),
        (b'{"jsonrpc": "2.0", "method": "quota", "id": 1}', METHOD_NOT_FOUND, "there are status, stop"),
        (b'{"jsonrpc": "2.0", "method": "stop", "params": [1], "id": 1}', INVALID_PARAMS, "names"),
        (b'{"jsonrpc": "2.0", "method": "stop", "params": {"guest": ""}, "id": 1}', INVALID_PARAMS, "number"),
        (b'{"jsonrpc": "2.0", "method": "stop", "params": {"gust": 1}, "id": 1}', INVALID_PARAMS, "gust"),
        (b'{"jsonrpc": "2.0", "method": "log-level", "id": 1}', INVALID_PARAMS, "needs level"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_and_the_connection_goes_on(
    served: Controlled, line: bytes, code: int, says: str
) -> None:
    with served.connect() as sock:
        error = said(sock, line)["error"]
        assert error["code"] == code and says in error["message"]
        assert said(sock, b'{"jsonrpc": "2.0", "method": "status", "id": "x"}')["id"] == "x"


def test_a_notification_has_no_answer(served: Controlled) -> None:
    with served.connect() as sock:
        sock.sendall(b'{"jsonrpc": "2.0", "method": "quota"}\n{"jsonrpc": "2.0", "method": "status"}\n')
        assert said(sock, b'{"jsonrpc": "2.0", "method": "status", "id": 7}')["id"] == 7


def test_a_request_without_end_is_cut_off(served: Controlled) -> None:
    with served.connect() as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100 << 20 >> 16):
                sock.sendall(b"[" * LINE_MAX)
        answer = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while chunk := sock.recv(4096):
                answer += chunk
    assert not answer or "at most" in json.loads(answer)["error"]["message"]
    assert call(served.control, "status", {})["pid"] == served.daemon.pid


def test_requests_are_answered_one_after_the_other(served: Controlled) -> None:
    """The first has to wait for a server that stands still; those behind it are not begun meanwhile."""
    with Guest(served.daemon.socket) as guest, served.connect() as sock:
        guest.init()
        (pid,) = served.daemon.servers()
        os.kill(pid, signal.SIGSTOP)
        try:
            ids = list(range(200))
            sock.sendall(b"".join(rpc.encode({"id": n, "method": "status", "params": {}}) for n in ids[:2]))
            sock.sendall(b"".join(rpc.encode({"id": n, "method": "methods", "params": {}}) for n in ids[2:]))
            with sock.makefile("rb") as replies:
                first = json.loads(replies.readline())
                assert (first["id"], first["result"]["guests"][0]["requests"]) == (0, None)
                os.kill(pid, signal.SIGCONT)
                second = json.loads(replies.readline())
                assert (second["id"], second["result"]["guests"][0]["requests"]) == (1, 1)
                assert [json.loads(replies.readline())["id"] for _ in ids[2:]] == ids[2:]
        finally:
            os.kill(pid, signal.SIGCONT)
        guest.getattr(ROOT)


def test_who_floods_the_socket_holds_no_guest(served: Controlled) -> None:
    """More connections than there may be, none of which reads what it is answered."""
    request = b'{"jsonrpc": "2.0", "method": "methods", "id": 1}\n'
    with contextlib.ExitStack() as stack, Guest(served.daemon.socket) as guest:
        guest.init()
        asked = 0
        flooding = [stack.enter_context(served.connect()) for _ in range(CLIENTS_MAX + 10)]
        for sock in flooding:
            sock.setblocking(False)
        while asked < 3 * UNREAD_MAX // len(request):
            for sock in flooding:
                with contextlib.suppress(OSError):
                    asked += sock.send(request) // len(request)
            asked += 1
        guest.getattr(ROOT)
        with Guest(served.daemon.socket) as fresh:
            fresh.init()
            fresh.statfs()
        assert call(served.control, "status", {})["pid"] == served.daemon.pid


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_may_not(served: Controlled) -> None:
    os.chmod(served.control, 0o777)
    asking = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.connect(f'/proc/self/fd/{sys.argv[1]}')\n"  # the directory may be root's alone
        "print(sock.recv(100))\n"
    )
    opened = os.open(served.control, os.O_PATH)
    try:
        done = subprocess.run(
            [sys.executable, "-c", asking, str(opened)], pass_fds=[opened],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    finally:
        os.close(opened)
    assert done.stdout == "b''\n", done.stderr
    assert eventually(lambda: "the user 65534 may not use the control socket" in served.daemon.log)


def test_the_client_raises_what_the_daemon_says(served: Controlled) -> None:
    with pytest.raises(RpcError, match="no method 'quota'"):
        call(served.control, "quota", {})
