"""A daemon's socket: who may connect to it, and whether it answers as a virtio-fs device."""

import os
import stat
from errno import ECONNREFUSED

from vfsd.doctor.finding import Finding, ok, wrong
from vfsd.guest.driver.device import Device

ANSWER_S = 3.0


def check(path: str) -> list[Finding]:
    try:
        st = os.stat(path)
    except OSError as problem:
        return [wrong("socket", f"{path}: {problem.strerror}", "start the daemon, or name its --socket")]
    if not stat.S_ISSOCK(st.st_mode):
        return [wrong("socket", f"{path} is no socket", "name what the daemon was given as --socket")]
    owner = f"{stat.filemode(st.st_mode)} {st.st_uid}:{st.st_gid}"
    if not os.access(path, os.W_OK):
        return [wrong(
            "socket", f"this user may not connect to {path} ({owner})",
            "use --socket-group with a group of the front end's user",
        )]  # fmt: skip
    return [ok("socket", f"{path}: {owner}"), answer(path)]


def answer(path: str) -> Finding:
    """As a front end of its own, for a moment."""
    try:
        device = Device.connect(path, order="qemu-generic", timeout_s=ANSWER_S)
    except OSError as problem:
        if problem.errno == ECONNREFUSED:
            return wrong("daemon", f"nobody listens on {path}", "start the daemon")
        return wrong(
            "daemon", str(problem.strerror),
            "see what the daemon says; one that serves a single guest is busy while that is there",
        )  # fmt: skip
    try:
        size = 0 if device.window is None else device.window.size
        window = f"a DAX window of {size >> 20} MiB" if size else "no DAX window"
        queues = device.frontend.queues_max - 1
        return ok("daemon", f"answers: tag {device.tag or '(left to the front end)'}, up to {queues} request"
                  f" queues, {window}")  # fmt: skip
    finally:
        device.remove()
