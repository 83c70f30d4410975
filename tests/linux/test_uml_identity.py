"""Owners, modes, ACLs and rights of what other users do in user-mode Linux, and on the host's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from guests import StartDaemon, UmlGuest
from share import WORKLOADS, Share

pytestmark = pytest.mark.uml


def test_other_users_find_what_the_host_has(
    request: pytest.FixtureRequest, daemon: StartDaemon, tmp_path: Path
) -> None:
    if request.config.getoption("--daemon") != "vfsd":
        pytest.skip("the options are vfsd's")
    (tmp_path / "share").mkdir(mode=0o755)
    (tmp_path / "host").mkdir()
    done = subprocess.run(
        [sys.executable, WORKLOADS / "identity.py", tmp_path / "host"], capture_output=True, text=True
    )
    with Share(
        tmp_path / "share",
        daemon,
        lambda daemon: UmlGuest(daemon.socket, memory=256, files=WORKLOADS),
        options=["--posix-acl", "--security-label", "--modcaps=+sys_admin:+setfcap"],
    ) as share:
        host, guest = share.ready().directory("d")
        answer, expected = share.workload("identity.py", guest), json.loads(done.stdout)
        for name in ("team/openp", "team/tightp"):
            # Linux before 6.2 does not say that the caller is of that group: the daemon then makes no
            # set-group-id program of it (CVE-2022-0358).
            mode = answer["seen"][name][0]
            assert mode in (expected["seen"][name][0], oct(int(expected["seen"][name][0], 8) & ~0o2000))
            expected["seen"][name][0] = mode
        assert answer == expected
        # Debian's kernel has SELinux, which labels what it makes.
        for path in (path for path in host.rglob("*") if path.name.startswith(("open", "tight"))):
            assert os.getxattr(path, "security.selinux", follow_symlinks=False) == b"unlabeled\0"
