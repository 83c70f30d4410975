"""Mount points: where a superblock hangs in a guest's name space (fs/namespace.c, d_automount of dir.c)."""

import threading
from contextlib import AbstractContextManager
from errno import EBUSY
from os import strerror
from typing import Protocol

from vfsd.guest.client import objects
from vfsd.guest.client.inodes import Dentry, Superblock
from vfsd.guest.client.instances import Instance, deactivate, get_tree_submount
from vfsd.guest.client.options import Steps, no_steps


class View(Protocol):
    """Memory of a file, which keeps its mount busy as an open file does."""

    def release(self) -> None: ...


class Mount:
    """One mount point (struct vfsmount), with the submounts below it. It owns one use of `sb`."""

    def __init__(
        self, instance: Instance, sb: Superblock, readonly: bool, flags: int,
        parent: "Mount | None" = None, place: Dentry | None = None,
    ) -> None:  # fmt: skip
        assert sb.root is not None
        self.instance = instance
        self.sb = sb
        self.root = sb.tree.get(sb.root)
        self.readonly = readonly
        self.flags = flags
        self.parent = parent
        self.place = place  # the dentry that is covered; referenced
        self.below: dict[Dentry, Mount] = {}
        self.lock: AbstractContextManager[bool] = threading.RLock() if parent is None else parent.lock
        self.busy: int = 0  # open files and views
        self.views: set[View] = set()
        self.automount_steps: Steps = parent.automount_steps if parent is not None else no_steps
        objects.born("mount points")

    def covered(self, dentry: Dentry) -> "Mount | None":
        """What is mounted there."""
        return self.below.get(dentry)

    def automount(self, dentry: Dentry) -> "Mount":
        """Mount what the daemon announced there (fuse_dentry_automount)."""
        with self.lock:
            known = self.below.get(dentry)
            if known is not None:
                return known
            assert dentry.inode is not None
            sb = get_tree_submount(self.sb, dentry.inode, self.automount_steps)
            mount = Mount(self.instance, sb, self.readonly, self.flags, self, self.sb.tree.get(dentry))
            self.below[dentry] = mount
            return mount

    def walk(self) -> "list[Mount]":
        """This and all submounts, the deepest last."""
        with self.lock:
            found = [self]
            for mount in self.below.values():
                found += mount.walk()
            return found

    def umount(self, recursive: bool) -> None:
        """OSError EBUSY while a file below is open, or something is mounted below and not recursive."""
        with self.lock:
            mounts = self.walk()
            if any(mount.busy for mount in mounts) or (self.below and not recursive):
                raise OSError(EBUSY, strerror(EBUSY))
            for mount in reversed(mounts):
                mount._detach()

    def _detach(self) -> None:
        self.sb.tree.put(self.root)
        if self.parent is not None and self.place is not None:
            del self.parent.below[self.place]
        objects.gone("mount points")
        deactivate(self.instance, self.sb)
        if self.parent is not None and self.place is not None:
            self.parent.sb.tree.put(self.place)
