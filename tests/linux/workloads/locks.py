"""Locks that the host holds, waited for, then held against it; and a deadlock: DIRECTORY."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

CALLS = ("flock", "lockf")


def refused(call: str, file: IO[Any]) -> bool:
    try:
        getattr(fcntl, call)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def wait_for_host(directory: Path, call: str) -> bool:
    """Whether it was refused at first. `waits` is made before the wait, `has` once there is the lock."""
    with (directory / call).open("r+b") as file:
        was_refused = refused(call, file)
        (directory / f"{call}.waits").touch()
        getattr(fcntl, call)(file, fcntl.LOCK_EX)
        (directory / f"{call}.has").touch()
        while not (directory / f"{call}.seen").exists():
            os.sched_yield()
    return was_refused


def second(file: IO[Any], byte: int) -> int:
    """Wait for another lock: the errno, 0 for none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
    except OSError as problem:
        return problem.errno or 0
    return 0


def deadlock(path: Path) -> list[str]:
    """What two get, each of which wants what the other has: one is refused."""
    told, tell = os.pipe()
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
        child = os.fork()
        if child == 0:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
            os.write(tell, b"!")
            os._exit(second(file, 0))
        os.read(told, 1)
        mine = second(file, 1)
        # Either the child has been refused and is gone, or it gets what is given up now.
        fcntl.lockf(file, fcntl.LOCK_UN)
        theirs = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return sorted({0: "", errno.EDEADLK: "EDEADLK"}.get(number, str(number)) for number in (mine, theirs))


def main() -> None:
    directory = Path(sys.argv[1])
    answers: dict[str, object] = {call: wait_for_host(directory, call) for call in CALLS}
    (directory / "ring").touch()
    answers["deadlock"] = deadlock(directory / "ring")
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
