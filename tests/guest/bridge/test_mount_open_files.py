"""Files that programs have open and change, in each cache mode: what others copy, what fcntl(2) changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mounts import mounting

WORKLOADS = Path(__file__).resolve().parents[2] / "linux" / "workloads"
MIB = 1 << 20
MODES = {
    "never": ("--cache", "never"),
    "never-mmap": ("--cache", "never", "--allow-mmap"),
    "auto": ("--cache", "auto"),
    "metadata-mmap": ("--cache", "metadata", "--allow-mmap"),
    "always": ("--cache", "always"),
    "always-zero-open": ("--cache", "always", "--zero-message-open"),
    "auto-writeback": ("--cache", "auto", "--writeback"),
    "always-writeback": ("--cache", "always", "--writeback"),
}


def make_kept(path: Path) -> None:
    """64 KiB of data behind 1 MiB of hole."""
    with path.open("wb") as file:
        file.seek(MIB)
        file.write(b"k" * 65536)


@pytest.mark.parametrize("mode", MODES)
def test_copies_have_what_is_not_written_back_yet(tmp_path: Path, mode: str) -> None:
    (tmp_path / "share").mkdir()
    make_kept(tmp_path / "share" / "kept")
    with mounting(tmp_path, "vfsd", MODES[mode]) as it:
        how = [] if mode == "never" else ["mapped"]
        answers = json.loads(it.run(sys.executable, WORKLOADS / "copied.py", it.root, "programs", *how))
    assert [question for question, answer in answers.items() if not answer] == []


@pytest.mark.parametrize("mode", ["never", "auto", "always", "always-zero-open", "auto-writeback"])
@pytest.mark.parametrize("direct", [(), ("--allow-direct-io",)], ids=["", "direct"])
def test_flags_of_an_open_file_change_as_on_the_host(
    tmp_path: Path, mode: str, direct: tuple[str, ...]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    try:
        os.close(os.open(own / "f", os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the tests has no O_DIRECT")
    # Every READ comes only where nothing is cached.
    how = ["atime"] if mode == "never" else []
    program = [sys.executable, str(WORKLOADS / "setfl.py")]
    host = json.loads(subprocess.check_output([*program, str(own), *how], timeout=60))
    with mounting(tmp_path, "vfsd", (*MODES[mode], *direct, "--preserve-noatime")) as it:
        guest = json.loads(it.run(*program, it.root, *how))
    assert guest == host
