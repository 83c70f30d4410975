"""QEMU without KVM as a guest: a PCI virtio-fs device and Debian's cloud kernel."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from guests import initrd
from guests.guest import HERE, Guest, GuestError

BINARY = "qemu-system-x86_64"
CACHE = HERE.parent.parent / ".cache" / "guests"


class QemuGuest(Guest):
    """A virtual machine with a vhost-user-fs-pci device; QEMU names the tag.

    Inside are busybox and Python, see `initrd`.
    """

    kind = "QEMU"
    boot_seconds = 120

    def __init__(
        self,
        socket_path: Path | None,
        *,
        tag: str = "myfs",
        memory: int = 512,
        files: Path | None = None,
        request_queues: int = 1,
        queue_size: int = 128,
    ) -> None:
        """As `Guest`; further arguments are the device's queues, hiprio not counted."""
        super().__init__(socket_path, tag=tag, memory=memory, files=files)
        self.request_queues = request_queues
        self.queue_size = queue_size

    @staticmethod
    def missing() -> str | None:
        """Why QEMU cannot be booted here, or None; downloads the guest's kernel."""
        if shutil.which(BINARY) is None:
            return f"{BINARY} is not installed (Debian package qemu-system-x86)"
        try:
            prepare()
        except initrd.Unavailable as error:
            return f"no kernel for a QEMU guest: {error}"
        return None

    def _arguments(self, channel: int, work: Path) -> list[str]:
        binary = shutil.which(BINARY)
        if binary is None:
            raise GuestError(f"{BINARY} is not installed")
        image, _ = initrd.kernel(CACHE)
        extra = initrd.tree(self.host_files, self.files) if self.host_files else {}
        archive = work / "initrd"
        base = initrd.base_archive(CACHE, HERE / "init.sh", self.python)
        initrd.concatenated(archive, [base, initrd.cpio(extra)])
        environment = {
            "GUEST_KIND": "qemu",
            "GUEST_NONCE": self._nonce,
            "GUEST_FILES": self.files,
            "GUEST_PATH": "/bin",
        }
        words = [f"{name}={value}" for name, value in environment.items()]
        return [
            binary,
            *machine_arguments(self.memory),
            *(() if self.socket_path is None else self._device_arguments(self.socket_path)),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(image), "-initrd", str(archive)),
            *("-append", " ".join(["console=ttyS0", "quiet", "panic=-1", *words])),
            *("-serial", "stdio"),
            *("-monitor", f"unix:{work}/monitor,server=on,wait=off"),
            *("-chardev", f"socket,id=channel,fd={channel}", "-serial", "chardev:channel"),
        ]

    def monitor(self, command: str) -> None:
        """Have QEMU carry out a command of its monitor, and wait until it has."""
        assert self._work is not None
        prompt = b"(qemu) "
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(30)
            monitor.connect(str(self._work / "monitor"))
            for line in (b"", command.encode() + b"\n"):
                monitor.sendall(line)
                seen = b""
                while not seen.endswith(prompt):
                    data = monitor.recv(4096)
                    if not data:
                        raise GuestError(self._describe(f"closed its monitor during: {command}"))
                    seen += data

    def _device_arguments(self, socket_path: Path) -> list[str]:
        return device_arguments(
            socket_path, self.tag, request_queues=self.request_queues, queue_size=self.queue_size
        )


def prepare() -> None:
    """Download the kernel and build the first file system, if they are not there yet."""
    initrd.base_archive(CACHE, HERE / "init.sh", QemuGuest(None).python)


def machine_arguments(memory: int) -> list[str]:
    """QEMU's arguments for a machine whose memory (MiB) the daemon can map."""
    return [
        *("-M", "q35,accel=tcg", "-cpu", "max", "-m", str(memory)),
        *("-object", f"memory-backend-memfd,id=mem,size={memory}M,share=on"),
        *("-numa", "node,memdev=mem"),
    ]


def device_arguments(
    socket_path: Path, tag: str, *, request_queues: int = 1, queue_size: int = 128
) -> list[str]:
    """QEMU's arguments for the virtio-fs device."""
    return [
        *("-chardev", f"socket,id=fs,path={socket_path}"),
        "-device",
        f"vhost-user-fs-pci,chardev=fs,tag={tag}"
        f",num-request-queues={request_queues},queue-size={queue_size}",
    ]
