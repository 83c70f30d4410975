"""The shared directory: what its file system means for the share."""

import os
from pathlib import Path

from vfsd.doctor.finding import Finding, ok, warning, wrong
from vfsd.hostfs.table._tables import file_handles_work

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "vfat", "exfat"})
REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "lustre", "gfs2", "ocfs2"})


def check(path: str) -> list[Finding]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        return [wrong("shared directory", f"{path}: {problem.strerror}", "name one this user may read")]
    try:
        name, options = mounted_as(os.fstat(fd).st_dev, os.path.realpath(path))
        return [
            *kind(path, name),
            access(path, fd, options),
            handles(name, file_handles_work(fd)),
        ]
    finally:
        os.close(fd)


def mounted_as(device: int, path: str) -> tuple[str, list[str]]:
    """The file system's name and its mount's options, of the mount that has that path."""
    best = ("", "unknown", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        words = left.split()
        point = words[4].encode().decode("unicode_escape")
        if words[2] != f"{os.major(device)}:{os.minor(device)}" and not right.startswith("btrfs"):
            continue
        if os.path.commonpath([point, path]) == point and len(point) >= len(best[0]):
            best = (point, right.split()[0], words[5])
    return best[1], best[2].split(",")


def kind(path: str, name: str) -> list[Finding]:
    where = f"{path} is on {name}"
    if name in IN_MEMORY:
        return [ok("file system", f"{where}: in memory, nothing waits for a disk")]
    if name in LOCAL:
        return [ok("file system", f"{where}: any --cache mode; metadata or always if only guests change it")]
    if name in REMOTE or name.startswith("fuse"):
        return [warning(
            "file system", f"{where}: other machines may change it, unseen by this one",
            "serve with --cache never or auto; what they change is seen once this host sees it",
        )]  # fmt: skip
    return [ok("file system", f"{where}: --cache auto")]


def access(path: str, fd: int, options: list[str]) -> Finding:
    if "ro" in options or os.fstatvfs(fd).f_flag & os.ST_RDONLY:
        return warning("writing", f"{path} is mounted read-only", "serve with --readonly")
    if not os.access(path, os.W_OK):
        return warning("writing", f"this user may not write to {path}", "serve as another, or --readonly")
    return ok("writing", f"{path} can be written to")


def handles(name: str, work: bool) -> Finding:
    if work:
        return ok("file handles", "a file is found again by handle, also when it was renamed")
    why = "only root may open them" if os.geteuid() != 0 else f"{name} has none that can be opened"
    return warning(
        "file handles", f"{why}: beyond --fd-budget a file is found again by its name",
        "nothing must be done; with very many files raise the limit of open files, or serve as root",
    )  # fmt: skip
