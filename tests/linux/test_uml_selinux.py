"""Security labels where SELinux rules the host: vfsd serves in user-mode Linux, whose kernel has SELinux."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import pytest
from guests import UmlGuest

pytestmark = pytest.mark.uml

REPOSITORY = Path(__file__).resolve().parents[2]
INSIDE = "/mnt/files"  # where a guest has `files`
OPERATIONS = ("CREATE", "MKDIR", "MKNOD", "SYMLINK")


def inside(path: Path) -> Path:
    """The same in the guest: /tmp is its own there."""
    return INSIDE / path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def test_selinux_labels_what_is_made() -> None:
    path = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tools", Path(sysconfig.get_path("purelib"))]
    words = [
        "PYTHONPATH=" + ":".join(str(inside(directory)) for directory in path),
        str(Path(sys.executable).resolve()),
        "-m hostfs.selinux",
    ]
    with UmlGuest(None, memory=256, files=REPOSITORY) as guest:
        found = json.loads(guest.check(" ".join(words)))
    kinds = {"one_t": "one_t", "two_t": "two_t", "later": "host_t"}
    assert found["labels"] == {
        f"{op} {name}": f"u:object_r:{kind}\0" for op in OPERATIONS for name, kind in kinds.items()
    }
    assert found["nameless"] == ["u:object_r:one_t\0", "u:object_r:two_t\0"]
    assert found["changed"] == []
