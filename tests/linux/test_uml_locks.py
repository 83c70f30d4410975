"""Locks of a real Linux guest against the host's: refused, waited for, held, in a deadlock."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest
from guests import StartDaemon, UmlGuest, eventually
from share import WORKLOADS, Share

pytestmark = pytest.mark.uml

CALLS = {"flock": fcntl.flock, "lockf": fcntl.lockf}
WAIT_S = 60


def refused(path: Path, call: str) -> bool:
    """Whether the guest has it, by a new open file of the host."""
    with path.open("r+b") as file:
        try:
            CALLS[call](file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_guest_waits_for_the_host_and_the_host_for_the_guest(
    request: pytest.FixtureRequest, daemon: StartDaemon, tmp_path: Path
) -> None:
    if request.config.getoption("--daemon") != "vfsd":
        pytest.skip("QEMU's daemon lets nobody wait for a lock")
    (tmp_path / "share").mkdir()
    with Share(
        tmp_path / "share",
        daemon,
        lambda daemon: UmlGuest(daemon.socket, memory=256, files=WORKLOADS),
        cache="never",
        options=["-o", "flock,posix_lock"],
    ) as share:
        host, guest = share.ready().directory("locks")
        held = {call: (host / call).open("w+b") for call in CALLS}
        for call, lock in CALLS.items():
            lock(held[call], fcntl.LOCK_EX)
        answers: list[Any] = []
        worker = threading.Thread(
            target=lambda: answers.append(share.workload("locks.py", guest)), daemon=True
        )
        worker.start()
        for call, file in held.items():
            assert eventually((host / f"{call}.waits").exists, WAIT_S)
            assert not (host / f"{call}.has").exists()
            file.close()
            assert eventually((host / f"{call}.has").exists, WAIT_S)
            assert refused(host / call, call)
            (host / f"{call}.seen").touch()
        worker.join(WAIT_S)
        assert answers == [{"flock": True, "lockf": True, "deadlock": ["", "EDEADLK"]}]
        with (host / "flock").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert share.guest.run(f"flock -n {guest}/flock true").status != 0
        share.guest.check(f"flock -n {guest}/flock true")
