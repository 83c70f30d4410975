"""What programs use: Filesystem, files, fsspec."""
