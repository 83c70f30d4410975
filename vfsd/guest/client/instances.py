"""Devices by tag, and how superblocks are mounted and unmounted (fs/fuse/virtio_fs.c, inode.c).

A step of mounting that fails undoes all before it. The steps have names, so that a test can make
each one fail: `steps` is called with the name before the step is taken.
"""

import logging
import stat
import threading
import weakref
from contextlib import ExitStack
from errno import EEXIST, EINVAL, EIO

from vfsd.fuse import abi
from vfsd.guest.client import objects
from vfsd.guest.client.connection import HEADER_OVERHEAD, Connection, FuseMount
from vfsd.guest.client.dax import Dax
from vfsd.guest.client.inodes import Inode, Superblock
from vfsd.guest.client.options import MountSettings, Steps, no_steps
from vfsd.guest.client.replies import NEVER, Attr
from vfsd.guest.driver.device import Device

log = logging.getLogger("vfsd.guest")

STEPS = ("queue_size", "alloc_conn", "alloc_mount", "sget", "removed", "alloc_devs", "dax",
         "fill_super", "root_inode", "root_dentry", "start_queues", "send_init")  # fmt: skip
SUBMOUNT_STEPS = ("alloc_mount", "sget", "root_inode", "root_dentry")


class Instance:
    """A device that can be mounted by its tag (struct virtio_fs)."""

    def __init__(self, device: Device, tag: str) -> None:
        self.device = device
        self.tag = tag
        self.sb: Superblock | None = None
        self.mutex = threading.RLock()  # one mount or unmount at a time


_instances: weakref.WeakValueDictionary[int, Instance] = weakref.WeakValueDictionary()
_instances_lock = threading.Lock()


def instance_of(device: Device) -> Instance:
    """The one for that device, as long as anybody uses it."""
    with _instances_lock:
        instance = _instances.get(id(device))
        if instance is None:
            instance = _instances[id(device)] = Instance(device, device.tag)
        return instance


class Instances:
    """The devices of one guest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_device: dict[Device, Instance] = {}

    def add(self, device: Device, tag: str | None = None) -> Instance:
        """virtio_fs_add_instance. A device without a tag of its own can be given one, as front ends do.

        OSError EEXIST: another device has that tag.
        """
        name = device.tag if tag is None else tag
        if device.tag and name != device.tag:
            raise OSError(EINVAL, f"tag {name!r} not found, the device's is {device.tag!r}")
        with self._lock:
            known = self._by_device.get(device)
            if known is not None:
                return known
            if name and any(other.tag == name for other in self._by_device.values()):
                raise OSError(EEXIST, f"another device has the tag {name!r}")
            instance = self._by_device[device] = instance_of(device)
            instance.tag = name
            return instance

    def find(self, tag: str) -> Instance:
        """virtio_fs_find_instance"""
        with self._lock:
            for instance in self._by_device.values():
                if tag and instance.tag == tag:
                    return instance
        raise OSError(EINVAL, f"tag {tag!r} not found")

    def remove(self, device: Device) -> None:
        with self._lock:
            self._by_device.pop(device, None)


def get_tree(instance: Instance, settings: MountSettings) -> Superblock:
    """virtio_fs_get_tree: a new superblock, or another reference to the one the device has."""
    steps = settings.steps
    with instance.mutex, ExitStack() as undo:
        steps("queue_size")
        if instance.device.queue_size <= HEADER_OVERHEAD:
            raise OSError(EIO, f"a queue of {instance.device.queue_size} holds no request")
        steps("alloc_conn")
        inode_dax = settings.options.dax in (None, "inode")
        conn = Connection(instance.device, minor=settings.minor, inode_dax=inode_dax, clock=settings.clock)
        undo.callback(conn.destroy)
        steps("alloc_mount")
        fm = FuseMount(conn)
        undo.callback(fm.destroy)
        steps("sget")
        if instance.sb is not None:
            instance.sb.active += 1
            return instance.sb  # the new connection is not needed
        sb = Superblock(fm, settings)
        undo.pop_all()
        undo.callback(kill_sb, sb)
        fill_super(instance, sb, settings)
        instance.sb = sb
        undo.pop_all()
        return sb


def fill_super(instance: Instance, sb: Superblock, settings: MountSettings) -> None:
    """virtio_fs_fill_super. Returns before INIT is answered."""
    steps, device = settings.steps, instance.device
    steps("removed")
    if device.gone is not None:
        raise OSError(EINVAL, f"the device is gone: {device.gone}")
    steps("alloc_devs")  # one for each queue: the transport has them
    steps("dax")
    mode, window = settings.options.dax, device.window
    if mode == "always" and window is None:
        raise OSError(EINVAL, "dax can't be enabled as filesystem device does not support it")
    if mode != "never" and window is not None:
        sb.conn.use_dax(Dax(sb.conn, window, mode))
    steps("fill_super")
    attr = Attr(abi.ROOT_ID, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR, 2, 0, 0, 0, 0, 0)
    sb.set_root(attr, abi.ROOT_ID, steps).nlookup = 1
    steps("start_queues")
    device.transport.connect()
    device.transport.restart_unique()
    steps("send_init")
    sb.conn.send_init()


def get_tree_submount(parent: Superblock, place: Inode, steps: Steps = no_steps) -> Superblock:
    """fuse_get_tree_submount: what is mounted on an automount inode. Always a new superblock."""
    lookup = place.submount_lookup
    assert lookup is not None
    with ExitStack() as undo:
        steps("alloc_mount")
        fm = FuseMount(parent.conn)
        undo.callback(fm.destroy)
        steps("sget")
        sb = Superblock(fm, parent.settings, parent)
        undo.pop_all()
        undo.callback(kill_sb, sb)
        root = sb.set_root(place.attr, place.nodeid, steps)
        root.deadline = NEVER
        root.submount_lookup = lookup
        lookup.count += 1
        undo.pop_all()
        return sb


def kill_sb(sb: Superblock) -> None:
    """virtio_kill_sb"""
    conn = sb.conn
    last = sb.parent is None
    if sb.root is not None:
        sb.mounts.remove(sb.mount)
        last = not sb.mounts
        if last:
            conn_destroy(conn)
        held = sb.tree.evict_all(sb.root)
        if held:
            log.error("busy names after unmount of %s", conn.device.name)
        sb.root = None
    sb.tree.active = False
    objects.gone("superblocks")
    sb.mount.destroy()
    if last:
        conn.destroy()


def conn_destroy(conn: Connection) -> None:
    """virtio_fs_conn_destroy: forgets are not sent any more, DESTROY stands for all of them."""
    transport = conn.device.transport
    if conn.dax is not None:
        conn.dax.close()
    if conn.init_sent:
        conn.initialized.wait()  # drained like any request
    transport.disconnect(0)
    transport.drain()
    conn.send_destroy()
    conn.abort()
    transport.disconnect()
    transport.drain()


def deactivate(instance: Instance, sb: Superblock) -> None:
    """deactivate_super: one mount point less; the last one ends the superblock."""
    with instance.mutex:
        sb.active -= 1
        if sb.active == 0:
            if instance.sb is sb:
                instance.sb = None
            kill_sb(sb)
