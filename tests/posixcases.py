"""The table of POSIX cases (mount/workloads/conformance.py): what differs between a guest and the host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUITE = Path(__file__).resolve().parent / "guest" / "bridge" / "workloads" / "conformance.py"
QUICK_GROUPS = ("special_bits", "files")

# Cases whose outcome differs in every guest, and why it has to. Each is the pattern of their names.
EXCEPTIONS = {
    r"chown \d+ of \w+ by \w+ mask \d+|local (times|privileges) chown nobody": (
        "with HANDLE_KILLPRIV_V2 a chown(-1, -1) is sent as nothing (fuse_setattr), whoever asks"
    ),
    "local fallocate mode 0x(8|20)": "no such kinds in FUSE (fuse_file_fallocate)",
}


def on_host(directory: Path, groups: Sequence[str], timeout: float) -> dict[str, Any]:
    """What came of each case in an empty directory of the host."""
    done = subprocess.run(
        [sys.executable, SUITE, directory, *groups], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def assert_alike(host: Mapping[str, Any], guest: Mapping[str, Any], exceptions: Mapping[str, str]) -> None:
    """Every case came out the same on both, but for these exceptions and those of every guest."""
    assert host["file append"][0] == "[b'content123']"
    assert host.keys() == guest.keys()
    explained = re.compile("|".join([*EXCEPTIONS, *exceptions]))
    differ = {
        name: (host[name], guest[name])
        for name in host
        if host[name] != guest[name] and not explained.fullmatch(name)
    }
    assert not differ, f"{len(differ)} of {len(host)} cases, such as {list(differ.items())[:5]}"
