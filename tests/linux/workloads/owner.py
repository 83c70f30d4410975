"""Make one of each kind as another user: DIRECTORY UID GID SUPPLEMENTARY-GID."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Callable


def main() -> None:
    """The directory must be writable for the user; the answer is what was refused, and how."""
    directory, uid, gid, extra = sys.argv[1], *map(int, sys.argv[2:5])
    os.chdir(directory)
    os.umask(0o027)
    os.setgroups([extra])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    with open("file", "w") as file:
        file.write("content")
    os.mkdir("directory")
    os.symlink("file", "link")
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    os.link("file", "hard")
    with open("inherited/file", "w"):
        pass
    os.mkdir("inherited/directory")
    os.chown("file", -1, extra)
    calls: dict[str, Callable[[], object]] = {
        "chown": lambda: os.chown("file", 0, 0),
        "create in root's directory": lambda: os.mkdir("private/x"),
        "read root's file": lambda: os.open("secret", os.O_RDONLY),
        "mknod": lambda: os.mknod("device", 0o020600, os.makedev(1, 3)),
        "chmod root's file": lambda: os.chmod("secret", 0o777),
    }
    refused = {}
    for name, call in calls.items():
        try:
            call()
            refused[name] = "none"
        except OSError as error:
            refused[name] = errno.errorcode[error.errno or 0]
    print(json.dumps(refused))


if __name__ == "__main__":
    main()
