"""The guest's side of virtio-fs in user space: what Linux's driver and FUSE client do, over a vhost-user socket."""
