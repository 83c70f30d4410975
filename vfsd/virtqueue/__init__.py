"""The virtqueue's layout and its driver side; the device side is vfsd._ring."""
