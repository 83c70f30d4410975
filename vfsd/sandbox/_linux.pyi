"""Each raises OSError that names the system call."""

from typing import Final

__all__ = (
    "CLONE_FS", "CLONE_NEWIPC", "CLONE_NEWNET", "CLONE_NEWNS", "CLONE_NEWPID", "CLONE_NEWUSER",
    "adopt_orphans", "capabilities", "clear_ambient", "clone_tree", "detach_here", "drop_bounding",
    "forbid_new_privileges", "landlock_abi", "landlock_allow", "landlock_enter", "landlock_ruleset",
    "make_undumpable", "move_mount", "new_mount", "open_ahead", "pivot_here", "receive_mounts_only",
    "restrict_mounts", "set_capabilities", "setns", "unshare",
)  # fmt: skip

CLONE_FS: Final[int]
CLONE_NEWIPC: Final[int]
CLONE_NEWNET: Final[int]
CLONE_NEWNS: Final[int]
CLONE_NEWPID: Final[int]
CLONE_NEWUSER: Final[int]

def unshare(kinds: int) -> None:
    """CLONE_NEW*, for this process, which must have one thread."""

def setns(fd: int, kind: int) -> None: ...
def adopt_orphans() -> None:
    """Whose parent has ended, of this process's descendants, becomes its child."""

def receive_mounts_only() -> None:
    """What is mounted here does not show in other mount namespaces, but theirs do here."""

def new_mount(kind: bytes, options: dict[bytes, bytes]) -> int:
    """A descriptor of a new file system that is mounted nowhere."""

def clone_tree(directory: int, path: bytes, recursive: bool) -> int:
    """A descriptor of a copy, mounted nowhere, of what is there, of its submounts too if recursive.

    path: b"" for the directory itself.
    """

def restrict_mounts(tree: int, flags: int) -> None:
    """MOUNT_ATTR_*, for a mount and those below it."""

def move_mount(tree: int, path: bytes) -> None: ...
def pivot_here() -> None:
    """The working directory, which is a mount, becomes the root; the old root is mounted on top of it."""

def detach_here() -> None:
    """Unmount what is on top of the working directory, and all below it."""

def capabilities() -> int:
    """Those permitted, a bit for each."""

def set_capabilities(permitted: int) -> None:
    """Permitted and effective; nothing is inherited."""

def drop_bounding(keep: int) -> None: ...
def clear_ambient() -> None: ...
def forbid_new_privileges() -> None: ...
def make_undumpable() -> None:
    """No core, and nobody but root attaches to this process or reads its memory."""

def open_ahead(cpus: int) -> None:
    """What glibc would open by path later: libgcc_s.so.1 for pthread_exit(3), and the list of CPUs of /sys to
    know how many arenas malloc(3) may have.
    """

def landlock_abi() -> int:
    """Of the kernel, from 1; -1 without Landlock. Raises nothing."""

def landlock_ruleset(files: int, net: int, scoped: int) -> int:
    """A descriptor of one that restricts LANDLOCK_ACCESS_FS_*, LANDLOCK_ACCESS_NET_*, LANDLOCK_SCOPE_*."""

def landlock_allow(ruleset: int, beneath: int, files: int) -> None: ...
def landlock_enter(ruleset: int) -> None:
    """Restrict this thread, and those it starts."""
