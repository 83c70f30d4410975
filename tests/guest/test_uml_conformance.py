"""The table of POSIX cases in user-mode Linux, against the host's own file system."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guests import StartDaemon, UmlGuest
from share import Share

pytestmark = pytest.mark.uml

SUITE = Path(__file__).resolve().parent.parent / "mount" / "workloads" / "conformance.py"
GROUPS = ("special_bits", "files")
EXCEPTIONS = {
    r"chown \d+ of \w+ by \w+ mask \d+": "with HANDLE_KILLPRIV_V2 Linux does not tell of a chown(-1, -1)",
    r"(create|mkfifo) 2777 of \w+ by member mask \d+": "Linux before 6.3 does not send the group that counts",
}


def test_cases_end_as_on_the_host(
    request: pytest.FixtureRequest, daemon: StartDaemon, tmp_path: Path
) -> None:
    if request.config.getoption("--daemon") != "vfsd":
        pytest.skip("the options are vfsd's")
    (tmp_path / "own").mkdir()
    (tmp_path / "share").mkdir(mode=0o755)
    done = subprocess.run(
        [sys.executable, SUITE, tmp_path / "own", *GROUPS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    host = json.loads(done.stdout)
    with Share(
        tmp_path / "share",
        daemon,
        lambda daemon: UmlGuest(daemon.socket, memory=256, files=SUITE.parent),
        options=["--xattr"],
    ) as share:
        _, directory = share.ready().directory("d")
        guest = share.workload(SUITE.name, directory, *GROUPS, timeout=240)
    differ = {
        name: (host[name], guest[name])
        for name in host
        if host[name] != guest[name] and not any(re.fullmatch(e, name) for e in EXCEPTIONS)
    }
    assert not differ, f"{len(differ)} of {len(host)} cases, such as {list(differ.items())[:5]}"
