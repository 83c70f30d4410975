"""--daemonize."""

import os
from collections.abc import Callable
from typing import NoReturn


def go_to_background() -> Callable[[], None]:
    """Go on in a new session; the process that was started ends when the function is called, with status
    0, or with this one and its status."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        wait_for(child, reader)
    os.close(reader)
    os.setsid()

    def listening() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)
        os.close(null)
        os.write(writer, b"1")
        os.close(writer)

    return listening


def wait_for(child: int, reader: int) -> NoReturn:
    if os.read(reader, 1):
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
