"""libvirt, with directories and processes of its own, and guests that it starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape, quoteattr

from guests import initrd, qemu
from guests.daemon import eventually
from guests.guest import HERE, Guest, GuestError

LIBVIRTD = "/usr/sbin/libvirtd"
# What libvirtd has in fixed places; of these it sees empty ones.
PLACES = "/run /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt"
# Its guests and their daemons are in a process namespace with it: none is left when it is killed. The
# shell, its first process, reaps those whose parents have gone.
BEGIN = """
mount --make-rprivate /
for place in $1; do mount -t tmpfs tmpfs $place; done
cp $2/qemu.conf /etc/libvirt
$3 --config $2/libvirtd.conf & wait $!
"""
LIBVIRTD_CONF = """
unix_sock_dir = "{work}"
auth_unix_rw = "none"
log_outputs = "2:file:{work}/libvirtd.log"
"""
QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "file"
"""
START_S = 30


class Libvirt:
    """A libvirtd, as root, which no other one of the machine notices."""

    def __init__(self) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="libvirt-"))
        (self.work / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(work=self.work))
        (self.work / "qemu.conf").write_text(QEMU_CONF)
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def missing() -> str | None:
        """Why it can't be had here, or None."""
        if os.geteuid() != 0:
            return "libvirt's own directories need root"
        for program in (LIBVIRTD, "virsh", "unshare"):
            if shutil.which(program) is None:
                return f"{program} is not installed (tools/ensure-packages libvirt)"
        return qemu.QemuGuest.missing()

    def __enter__(self) -> Self:
        with (self.work / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--net",
                 "sh", "-ec", BEGIN, "sh", PLACES, str(self.work), LIBVIRTD],
                stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True,
            )  # fmt: skip
        if not eventually((self.work / "libvirt-sock").exists, START_S):
            self.kill()
            raise GuestError(f"libvirtd does not listen\n{self.log()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """It, its guests and their daemons."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.work, ignore_errors=True)

    def virsh(self, *words: str) -> str:
        """What it prints. GuestError with what it says is wrong."""
        uri = f"qemu+unix:///system?socket={self.work}/libvirt-sock"
        done = subprocess.run(
            ["virsh", "--connect", uri, *words], capture_output=True, text=True, timeout=120,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            raise GuestError(f"virsh {' '.join(words)}: {done.stderr}\n{self.log()}")
        return done.stdout

    def read(self, path: str) -> str:
        """A file as it sees it, empty if there is none."""
        seen = Path(f"/proc/{self.children()[0]}/root{path}")
        return seen.read_text(errors="replace") if seen.exists() else ""

    def children(self) -> list[int]:
        """Its processes, the first one first, then its guests and their daemons."""
        assert self._process is not None
        found = [self._process.pid]
        for pid in found:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found[1:]

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.work / "stderr", self.work / "libvirtd.log")
                       if path.exists())  # fmt: skip


class LibvirtGuest(Guest):
    """A guest of Libvirt's with a share, by a daemon that libvirt starts."""

    kind = "libvirt"
    boot_seconds = 180

    def __init__(
        self, libvirt: Libvirt, shared: Path, binary: Path, *, name: str = "guest", inside_binary: str = "",
        memory: int = 512, files: Path | None = None,
    ) -> None:  # fmt: skip
        """inside_binary: children of <binary>, as XML."""
        super().__init__(None, memory=memory, files=files)
        self.libvirt = libvirt
        self.shared = shared
        self.binary = binary
        self.name = name
        self.inside_binary = inside_binary

    def start(self) -> Self:
        work = self._work = Path(tempfile.mkdtemp(prefix="guest-"))
        (work / "domain.xml").write_text(self._xml(work))
        try:
            self.libvirt.virsh("create", str(work / "domain.xml"))
            self._channel = socket.socket(socket.AF_UNIX)
            self._channel.connect(str(work / "channel"))
            self._read_until_marker(0, time.monotonic() + self.boot_seconds, "boot")
        except BaseException:
            self.kill()
            raise
        return self

    @property
    def running(self) -> bool:
        return self.name in self.libvirt.virsh("list", "--name").split()

    def daemon_log(self) -> str:
        """What libvirt has kept of the daemon's stderr."""
        return self.libvirt.read(f"/var/log/libvirt/qemu/{self.name}-fs0-virtiofsd.log")

    def daemons(self) -> list[int]:
        """The processes that serve it, the one libvirt has started first."""
        found = []
        for pid in self.libvirt.children():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                if os.fsencode(self.shared) in words:
                    found.append(pid)
        return found

    def destroy(self) -> None:
        """As virsh does it: the power is cut."""
        self.libvirt.virsh("destroy", self.name)
        self.forget()

    def poweroff(self, timeout: float = 30) -> None:
        self.run(f"sync; umount {self.share}", timeout)
        self._send("poweroff\n")
        if not eventually(lambda: not self.running, timeout):
            raise GuestError(self._describe("did not power off"))
        self.forget()

    def kill(self) -> None:
        if self.running:
            self.libvirt.virsh("destroy", self.name)
        self.forget()

    def forget(self) -> None:
        """Begin anew: the guest has ended."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._pending = b""
        self._steps = 0
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work = None

    def _arguments(self, channel: int, work: Path) -> list[str]:
        raise NotImplementedError("libvirt makes them")

    def _xml(self, work: Path) -> str:
        image, _ = initrd.kernel(qemu.CACHE)
        extra = initrd.tree(self.host_files, self.files) if self.host_files else {}
        archive = work / "initrd"
        base = initrd.base_archive(qemu.CACHE, HERE / "init.sh", self.python)
        initrd.concatenated(archive, [base, initrd.cpio(extra)])
        words = (
            f"console=ttyS0 quiet panic=-1 GUEST_KIND=qemu GUEST_NONCE={self._nonce}"
            f" GUEST_FILES={self.files} GUEST_PATH=/bin"
        )
        return f"""
<domain type='qemu'>
  <name>{self.name}</name>
  <memory unit='MiB'>{self.memory}</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu>1</vcpu>
  <cpu mode='maximum'/>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{image}</kernel><initrd>{archive}</initrd><cmdline>{escape(words)}</cmdline>
  </os>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot>
  <devices>
    <emulator>{shutil.which(qemu.BINARY)}</emulator>
    <filesystem type='mount'>
      <driver type='virtiofs' queue='1024'/>
      <binary path={quoteattr(str(self.binary))}>{self.inside_binary}</binary>
      <source dir={quoteattr(str(self.shared))}/>
      <target dir={quoteattr(self.tag)}/>
    </filesystem>
    <serial type='file'><source path='{work}/console'/></serial>
    <serial type='unix'><source mode='bind' path='{work}/channel'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
