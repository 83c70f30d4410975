"""A server is killed at each message of its front end, in each order: the guest gets its share."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guests import Daemon, StartDaemon

from vfsd.guest import mount
from vfsd.vhost import messages
from vfsd.vhost.orders import ORDERS


class Sent:
    """Stands for messages.send in this process, which is the front end: has something done at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at = -1
        self.act: Callable[[], None] = lambda: None
        self.before = False
        self._send = messages.send
        monkeypatch.setattr(messages, "send", self)

    def __call__(self, *arguments: Any) -> None:
        due = self.count == self.at
        self.count += 1
        if due and self.before:
            self.act()
        self._send(*arguments)
        if due and not self.before:
            self.act()


def cycle(daemon: Daemon, order: str) -> None:
    """All that a front end says from its coming to its leaving, with a guest that works in between."""
    with mount(daemon.socket, order=order) as fs:
        fs.write_bytes("/file", b"content")
        assert fs.read_bytes("/file") == b"content"
        fs.unlink("/file")


@pytest.mark.parametrize("order", ORDERS)
def test_a_kill_at_each_message(
    order: str, daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "share").mkdir()
    server = daemon(tmp_path / "share", options=["--keeper"])
    sent = Sent(monkeypatch)
    cycle(server, order)
    n = sent.count
    assert n > 20
    kills = 0

    def kill() -> None:
        nonlocal kills
        for pid in server.servers():
            os.kill(pid, signal.SIGKILL)
            kills += 1

    sent.act = kill
    for sent.before in (False, True):
        for sent.at in range(n):
            sent.count = 0
            cycle(server, order)
    assert kills > n
