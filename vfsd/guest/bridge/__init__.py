"""The share as a mount of the local kernel, through /dev/fuse."""
