"""What the guest holds: inodes, handles, descriptors."""
