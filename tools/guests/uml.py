"""User-mode Linux as a guest: a Linux kernel as an ordinary process, without a virtual machine.

Its root is the host's own root directory, mounted read-only, so every program of the host is there.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from guests.guest import HERE, Guest, GuestError

BINARY = "linux.uml"
VARIABLE = "VFSD_UML"  # its command, if it is another one than in PATH; `bench/get-peers` prints it
VIRTIO_ID_FS = 26


def uml_command() -> list[str]:
    """What runs user-mode Linux; the last word is the program. Empty if there is none."""
    given = shlex.split(os.environ.get(VARIABLE, ""))
    found = shutil.which(given[-1] if given else BINARY)
    return [*given[:-1], found] if found else []


def modules() -> Path:
    """Where its modules are, a directory for each release: beside the program, as in its package."""
    return Path(uml_command()[-1]).resolve().parent.parent / "lib/uml/modules"


@functools.cache
def boots(command: tuple[str, ...]) -> bool:
    """Whether user-mode Linux runs on this machine: tried, for a second, once for each uml_command().

    Up to Linux 6.12 it has no room for the registers of a CPU with AMX (fatal_sigsegv in put_fp_registers).
    """
    try:
        with UmlGuest(None, memory=64):
            return True
    except GuestError:
        return False


class UmlGuest(Guest):
    """User-mode Linux with a virtio-fs device; the tag comes from the daemon."""

    kind = "user-mode Linux"
    boot_seconds = 60
    more_sockets: Sequence[Path] = ()
    """Of daemons for further devices; their tags come from them too."""

    @staticmethod
    def missing() -> str | None:
        """Why user-mode Linux cannot be booted here, or None."""
        if not uml_command():
            given = os.environ.get(VARIABLE)
            if given:
                return f"{VARIABLE}={given!r} names no program; set it as bench/get-peers prints it"
            return f"{BINARY} is not installed (Debian package user-mode-linux)"
        if not Path("/bin/busybox").exists():
            return "/bin/busybox is not installed (Debian package busybox-static)"
        command = tuple(uml_command())
        if not boots(command):
            return f"{command[-1]} does not boot on this machine; tools/ensure_uml.py gets a newer one"
        return None

    def _arguments(self, channel: int, work: Path) -> list[str]:
        if not uml_command():
            raise GuestError(self.missing())
        init = HERE / "init.sh"
        sockets = [path for path in (self.socket_path, *self.more_sockets) if path is not None]
        device = [f"{path}:{VIRTIO_ID_FS}" for path in sockets]
        for path in (str(init), str(self.host_files or ""), str(modules()), *device):
            if any(character.isspace() for character in path):
                raise GuestError(f"a kernel command line cannot hold this path: {path!r}")
        return [
            *uml_command(),
            f"mem={self.memory}M",
            # `ro` is what keeps the guest's root user from writing to this machine's files.
            *("root=/dev/root", "rootfstype=hostfs", "hostfs=/", "ro"),
            f"init={init}",
            "seccomp=auto",  # how system calls are caught: from 6.16 on twice as fast as by ptrace
            *(f"virtio_uml.device={text}" for text in device),
            *("quiet", "panic=-1", f"uml_dir={work}/"),
            *("con=null", "con0=null,fd:1", "con1=null"),
            *("ssl=null", f"ssl0=fd:{channel}"),
            "GUEST_KIND=uml",
            f"GUEST_NONCE={self._nonce}",
            f"GUEST_FILES={self.host_files or ''}",
            f"GUEST_MODULES={modules()}",
            "GUEST_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
