"""Mounting a share: connect to a daemon, or mount a device that is there."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vfsd.fuse import abi
from vfsd.guest.client.instances import Instance, Instances, deactivate, get_tree, instance_of
from vfsd.guest.client.mountpoints import Mount
from vfsd.guest.client.options import MountSettings, Steps, no_steps, parse_options
from vfsd.guest.driver.device import Device
from vfsd.guest.face.filesystem import Filesystem


def mount(
    socket: str | os.PathLike[str], tag: str | None = None, options: str = "", *, queues: int = 1,
    queue_size: int = 1024, order: str = "qemu", minor: int = abi.KERNEL_MINOR_VERSION,
    clock: Callable[[], float] = time.monotonic, **device: Any,
) -> Filesystem:  # fmt: skip
    """Connect to a daemon, as the front end of that order, and mount what it shares.

    tag: what the device must be called, if it has a name of its own. options: as for mount(8).
    minor: of the FUSE protocol, 38, 41 or 45. clock: what cache timeouts go by. device: see
    Device.connect. The end of the `with` block unmounts and removes the device.
    """
    with ExitStack() as undo:
        parse_options(options)  # before anything is made
        made = Device.connect(socket, order=order, queues=queues, queue_size=queue_size, **device)
        undo.callback(made.remove)
        instance = Instances().add(made, tag)
        fs = mount_instance(instance, options, minor, clock)
        fs.ends_with.push(undo.pop_all())
        return fs


def mount_device(
    device: Device, options: str = "", *, minor: int = abi.KERNEL_MINOR_VERSION,
    clock: Callable[[], float] = time.monotonic, steps: Steps = no_steps,
) -> Filesystem:  # fmt: skip
    """Mount a device that stays when it is unmounted. A second mount shares the first one's superblock."""
    return mount_instance(instance_of(device), options, minor, clock, steps)


def mount_tag(
    instances: Instances, tag: str, options: str = "", *, minor: int = abi.KERNEL_MINOR_VERSION,
    clock: Callable[[], float] = time.monotonic, steps: Steps = no_steps,
) -> Filesystem:  # fmt: skip
    """mount -t virtiofs TAG, among the devices of one guest."""
    return mount_instance(instances.find(tag), options, minor, clock, steps)


def mount_instance(
    instance: Instance, text: str, minor: int, clock: Callable[[], float], steps: Steps = no_steps
) -> Filesystem:
    options = parse_options(text)
    sb = get_tree(instance, MountSettings(options, minor, clock, steps))
    try:
        steps("mount_point")
        readonly = options.readonly or sb.options.readonly
        return Filesystem(Mount(instance, sb, readonly, options.flags))
    except BaseException:
        deactivate(instance, sb)
        raise
