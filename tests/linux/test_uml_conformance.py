"""The table of POSIX cases in user-mode Linux, against the host's own file system."""

from __future__ import annotations

from pathlib import Path

import pytest
from guests import StartDaemon, UmlGuest
from posixcases import QUICK_GROUPS, SUITE, assert_alike, on_host
from share import Share

pytestmark = pytest.mark.uml

EXCEPTIONS = {
    r"(create|mkfifo) 2777 of \w+ by member mask \d+": "Linux before 6.3 does not send the group that counts",
}


def test_cases_end_as_on_the_host(
    request: pytest.FixtureRequest, daemon: StartDaemon, tmp_path: Path
) -> None:
    if request.config.getoption("--daemon") != "vfsd":
        pytest.skip("the options are vfsd's")
    (tmp_path / "own").mkdir()
    (tmp_path / "share").mkdir(mode=0o755)
    host = on_host(tmp_path / "own", QUICK_GROUPS, timeout=120)
    with Share(
        tmp_path / "share",
        daemon,
        lambda daemon: UmlGuest(daemon.socket, memory=256, files=SUITE.parent),
        options=["--xattr"],
    ) as share:
        _, directory = share.ready().directory("d")
        guest = share.workload(SUITE.name, directory, *QUICK_GROUPS, timeout=240)
    assert_alike(host, guest, EXCEPTIONS)
