"""What a guest's cache may answer, some of it again and again: DIRECTORY..., each prepared by `prepare`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TIMES = 3
WRITES = 100


def prepare(directory: Path) -> None:
    """What `ask` looks at."""
    (directory / "file").write_bytes(b"content")
    (directory / "link").symlink_to("file")
    (directory / "sub").mkdir()
    for number in range(5):
        (directory / "sub" / str(number)).touch()


def ask(directory: str) -> None:
    """Each thing `TIMES` times over; then `WRITES` short appends to a new file."""
    for _ in range(TIMES):
        assert not os.path.exists(f"{directory}/absent")
    for _ in range(TIMES):
        with open(f"{directory}/file", "rb", buffering=0) as file:
            assert file.read(7) == b"content"
    for _ in range(TIMES):
        assert os.readlink(f"{directory}/link") == "file"
    for _ in range(TIMES):
        assert len(os.listdir(f"{directory}/sub")) == 5
    with open(f"{directory}/log", "ab", buffering=0) as file:
        for number in range(WRITES):
            file.write(b"%04d\n" % number)


def main() -> None:
    """Mounts are given by the caller, who counts what each was asked."""
    for directory in sys.argv[1:]:
        ask(directory)


if __name__ == "__main__":
    main()
