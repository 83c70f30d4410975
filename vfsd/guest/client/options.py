"""Mount options: what Linux knows for virtiofs (virtio_fs_parse_param), and what its VFS takes before."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from errno import EINVAL
from typing import Literal

from vfsd.fuse import abi

Dax = Literal["always", "never", "inode"]

# What mount(8) and the VFS handle; the file system never sees these. Those of statvfs(2) have its
# flag, the others mean nothing here.
GENERIC = {
    "nosuid": os.ST_NOSUID,
    "nodev": os.ST_NODEV,
    "noexec": os.ST_NOEXEC,
    "noatime": os.ST_NOATIME,
    "nodiratime": os.ST_NODIRATIME,
    "relatime": os.ST_RELATIME,
    "sync": os.ST_SYNCHRONOUS,
}
IGNORED = frozenset({
    "defaults", "suid", "dev", "exec", "atime", "diratime", "norelatime", "strictatime", "nostrictatime",
    "async", "dirsync", "lazytime", "nolazytime", "iversion", "noiversion", "silent", "loud",
})  # fmt: skip
DAX_MODES: tuple[Dax, ...] = ("always", "never", "inode")


@dataclass(frozen=True)
class MountOptions:
    """dax: None when not given, which behaves as `inode`."""

    dax: Dax | None = None
    readonly: bool = False
    flags: int = 0  # ST_* of statvfs(2), but for ST_RDONLY

    def show(self) -> str:
        """As in /proc/mounts (virtio_fs_show_options): dax is shown only if it was given."""
        return ("ro" if self.readonly else "rw") + ("" if self.dax is None else f",dax={self.dax}")


def parse_options(text: str) -> MountOptions:
    """OSError EINVAL with the name of an option that is unknown."""
    dax: Dax | None = None
    readonly = False
    flags = 0
    for option in filter(None, text.split(",")):
        name, given, value = option.partition("=")
        if name == "dax":
            dax = parse_dax(value if given else None)
        elif given:
            raise OSError(EINVAL, f"unknown mount option {name!r}")
        elif name in ("ro", "rw"):
            readonly = name == "ro"
        elif name in GENERIC:
            flags |= GENERIC[name]
        elif name not in IGNORED:
            raise OSError(EINVAL, f"unknown mount option {name!r}")
    return MountOptions(dax, readonly, flags)


def parse_dax(value: str | None) -> Dax:
    if value is None:
        return "always"
    for mode in DAX_MODES:
        if value == mode:
            return mode
    raise OSError(EINVAL, f"bad value {value!r} for mount option 'dax'")


Steps = Callable[[str], None]


def no_steps(_name: str) -> None:
    pass


@dataclass(frozen=True)
class MountSettings:
    """How to mount: what is asked of the daemon, and what a test wants."""

    options: MountOptions
    minor: int = abi.KERNEL_MINOR_VERSION
    clock: Callable[[], float] = time.monotonic
    steps: Steps = no_steps
