"""Looks again and again at files that the host changes: `watch.py DIRECTORY SECONDS`.

Looks once at everything, so that it may be cached, then makes `ready`. As soon as a change shows, makes
`seen-` and its name: attribute (a file's size), content (of a file opened anew), created (a name that
was not there), removed (a name that was). Ends when all have been seen, or after so many seconds.
"""

import os
import sys
import time

PAUSE_S = 0.001


def attribute() -> bool:
    return os.stat("attribute").st_size == 2


def content() -> bool:
    fd = os.open("content", os.O_RDONLY)
    try:
        return os.read(fd, 16) == b"new"
    finally:
        os.close(fd)


def created() -> bool:
    return os.path.exists("created")


def removed() -> bool:
    return not os.path.exists("removed")


CHANGES = (attribute, content, created, removed)


def main(directory: str, seconds: float) -> None:
    os.chdir(directory)
    waiting = [change for change in CHANGES if not change()]
    open("ready", "x").close()
    ends = time.monotonic() + seconds
    while waiting and time.monotonic() < ends:
        for change in waiting[:]:
            if change():
                open("seen-" + change.__name__, "x").close()
                waiting.remove(change)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
