"""The guest's side of virtio-fs in user space: what Linux's driver and FUSE client do, over a socket.

    from vfsd.guest import mount

    with mount("/run/share.sock") as fs:
        fs.listdir("/")
"""

from vfsd.guest.client.instances import Instances
from vfsd.guest.driver.device import Device
from vfsd.guest.face.filesystem import Filesystem
from vfsd.guest.face.mount import mount, mount_device, mount_tag

__all__ = ["Device", "Filesystem", "Instances", "mount", "mount_device", "mount_tag"]
