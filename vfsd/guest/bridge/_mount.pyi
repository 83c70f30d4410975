def mount(source: bytes, target: bytes, fstype: bytes, flags: int, data: bytes) -> None:
    """mount(2). This and the others: OSError without a file name."""

def umount2(target: bytes, flags: int) -> None:
    """umount2(2)"""

def syncfs(fd: int) -> None:
    """syncfs(2)"""

def mount_id(path: bytes) -> int:
    """The number of the mount that is on top there (statx(2)); asks no file system."""

def open_control() -> int:
    """A descriptor of the root of a fusectl file system that is mounted nowhere (fsmount(2))."""
