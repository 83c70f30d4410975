"""Guests of two hosts that share a replicated GlusterFS volume."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from gluster import Cluster, StartGuest
from guests import eventually
from posixcases import SUITE, assert_alike, on_host

pytestmark = pytest.mark.distributed

# Without the special bits: a mount of GlusterFS itself refuses a write to a set-id file of somebody else.
GROUPS = ("files",)
EXCEPTIONS = {
    "file holes": "a mount of GlusterFS itself finds no data right behind a write",
    "file renamed over": "how many links a replaced file has it tells late",
}
CASES_TAKE_AT_MOST_S = 600
FILES = 200
BLOCK = 64 << 10
# The file system's own caches of names and attributes, and the mode's (auto: one second).
SEEN_WITHIN_S = 5.0
LOCKS = ("--flock", "--posix-lock")


def test_posix_cases_end_as_on_the_host(
    cluster: Cluster, share: str, guest_of: StartGuest, tmp_path: Path
) -> None:
    own = cluster.hosts[0] / f"{share}-host"
    own.mkdir()
    host = on_host(own, GROUPS, CASES_TAKE_AT_MOST_S)
    with guest_of(0, "--xattr", *LOCKS) as guest:
        output = guest.workload(SUITE.name, guest.root, *GROUPS, timeout=CASES_TAKE_AT_MOST_S)
    assert_alike(host, json.loads(output), EXCEPTIONS)


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_locks_exclude_guests_of_another_host(guest_of: StartGuest, call: str) -> None:
    take = getattr(fcntl, call)
    with guest_of(0, *LOCKS) as one, guest_of(1, *LOCKS) as two:
        (one.root / "f").write_text("x")
        assert eventually((two.root / "f").exists, SEEN_WITHIN_S)
        with (one.root / "f").open("r+b") as first, (two.root / "f").open("r+b") as second:
            take(first, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError):
                take(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = threading.Event()
            waiter = threading.Thread(target=lambda: (take(second, fcntl.LOCK_EX), taken.set()))
            waiter.start()
            take(first, fcntl.LOCK_UN)
            assert taken.wait(20), "a lock that another host's guest gave up is not got"
            waiter.join()
            with pytest.raises(BlockingIOError):
                take(first, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_one_host_changes_the_other_s_guest_sees(guest_of: StartGuest) -> None:
    with guest_of(0) as one, guest_of(1) as two:
        (one.root / "f").write_text("old")
        assert eventually(lambda: (two.root / "f").exists(), SEEN_WITHIN_S)
        assert (two.root / "f").read_text() == "old"
        (one.root / "f").write_text("newer")
        assert eventually(lambda: (two.root / "f").read_text() == "newer", SEEN_WITHIN_S)
        (one.root / "f").rename(one.root / "g")
        assert eventually(lambda: os.listdir(two.root) == ["g"], SEEN_WITHIN_S)
        (one.root / "g").chmod(0o600)
        assert eventually(lambda: (two.root / "g").stat().st_mode & 0o777 == 0o600, SEEN_WITHIN_S)
        (one.root / "g").unlink()
        assert eventually(lambda: os.listdir(two.root) == [], SEEN_WITHIN_S)


def content(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (BLOCK // 32)


def test_nothing_is_lost_with_a_server_that_goes_and_comes_back(
    cluster: Cluster, share: str, guest_of: StartGuest
) -> None:
    def write(root: Path, begun: threading.Event) -> None:
        for number in range(FILES):
            with (root / f"f{number}").open("wb") as file:
                file.write(content(number))
                file.flush()
                os.fsync(file.fileno())
            if number == FILES // 4:
                begun.set()

    with guest_of(0) as one, guest_of(1) as two:
        begun = threading.Event()
        failures: list[BaseException] = []

        def writer() -> None:
            try:
                write(one.root, begun)
            except BaseException as problem:
                failures.append(problem)
                begun.set()

        thread = threading.Thread(target=writer)
        thread.start()
        assert begun.wait(120)
        cluster.kill_brick()
        thread.join(300)
        assert not thread.is_alive() and failures == []
        cluster.restore_brick()
        for number in range(FILES):
            assert (two.root / f"f{number}").read_bytes() == content(number)
            for brick in (0, 1):
                assert cluster.on_brick(brick, f"{share}/f{number}") == content(number)


def test_a_daemon_that_starts_anew_has_what_the_one_before_has_written(guest_of: StartGuest) -> None:
    with guest_of(0) as before:
        (before.root / "d").mkdir()
        with (before.root / "d" / "f").open("wb") as file:
            file.write(content(1))
            file.flush()
            os.fsync(file.fileno())
        before.daemon.kill()
    with guest_of(0) as after:
        assert (after.root / "d" / "f").read_bytes() == content(1)
