"""The other end of the control socket, for `vfsd ctl` and for programs."""

import json
import os
import socket
from collections.abc import Mapping
from typing import Any, Final

from vfsd.control import rpc

REPLY_S: Final = 30.0
REPLY_MAX: Final = 16 << 20  # bytes


def call(path: str | os.PathLike[str], method: str, params: Mapping[str, Any]) -> Any:
    """The result. RpcError: what the daemon says; OSError: it does not answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(REPLY_S)
        sock.connect(os.fspath(path))
        sock.sendall(rpc.encode({"id": 1, "method": method, "params": params}))
        with sock.makefile("rb") as replies:
            line = replies.readline(REPLY_MAX)
    if not line.endswith(b"\n"):
        raise ConnectionError("the daemon closed the control socket; see its log")
    reply = json.loads(line)
    if "error" in reply:
        raise rpc.RpcError(reply["error"]["code"], reply["error"]["message"])
    return reply["result"]
