"""A tree with one of everything, and a description of a tree that two copies can be compared by."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

HOLE = 64 << 20
BLOCK = 512
ACL = "system.posix_acl_access"


def make(top: Path) -> None:
    (top / "a" / "b").mkdir(parents=True)
    (top / "self").symlink_to("self")
    (top / "a" / "up").symlink_to("../a")
    (top / "dangling").symlink_to("nowhere")
    os.lchown(top / "dangling", 1234, 5678)
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as sock:
        before = os.getcwd()
        os.chdir(top)  # a socket's path is at most 107 bytes long
        sock.bind("sock")
        os.chdir(before)
    with open(top / "hole", "wb") as file:
        file.write(b"begin")
        file.truncate(HOLE)
        file.seek(HOLE // 2)
        file.write(b"middle")
    (top / "first").write_text("one file")
    os.link(top / "first", top / "a" / "second")
    os.link(top / "dangling", top / "a" / "link to nowhere")
    (top / "key").write_text("secret")
    (top / "key").chmod(0o600)
    (top / "tool").write_text("#!/bin/sh")
    os.chown(top / "tool", 1000, 1001)
    (top / "tool").chmod(0o6755)
    (top / "old").write_text("old")
    os.utime(top / "old", ns=(-5 * 10**17 + 1, -3 * 10**17 + 7))
    (top / "labelled").write_text("x")
    os.setxattr(top / "labelled", "user.colour", b"red\0green")
    os.setxattr(top / "a", "user.colour", b"blue")
    subprocess.run(["setfacl", "-m", "u:1000:r,g:1001:-", top / "labelled"], check=True)
    os.mkdir(os.fsencode(top) + b"/bad\xff name")
    for name in ("new\nline", "-rf", " ", "\x1b[31mred", "back\\slash"):
        (top / name).write_text(name)
    (top / "a" / "b").chmod(0o1770)
    (top / "a").chmod(0o2750)
    for number, path in enumerate((top / "a" / "b", top / "a", top)):
        os.utime(path, ns=(10**18 + number, 10**18 + 111 * number))


def describe(top: Path | str, xattrs: bool = True) -> dict[str, tuple[object, ...]]:
    """By path below top: all that a copy keeps."""
    found: dict[str, tuple[object, ...]] = {}
    names: dict[tuple[int, int], str] = {}
    for above, directories, others in sorted(os.walk(top)):
        for name in [".", *sorted(directories), *sorted(others)]:
            path = os.path.join(above, name)
            st = os.lstat(path)
            kind = stat.S_IFMT(st.st_mode)
            what: tuple[object, ...] = (oct(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns)
            if kind in (stat.S_IFCHR, stat.S_IFBLK):
                what += (st.st_rdev,)
            elif kind == stat.S_IFLNK:
                what += (os.readlink(path),)
            elif kind == stat.S_IFREG:
                what += (st.st_size, st.st_blocks * BLOCK < st.st_size, Path(path).read_bytes().rstrip(b"\0"))
            if kind != stat.S_IFDIR:
                what += (names.setdefault((st.st_dev, st.st_ino), os.path.relpath(path, top)),)
            if xattrs and kind != stat.S_IFLNK:
                what += tuple((key, os.getxattr(path, key)) for key in sorted(os.listxattr(path)))
            found[os.path.relpath(path, top)] = what
    return found
