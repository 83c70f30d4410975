"""Programs that run where a file system is mounted: on this host, or in a guest, from this directory.

They use Python's standard library alone: the rest of this package is not there.
"""
