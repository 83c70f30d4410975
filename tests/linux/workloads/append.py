"""Two processes append records to one file at the same time: FILE RECORDS."""

from __future__ import annotations

import json
import os
import sys

WIDTH = 100


def record(writer: int, number: int) -> bytes:
    """A line of `WIDTH` bytes."""
    return f"{writer} {number} ".encode().ljust(WIDTH - 1, b"ab"[writer : writer + 1]) + b"\n"


def problems(path: str | os.PathLike[str], records: int) -> list[str]:
    """What is wrong with a file that two writers have made; each keeps its own order."""
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    found = []
    if len(lines) != 2 * records:
        found.append(f"{len(lines)} records instead of {2 * records}")
    for writer in (0, 1):
        mine = [line for line in lines if line.startswith(b"%d " % writer)]
        if mine != [record(writer, number) for number in range(records)]:
            found.append(f"records of writer {writer} are damaged, missing or out of order")
    return found


def main() -> None:
    """Both writers start together and write one record a call."""
    path, records = sys.argv[1], int(sys.argv[2])
    ready, go = os.pipe()
    children = []
    for writer in (0, 1):
        child = os.fork()
        if child == 0:
            os.close(go)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.read(ready, 1)
            for number in range(records):
                if os.write(descriptor, record(writer, number)) != WIDTH:
                    os._exit(1)
            os.close(descriptor)
            os._exit(0)
        children.append(child)
    os.close(go)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    print(json.dumps({"statuses": statuses, "problems": problems(path, records)}))


if __name__ == "__main__":
    main()
