"""Superblock, inodes, caches, DAX: what Linux's FUSE client does (fs/fuse)."""
