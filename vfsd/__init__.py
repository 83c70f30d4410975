"""vfsd: virtio-fs for virtual machines."""

__version__ = "0.2.0"
