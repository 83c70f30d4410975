"""Symbolic links, hard links, fifos and sockets: DIRECTORY."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys

LONG_TARGET = "t/" * 2047


def links(directory: str) -> dict[str, bool]:
    with open(f"{directory}/file", "w") as file:
        file.write("content")
    os.symlink("file", f"{directory}/relative")
    os.symlink("nowhere", f"{directory}/dangling")
    os.symlink(LONG_TARGET, f"{directory}/long")
    os.link(f"{directory}/file", f"{directory}/second")
    os.link(f"{directory}/dangling", f"{directory}/dangling too", follow_symlinks=False)
    first, second = os.stat(f"{directory}/file"), os.stat(f"{directory}/second")
    with open(f"{directory}/second", "a") as file:
        file.write(" and more")
    with open(f"{directory}/relative") as file:
        through = file.read()
    os.unlink(f"{directory}/file")
    left = os.stat(f"{directory}/second")
    return {
        "a link leads to its file": through == "content and more",
        "a dangling link is there": os.readlink(f"{directory}/dangling") == "nowhere"
        and not os.path.exists(f"{directory}/dangling"),
        "a long target": os.readlink(f"{directory}/long") == LONG_TARGET,
        "a hard link is the same file": first.st_ino == second.st_ino and first.st_nlink == 2,
        "a hard link of a link": os.readlink(f"{directory}/dangling too") == "nowhere",
        "one link is left": left.st_nlink == 1 and left.st_ino == first.st_ino,
    }


def fifo(directory: str) -> dict[str, bool]:
    path = f"{directory}/fifo"
    os.mkfifo(path, 0o620)
    child = os.fork()
    if child == 0:
        with open(path, "wb") as file:
            file.write(b"through the fifo")
        os._exit(0)
    with open(path, "rb") as file:
        data = file.read()
    _, status = os.waitpid(child, 0)
    return {
        "a fifo carries data": data == b"through the fifo" and status == 0,
        "a fifo has its mode": os.stat(path).st_mode == stat.S_IFIFO | (0o620 & ~0o022),
    }


def unix_socket(directory: str) -> dict[str, bool]:
    # The address is bound by a relative name: it may be 107 bytes long at most.
    os.chdir(directory)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")
        return {"a socket can be bound and connected": stat.S_ISSOCK(os.stat("socket").st_mode)}


def refused(call: str, *arguments: str) -> str:
    """Name of the error of a call that must not succeed."""
    try:
        getattr(os, call)(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "none"


def errors(directory: str) -> dict[str, bool]:
    os.symlink("loop", f"{directory}/loop")
    os.makedirs(f"{directory}/full/inner")
    with open(f"{directory}/plain", "w"):
        pass
    return {
        "ENOENT": refused("stat", f"{directory}/none") == "ENOENT",
        "EEXIST": refused("mkdir", f"{directory}/full") == "EEXIST",
        "ENOTEMPTY": refused("rmdir", f"{directory}/full") == "ENOTEMPTY",
        "ENOTDIR": refused("rmdir", f"{directory}/plain") == "ENOTDIR",
        "EISDIR": refused("unlink", f"{directory}/full") == "EISDIR",
        "EISDIR for rename": refused("rename", f"{directory}/plain", f"{directory}/full")
        == "EISDIR",
        "EINVAL for a directory into itself": refused(
            "rename", f"{directory}/full", f"{directory}/full/inner/x"
        )
        == "EINVAL",
        "EEXIST for link": refused("link", f"{directory}/plain", f"{directory}/full") == "EEXIST",
        "ELOOP": refused("stat", f"{directory}/loop") == "ELOOP",
    }


def main() -> None:
    """Every question with its answer."""
    directory = sys.argv[1]
    os.umask(0o022)
    steps = (links, fifo, unix_socket, errors)
    print(json.dumps({name: value for step in steps for name, value in step(directory).items()}))


if __name__ == "__main__":
    main()
