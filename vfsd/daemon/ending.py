"""How a server ended, in words."""

import signal
import sys
from mmap import mmap

from vfsd.fuse.opcodes import NAME as OPCODE_NAME


def ending(status: int) -> str:
    """How a process ended, by its exit status, or minus the signal's number."""
    if status >= 0:
        return f"has ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def latest_request(latest: mmap) -> str:
    opcode = int.from_bytes(latest[:4], sys.byteorder)
    return OPCODE_NAME.get(opcode, "none" if opcode == 0 else f"opcode {opcode}")
