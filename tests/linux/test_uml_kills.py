"""The server of a Linux guest is killed each second while the guest works: no program in it gets an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from guests import Daemon, StartDaemon, UmlGuest
from share import WORKLOADS
from workloads import manifest

pytestmark = pytest.mark.uml

PERIOD_S = 1.0
SECONDS = int(os.environ.get("VFSD_KILLS_S", "8"))  # of fio; the other programs take what they take


class Killer(threading.Thread):
    """Kills the only guest's server each second, as long as there is one."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__()
        self.kills = 0
        self._daemon = daemon
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(PERIOD_S):
            for pid in self._daemon.servers():
                os.kill(pid, signal.SIGKILL)
                self.kills += 1

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


HOLD = """
import fcntl, os, sys, time
gone = open(sys.argv[1] + "/gone", "w+b")
os.unlink(sys.argv[1] + "/gone")
gone.write(b"still there")
gone.flush()
locked = open(sys.argv[1] + "/locked", "w+b")
fcntl.flock(locked, fcntl.LOCK_EX)
fcntl.lockf(locked, fcntl.LOCK_EX)
open(sys.argv[1] + "/held", "w").close()
while not os.path.exists(sys.argv[1] + "/over"):
    gone.seek(0)
    assert gone.read() == b"still there"
    os.pwrite(gone.fileno(), b"still", 0)
    time.sleep(0.2)
open(sys.argv[1] + "/held-to-the-end", "w").close()
"""


def until(path: str) -> str:
    """A command that waits for a file to be there."""
    return f"for i in $(seq 100); do test -e {path} && break; sleep 0.1; done; test -e {path}"


def test_programs_notice_no_kill(daemon: StartDaemon, tmp_path: Path) -> None:
    for program in ("fio", "git"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    shared = tmp_path / "shared"
    shared.mkdir()
    manifest.make_tree(shared / "tree", 100)
    (shared / "hold.py").write_text(HOLD)
    server = daemon(shared, options=["--keeper", "--flock", "--posix-lock"])
    with UmlGuest(server.socket, memory=256, files=WORKLOADS) as guest:
        guest.mount()
        where = guest.share
        guest.check(f"python3 {where}/hold.py {where} >/tmp/hold.log 2>&1 & sleep 0")
        guest.check(until(f"{where}/held"))
        with Killer(server) as killer:
            guest.check(
                f"fio --name=verify --directory={where} --size=8m --bs=4k --rw=randwrite"
                f" --verify=crc32c --time_based --runtime={SECONDS} --ioengine=psync --end_fsync=1"
                " --thread --numjobs=2 >/tmp/fio.log",
                SECONDS * 5 + 120,
            )
            database = [f"{where}/data.db", "delete", "100"]
            answer = json.loads(guest.workload("database.py", *database, timeout=240))
            guest.check(
                f"cd {where} && export HOME=/tmp && git init --quiet repository && cd repository"
                " && cp -r ../tree . && git add --all"
                " && git -c user.name=n -c user.email=e commit --quiet --message all"
                " && git gc --quiet && git fsck --full --strict",
                240,
            )
            guest.check(
                f"cd {where} && tar --format=posix -cf - tree | (mkdir copy && cd copy && tar -xf -)", 120
            )
            guest.check(
                f"cd {where} && mkdir moves && for n in $(seq 100); do"
                " echo $n >moves/a && mv moves/a moves/b && ln moves/b moves/c && rm moves/b &&"
                " mkdir moves/d && rmdir moves/d &&"
                ' test "$(cat moves/c)" = $n && rm moves/c || exit 1; done',
                240,
            )
        guest.check(f"touch {where}/over; {until(f'{where}/held-to-the-end')}")
    assert killer.kills >= SECONDS // 2
    assert (answer["integrity"], answer["lost"]) == ("ok", 0)
    assert manifest.tree(shared / "copy/tree") == manifest.tree(shared / "tree")
    assert list((shared / "moves").iterdir()) == []
