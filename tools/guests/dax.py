"""QEMU 11.1 or newer with a DAX window: its generic vhost-user device as a virtio-fs device.

What it needs is made by `tests/linux/get-dax-guest` in a folder, VFSD_DAX_GUEST or `.cache/dax-guest`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from guests import initrd
from guests.guest import HERE
from guests.qemu import CACHE, QemuGuest, machine_arguments

GET = HERE.parent.parent / "tests" / "linux" / "get-dax-guest"
FOLDER = Path(os.environ.get("VFSD_DAX_GUEST") or HERE.parent.parent / ".cache" / "dax-guest")
ROOT = FOLDER / "root"
VIRTIO_ID_FS = 26
CONFIG_BYTES = 40  # struct virtio_fs_config: the tag and the number of queues come from the daemon
GET_SECONDS = 900


class DaxGuest(QemuGuest):
    """A virtual machine with one such device for each socket. Tags are those the daemons have.

    Every daemon must offer `request_queues` queues: the device has that many for each.
    """

    kind = "QEMU with DAX"
    boot_seconds = 180

    def __init__(
        self,
        sockets: Sequence[Path],
        *,
        tag: str = "myfs",
        memory: int = 512,
        files: Path | None = None,
        request_queues: int = 2,
        queue_size: int = 128,
        cpus: int = 1,
    ) -> None:
        super().__init__(
            sockets[0],
            tag=tag,
            memory=memory,
            files=files,
            request_queues=request_queues,
            queue_size=queue_size,
        )
        self.sockets = list(sockets)
        self.cpus = cpus

    def mount(self, options: str = "dax=always") -> None:
        """Mount the share, with DAX."""
        super().mount(options)

    @staticmethod
    def missing() -> str | None:
        """Why it cannot be booted here, or None; makes the folder if it is not there yet."""
        try:
            done = subprocess.run(
                [GET, FOLDER], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GET_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{GET.name}: {error}"
        if done.returncode != 0:
            return (done.stderr.strip().splitlines() or [f"{GET.name} failed"])[-1]
        if not Path("/bin/busybox").exists():
            return "/bin/busybox is not installed (Debian package busybox-static)"
        return None

    def _arguments(self, channel: int, work: Path) -> list[str]:
        image = kernel()
        archive = work / "initrd"
        extra = initrd.tree(self.host_files, self.files) if self.host_files else {}
        base = initrd.base_archive(CACHE, HERE / "init.sh", self.python, image)
        initrd.concatenated(archive, [base, initrd.cpio(extra)])
        words = [
            *("console=ttyS0", "quiet", "panic=-1"),
            *("GUEST_KIND=qemu", f"GUEST_NONCE={self._nonce}"),
            *(f"GUEST_FILES={self.files}", "GUEST_PATH=/bin"),
        ]
        return [
            *self._emulator(),
            *machine_arguments(self.memory),
            *("-smp", str(self.cpus)),
            *self._devices(),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(image), "-initrd", str(archive), "-append", " ".join(words)),
            *("-serial", "stdio"),
            *("-monitor", f"unix:{work}/monitor,server=on,wait=off"),
            *("-chardev", f"socket,id=channel,fd={channel}", "-serial", "chardev:channel"),
        ]

    def _emulator(self) -> list[str]:
        return emulator(FOLDER / "qemu-shmem.so")

    def _devices(self) -> list[str]:
        arguments = []
        for number, path in enumerate(self.sockets):
            arguments += [
                *("-chardev", f"socket,id=fs{number},path={path}"),
                "-device",
                f"vhost-user-test-device-pci,chardev=fs{number},virtio-id={VIRTIO_ID_FS}"
                f",num_vqs={1 + self.request_queues},vq_size={self.queue_size}"
                f",config_size={CONFIG_BYTES}",
            ]
        return arguments


class StockDaxGuest(DaxGuest):
    """The same without qemu-shmem.c: QEMU maps only what fills ranges to the end. So which files are mapped
    is left to the daemons.
    """

    kind = "QEMU with DAX as it is"

    def mount(self, options: str = "dax=inode") -> None:
        """Mount the share, with DAX for the files that the daemon names."""
        super().mount(options)

    def _emulator(self) -> list[str]:
        return emulator()


def emulator(preload: Path | None = None) -> list[str]:
    """QEMU of ROOT, by its own loader: its libc is newer than this machine's."""
    return [
        *(str(ROOT / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(ROOT / "usr/lib/x86_64-linux-gnu")),
        *(() if preload is None else ("--preload", str(preload))),
        *(str(ROOT / "usr/bin/qemu-system-x86_64"), "-L", str(ROOT / "usr/share/qemu")),
        *("-L", str(ROOT / "usr/share/seabios")),
    ]


def kernel() -> Path:
    """The newest kernel image of ROOT."""
    images = [*ROOT.glob("usr/lib/modules/*/vmlinuz"), *ROOT.glob("boot/vmlinuz-*")]
    return max(images, key=lambda path: path.stat().st_mtime)
