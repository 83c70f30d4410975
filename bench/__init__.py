"""Benchmarks of virtio-fs daemons, side by side and down to the floor; `vfsd bench` runs them."""
