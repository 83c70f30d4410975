"""The raw guests of tests/fuse, for the tests of this room."""

from fuse.fixtures import served, share

__all__ = ["served", "share"]
