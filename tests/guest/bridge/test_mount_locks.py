"""Locks of programs on two mounts of one share, and on the host."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from mounts import MountCommand, Mounted, mounting, readable

# Take a lock that may wait, say so, hold it until stdin ends: FILE
HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "r+b")
print("open", flush=True)
fcntl.{call}(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
"""
# Add one to a number, a number of times, each in a transaction: FILE TIMES
COUNT = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for _ in range(int(sys.argv[2])):
    db.execute("begin immediate")
    (n,) = db.execute("select n from t").fetchone()
    db.execute("update t set n = ?", (n + 1,))
    db.execute("commit")
"""
WAIT_S = 20


class Places(NamedTuple):
    """The same directory on the host and through two mounts."""

    host: Path
    one: Path
    two: Path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    base = tmp_path_factory.mktemp("locks")
    (base / "two").mkdir()
    with ExitStack() as stack:
        # Nothing cached: who has the lock must see what the one before has done.
        serve = ("--cache", "never", "-o", "flock,posix_lock")
        first: Mounted = stack.enter_context(mounting(base, "vfsd", serve))
        second = MountCommand(first.daemon.socket, base / "two")
        stack.callback(second.kill)
        yield Places(first.share, first.root, base / "two")
        assert second.end() == 0, second.log


class Holder:
    """A process that takes a lock."""

    def __init__(self, path: Path, call: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD.format(call=call), str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        assert self.line() == "open\n"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def waits(self, seconds: float) -> bool:
        """Whether it has no lock for so long."""
        assert self.process.stdout is not None
        return not readable(self.process.stdout.fileno(), seconds)

    def end(self) -> None:
        self.process.communicate("end\n", timeout=WAIT_S)


@pytest.mark.parametrize("call", ["flock", "lockf"])
@pytest.mark.parametrize(
    ("holder", "waiter"), [("one", "two"), ("one", "host"), ("host", "two"), ("one", "one")]
)
def test_who_waits_gets_the_lock_next(places: Places, call: str, holder: str, waiter: str) -> None:
    name = f"{call}-{holder}-{waiter}"
    (places.host / name).write_bytes(b"content")
    first = Holder(getattr(places, holder) / name, call)
    assert first.line() == "held\n"
    second = Holder(getattr(places, waiter) / name, call)
    assert second.waits(0.1)
    assert (places.two / name).read_bytes() == b"content", "others are served"
    first.end()
    assert second.line() == "held\n"
    second.end()


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_a_signal_ends_a_wait(places: Places, call: str) -> None:
    (places.host / "signalled").touch()
    holder = Holder(places.one / "signalled", call)
    assert holder.line() == "held\n"
    waiters = [Holder(places.two / "signalled", call) for _ in range(3)]
    assert all(waiter.waits(0.05) for waiter in waiters)
    for waiter, number in zip(waiters, (signal.SIGKILL, signal.SIGTERM), strict=False):
        waiter.process.send_signal(number)
        assert waiter.process.wait(WAIT_S) == -number
        waiter.process.communicate()
    assert waiters[2].waits(0.05)
    holder.end()
    assert waiters[2].line() == "held\n"
    waiters[2].end()


def test_what_a_killed_program_held_is_free(places: Places) -> None:
    (places.host / "killed").touch()
    holders = [Holder(places.one / "killed", call) for call in ("flock", "lockf")]
    assert [holder.line() for holder in holders] == ["held\n"] * 2
    waiters = [Holder(places.two / "killed", call) for call in ("flock", "lockf")]
    assert all(waiter.waits(0.05) for waiter in waiters)
    for holder in holders:
        holder.process.kill()
        holder.process.communicate(timeout=WAIT_S)
    assert [waiter.line() for waiter in waiters] == ["held\n"] * 2
    for waiter in waiters:
        waiter.end()


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock(1)")
def test_flock_program_with_a_timeout(places: Places) -> None:
    (places.host / "timeout").touch()
    holder = Holder(places.one / "timeout", "flock")
    assert holder.line() == "held\n"
    refused = subprocess.run(["flock", "-n", places.two / "timeout", "true"], timeout=WAIT_S, check=False)
    assert refused.returncode == 1
    holder.end()
    subprocess.run(["flock", "-n", places.two / "timeout", "true"], timeout=WAIT_S, check=True)


def test_sqlite_counts_right_from_two_mounts_and_the_host(places: Places) -> None:
    sqlite3 = pytest.importorskip("sqlite3", reason="Python has no sqlite3")
    with sqlite3.connect(places.host / "db") as db:
        db.execute("create table t (n integer)")
        db.execute("insert into t values (0)")
    db.close()
    counters = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT, str(place / "db"), "25"], stderr=subprocess.PIPE, text=True
        )
        for place in places
    ]
    for counter in counters:
        _, stderr = counter.communicate(timeout=90)
        assert counter.returncode == 0, stderr
    with sqlite3.connect(places.two / "db") as db:
        assert db.execute("select n from t").fetchone() == (75,)
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    db.close()
