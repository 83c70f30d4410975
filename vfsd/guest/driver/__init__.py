"""The device, its virtqueues and their requests: what Linux's driver does (fs/fuse/virtio_fs.c)."""
