"""The raw guests of tests/fuse, for the tests of this room."""

from fuse.fixtures import guest, outside, served, share, start_guest

__all__ = ["guest", "outside", "served", "share", "start_guest"]
