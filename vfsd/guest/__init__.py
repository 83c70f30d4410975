"""The guest's side of virtio-fs in user space: Linux's driver and FUSE client, over a vhost-user socket."""
