"""A GlusterFS volume of two replicas, mounted twice: once for each host that would have it.

For a process that has a network, a mount and a PID namespace of its own (`make test-distributed`): what is
started here ends with the last, and what glusterd writes to its usual directories is gone with the second.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from xml.etree import ElementTree

from guests import eventually
from mounts import Mounted

# A daemon on one of the two hosts, and the kernel's FUSE client on it: (host, *the daemon's options).
StartGuest = Callable[..., AbstractContextManager[Mounted]]

ADDRESS = "127.0.1.1"  # glusterd takes no localhost for a server's name
OWN_DIRECTORIES = ("/var/lib/glusterd", "/var/log/glusterfs", "/run/gluster")
VOLUME = "share"
OWN_NAMESPACES = "VFSD_OWN_NAMESPACES"  # set by who made them
PROGRAMS = ("glusterd", "gluster", "glusterfs", "ip", "mount")


def missing() -> str | None:
    """Why there can be none."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return f"there is no {program} (Debian's glusterfs-server)"
    if os.environ.get(OWN_NAMESPACES) != "1":
        return "make test-distributed runs it"
    return None


def run(*command: str, timeout: float = 60) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Cluster:
    """A started volume. hosts: two mounts of it."""

    def __init__(self, directory: Path) -> None:
        self.hosts = (directory / "one", directory / "two")
        self._bricks = (directory / "brick-one", directory / "brick-two")
        run("ip", "link", "set", "lo", "up")
        for path in OWN_DIRECTORIES:
            os.makedirs(path, exist_ok=True)
            run("mount", "-t", "tmpfs", "tmpfs", path)
        for brick in (*self._bricks, *self.hosts):
            brick.mkdir()
        self._daemon = subprocess.Popen(["glusterd", "-N"], stdin=subprocess.DEVNULL)
        assert eventually(self._answers, 60), "glusterd does not answer"
        bricks = [f"{ADDRESS}:{brick}" for brick in self._bricks]
        # Quorum of two replicas would have the volume read-only whenever one is away.
        self._gluster("volume", "create", VOLUME, "replica", "2", *bricks, "force")
        for option, value in (("cluster.quorum-type", "none"), ("network.ping-timeout", "5")):
            self._gluster("volume", "set", VOLUME, option, value)
        self._gluster("volume", "start", VOLUME)
        for host in self.hosts:
            run("glusterfs", f"--volfile-server={ADDRESS}", f"--volfile-id=/{VOLUME}", str(host))
            assert eventually(lambda host=host: os.path.ismount(host), 60)
        (self.hosts[0] / "made").touch()
        assert eventually(lambda: (self.hosts[1] / "made").exists(), 60)

    def _answers(self) -> bool:
        command = ("gluster", "--mode=script", "volume", "list")
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0

    def _gluster(self, *words: str) -> str:
        return run("gluster", "--mode=script", *words)

    def _processes(self) -> dict[str, int]:
        """Of the bricks that run, by directory."""
        status = ElementTree.fromstring(self._gluster("volume", "status", VOLUME, "--xml"))
        found = {}
        for node in status.iter("node"):
            path, online, pid = (node.findtext(name, "") for name in ("path", "status", "pid"))
            if online == "1":
                found[path] = int(pid)
        return found

    def kill_brick(self) -> None:
        """One of the two servers is gone."""
        brick = str(self._bricks[0])
        os.kill(self._processes()[brick], signal.SIGKILL)
        assert eventually(lambda: brick not in self._processes(), 60)

    def restore_brick(self) -> None:
        """It is back, and has what it missed."""
        self._gluster("volume", "start", VOLUME, "force")
        assert eventually(lambda: all(str(brick) in self._processes() for brick in self._bricks), 60)
        self._gluster("volume", "heal", VOLUME, "full")
        assert eventually(self._healed, 120), self._gluster("volume", "heal", VOLUME, "info")

    def _healed(self) -> bool:
        found = re.findall(r"Number of entries: (\S+)", self._gluster("volume", "heal", VOLUME, "info"))
        return len(found) == 2 and all(n == "0" for n in found)

    def on_brick(self, number: int, name: str) -> bytes:
        """A file as that server keeps it."""
        return (self._bricks[number] / name).read_bytes()

    def close(self) -> None:
        for host in self.hosts:
            run("umount", "-l", str(host))
        self._daemon.terminate()
        self._daemon.wait()
