"""One good request of each opcode, to be spoiled by those who need a bad one; and what a host tree is."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from fcntl import F_RDLCK
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vfsd.fuse import abi
from vfsd.fuse.abi import Fattr
from vfsd.fuse.opcodes import NUMBER

from . import wire
from .rawguest import Guest
from .wire import ROOT


@dataclass(frozen=True)
class Held:
    """What a guest has looked up and opened."""

    file: int  # nodeid of "file", with "content" in it
    dir: int  # nodeid of "dir", with "below" in it
    link: int  # nodeid of "link", to "file"
    fh: int  # of "file"
    dir_fh: int  # of "dir"


class Whole(NamedTuple):
    nodeid: int
    body: bytes
    out: int  # room of the reply


def hold(guest: Guest, share: Path, flags: int = os.O_RDWR) -> Held:
    (share / "file").write_bytes(b"content")
    os.setxattr(share / "file", "user.attr", b"value")
    (share / "dir").mkdir()
    (share / "empty").mkdir()
    (share / "dir" / "below").touch()
    (share / "link").symlink_to("file")
    file, directory, link = guest.walk("file"), guest.walk("dir"), guest.walk("link")
    return Held(file, directory, link, guest.open(file, flags), guest.opendir(directory))


def request_for(name: str, held: Held) -> Whole:
    """One that is answered without error."""
    nodeid, body, out = REQUESTS[name](held)
    return Whole(nodeid, body, wire.FIXED.get(NUMBER[name], out))


SETATTR = abi.SETATTR_IN.pack(Fattr.MODE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o600, 0, 0, 0, 0)

FS_IOC_GETFLAGS = 0x80086601  # linux/fs.h


def copy_in(fh: int) -> bytes:
    """To behind the end of the file it is from."""
    return abi.COPY_FILE_RANGE_IN.pack(fh, 0, ROOT, fh, 4096, 4, 0)


def lock_in(fh: int) -> bytes:
    """A read lock on the whole file."""
    return abi.LK_IN.pack(fh, 1, 0, 2**63 - 1, F_RDLCK, 1, 0, 0)


REQUESTS: dict[str, Callable[[Held], tuple[int, bytes, int]]] = {
    "LOOKUP": lambda h: (ROOT, b"file\0", 0),
    "FORGET": lambda h: (h.link, wire.FORGET_IN.pack(1), 0),
    "GETATTR": lambda h: (h.file, bytes(16), 0),
    "SETATTR": lambda h: (h.file, SETATTR, 0),
    "READLINK": lambda h: (h.link, b"", 4095),
    "SYMLINK": lambda h: (ROOT, b"new\0target\0", 0),
    "MKNOD": lambda h: (ROOT, abi.MKNOD_IN.pack(stat.S_IFREG | 0o600, 0, 0, 0) + b"new\0", 0),
    "MKDIR": lambda h: (ROOT, abi.MKDIR_IN.pack(0o700, 0) + b"new\0", 0),
    "UNLINK": lambda h: (h.dir, b"below\0", 0),
    "RMDIR": lambda h: (ROOT, b"empty\0", 0),
    "RENAME": lambda h: (ROOT, abi.RENAME_IN.pack(h.dir) + b"file\0new\0", 0),
    "LINK": lambda h: (ROOT, abi.LINK_IN.pack(h.file) + b"new\0", 0),
    "OPEN": lambda h: (h.file, abi.OPEN_IN.pack(os.O_RDWR, 0), 0),
    "READ": lambda h: (h.file, wire.read_in(h.fh, 0, 100), 100),
    "WRITE": lambda h: (h.file, wire.WRITE_IN.pack(h.fh, 0, 4, 0, 0, 0, 0) + b"data", 0),
    "STATFS": lambda h: (ROOT, b"", 0),
    "RELEASE": lambda h: (h.file, abi.RELEASE_IN.pack(h.fh, 0, 0, 0), 0),
    "FSYNC": lambda h: (h.file, abi.FSYNC_IN.pack(h.fh, 1, 0), 0),
    "SETXATTR": lambda h: (h.file, abi.SETXATTR_IN.pack(5, 0) + b"user.new\0value", 0),
    "GETXATTR": lambda h: (h.file, abi.GETXATTR_IN.pack(100, 0) + b"user.attr\0", 100),
    "LISTXATTR": lambda h: (h.file, abi.GETXATTR_IN.pack(100, 0), 100),
    "REMOVEXATTR": lambda h: (h.file, b"user.attr\0", 0),
    "FLUSH": lambda h: (h.file, abi.FLUSH_IN.pack(h.fh, 0, 0, 0), 0),
    "INIT": lambda h: (0, abi.INIT_IN_MIN.pack(7, 46, 0, 1 << 30) + bytes(48), 0),
    "OPENDIR": lambda h: (h.dir, abi.OPEN_IN.pack(0, 0), 0),
    "READDIR": lambda h: (h.dir, wire.read_in(h.dir_fh, 0, 4096), 4096),
    "RELEASEDIR": lambda h: (h.dir, abi.RELEASE_IN.pack(h.dir_fh, 0, 0, 0), 0),
    "FSYNCDIR": lambda h: (h.dir, abi.FSYNC_IN.pack(h.dir_fh, 0, 0), 0),
    "GETLK": lambda h: (h.file, lock_in(h.fh), 0),
    "SETLK": lambda h: (h.file, lock_in(h.fh), 0),
    "SETLKW": lambda h: (h.file, lock_in(h.fh), 0),
    "INTERRUPT": lambda h: (0, bytes(8), 0),
    "CREATE": lambda h: (ROOT, abi.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o600, 0, 0) + b"new\0", 0),
    "DESTROY": lambda h: (0, b"", 0),
    "BATCH_FORGET": lambda h: (0, wire.BATCH_FORGET_IN.pack(1, 0) + wire.FORGET_ONE.pack(h.link, 1), 0),
    "FALLOCATE": lambda h: (h.file, abi.FALLOCATE_IN.pack(h.fh, 0, 4096, 0, 0), 0),
    "READDIRPLUS": lambda h: (h.dir, wire.read_in(h.dir_fh, 0, 4096), 4096),
    "RENAME2": lambda h: (ROOT, abi.RENAME2_IN.pack(h.dir, 1, 0) + b"file\0new\0", 0),
    "LSEEK": lambda h: (h.file, abi.LSEEK_IN.pack(h.fh, 0, abi.SeekWhence.HOLE, 0), 0),
    "ACCESS": lambda h: (h.file, abi.ACCESS_IN.pack(os.R_OK, 0), 0),
    "STATX": lambda h: (h.file, abi.STATX_IN.pack(0, 0, 0, 0, 0xFFF), 0),
    "IOCTL": lambda h: (h.file, abi.IOCTL_IN.pack(h.fh, 0, FS_IOC_GETFLAGS, 0, 0, 4), 20),
    "COPY_FILE_RANGE": lambda h: (h.file, copy_in(h.fh), 0),
    "COPY_FILE_RANGE_64": lambda h: (h.file, copy_in(h.fh), 0),
    "SYNCFS": lambda h: (ROOT, abi.SYNCFS_IN.pack(0), 0),
    "TMPFILE": lambda h: (h.dir, abi.CREATE_IN.pack(os.O_RDWR | os.O_TMPFILE, 0o600, 0, 0) + b"/\0", 0),
}
assert REQUESTS.keys() == wire.SERVED.keys()

# Bodies of what takes a name (with its NUL) in the directory it is for, the two renames apart.
BY_NAME: dict[str, Callable[[Held, bytes], bytes]] = {
    "LOOKUP": lambda h, name: name,
    "SYMLINK": lambda h, name: name + b"target\0",
    "MKNOD": lambda h, name: abi.MKNOD_IN.pack(stat.S_IFREG | 0o600, 0, 0, 0) + name,
    "MKDIR": lambda h, name: abi.MKDIR_IN.pack(0o700, 0) + name,
    "UNLINK": lambda h, name: name,
    "RMDIR": lambda h, name: name,
    "LINK": lambda h, name: abi.LINK_IN.pack(h.file) + name,
    "CREATE": lambda h, name: abi.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o600, 0, 0) + name,
}

# Bodies of what needs its nodeid, from a name (with its NUL).
BY_NODEID: dict[str, Callable[[bytes], bytes]] = {
    **{op: partial(make, Held(ROOT, 0, 0, 0, 0)) for op, make in BY_NAME.items()},
    "GETATTR": lambda name: bytes(16),
    "SETATTR": lambda name: SETATTR,
    "READLINK": lambda name: b"",
    "RENAME": lambda name: abi.RENAME_IN.pack(ROOT) + name + b"new\0",
    "RENAME2": lambda name: abi.RENAME2_IN.pack(ROOT, 0, 0) + name + b"new\0",
    "OPEN": lambda name: abi.OPEN_IN.pack(0, 0),
    "OPENDIR": lambda name: abi.OPEN_IN.pack(0, 0),
    "STATFS": lambda name: b"",
    "SETXATTR": lambda name: abi.SETXATTR_IN.pack(1, 0) + b"user.x\0v",
    "GETXATTR": lambda name: abi.GETXATTR_IN.pack(0, 0) + b"user.x\0",
    "LISTXATTR": lambda name: abi.GETXATTR_IN.pack(0, 0),
    "REMOVEXATTR": lambda name: b"user.x\0",
    "ACCESS": lambda name: abi.ACCESS_IN.pack(0, 0),
    "STATX": lambda name: bytes(24),
    "SYNCFS": lambda name: bytes(8),
    "TMPFILE": lambda name: abi.CREATE_IN.pack(os.O_RDWR, 0o600, 0, 0) + name,
}

# Bodies of what needs its handle.
BY_HANDLE: dict[str, Callable[[int], bytes]] = {
    "READ": lambda fh: wire.read_in(fh, 0, 0),
    "WRITE": lambda fh: wire.WRITE_IN.pack(fh, 0, 1, 0, 0, 0, 0),
    "RELEASE": lambda fh: abi.RELEASE_IN.pack(fh, 0, 0, 0),
    "FSYNC": lambda fh: abi.FSYNC_IN.pack(fh, 0, 0),
    "FLUSH": lambda fh: abi.FLUSH_IN.pack(fh, 0, 0, 0),
    "READDIR": lambda fh: wire.read_in(fh, 0, 4096),
    "READDIRPLUS": lambda fh: wire.read_in(fh, 0, 4096),
    "RELEASEDIR": lambda fh: abi.RELEASE_IN.pack(fh, 0, 0, 0),
    "FSYNCDIR": lambda fh: abi.FSYNC_IN.pack(fh, 0, 0),
    "FALLOCATE": lambda fh: abi.FALLOCATE_IN.pack(fh, 0, 1, 0, 0),
    "LSEEK": lambda fh: abi.LSEEK_IN.pack(fh, 0, abi.SeekWhence.DATA, 0),
    "GETATTR": lambda fh: wire.GETATTR_IN.pack(1, 0, fh),
    "STATX": lambda fh: abi.STATX_IN.pack(1, 0, fh, 0, 0),
    "GETLK": lock_in,
    "SETLK": lock_in,
    "SETLKW": lock_in,
    "COPY_FILE_RANGE": copy_in,
    "COPY_FILE_RANGE_64": copy_in,
    "SETATTR": lambda fh: abi.SETATTR_IN.pack(
        Fattr.SIZE | Fattr.FH, 0, fh, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
    ),
}


def snapshot(tree: Path) -> dict[str, tuple[object, ...]]:
    """All that an operation could change below a directory, and the directory itself."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (tree, *sorted(tree.rglob("*"))):
        st = os.lstat(path)
        content: object = None
        if stat.S_ISREG(st.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(st.st_mode):
            content = os.readlink(path)
        names = os.listxattr(path, follow_symlinks=False)
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
        found[str(path.relative_to(tree))] = (
            st.st_mode, st.st_ino, st.st_nlink, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns,
            st.st_ctime_ns, content, xattrs,
        )  # fmt: skip
    return found
