"""Boots real Linux guests with the kernel's own virtio-fs driver, and the daemon that serves them.

Used by the tests in ``tests/linux`` and by ``tools/demo.py``. `UmlGuest` is user-mode Linux: two
seconds to boot, the machine's own programs inside. `QemuGuest` is QEMU without KVM: a PCI device,
several request queues, busybox and a Python interpreter inside. `DaxGuest` is a newer QEMU whose device
has a DAX window.
"""

from guests.daemon import (
    QEMU_VIRTIOFSD,
    Daemon,
    DaemonError,
    StartDaemon,
    eventually,
    qemu_virtiofsd_command,
    vfsd_command,
)
from guests.dax import DaxGuest, StockDaxGuest
from guests.guest import Guest, GuestError, GuestTimeout, Result
from guests.qemu import QemuGuest
from guests.uml import VARIABLE as UML_VARIABLE
from guests.uml import UmlGuest, uml_command

__all__ = [
    "QEMU_VIRTIOFSD",
    "UML_VARIABLE",
    "Daemon",
    "DaemonError",
    "DaxGuest",
    "Guest",
    "GuestError",
    "GuestTimeout",
    "QemuGuest",
    "Result",
    "StartDaemon",
    "StockDaxGuest",
    "UmlGuest",
    "eventually",
    "qemu_virtiofsd_command",
    "uml_command",
    "vfsd_command",
]
