"""What of root's rights a server keeps."""

import os
from typing import Final

from vfsd.errors import ConfigError
from vfsd.sandbox import _linux

# linux/capability.h, in order from 0
NAMES_IN_ORDER: Final = """
    chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable
    net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot
    sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease
    audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read
    perfmon bpf checkpoint_restore
"""
NAMES: Final = tuple(NAMES_IN_ORDER.split())

# To give files to their owners, to work as the guest's callers, to make device nodes and file capabilities.
KEPT: Final = frozenset({"chown", "dac_override", "fowner", "fsetid", "setgid", "setuid", "mknod", "setfcap"})
NEEDED: Final = frozenset({"setgid", "setuid"})  # to make files as a guest's users
FOR_HANDLES: Final = "dac_read_search"

Change = tuple[str, bool]  # a name, and whether it is added


def parse_changes(option: str, text: str) -> tuple[Change, ...]:
    """`+NAME:-NAME...`, in any case, with or without CAP_ before the name. ConfigError."""
    changes = []
    for word in text.split(":"):
        name = word[1:].lower().removeprefix("cap_")
        if word[:1] not in ("+", "-") or name not in NAMES:
            raise ConfigError(
                option, f"{word!r} is no + or - and a name of capabilities(7); write +sys_admin:-mknod"
            )
        if word[0] == "-" and name in NEEDED:
            raise ConfigError(
                option, f"{word} would leave a guest's users no files of their own; leave it out"
            )
        changes.append((name, word[0] == "+"))
    return tuple(changes)


def kept(
    changes: tuple[Change, ...] = (), *, device_nodes: bool = True, file_handles: bool = False
) -> frozenset[str]:
    """What a server that is root, or root of its user namespace, keeps."""
    names = set(KEPT)
    if not device_nodes:
        names.discard("mknod")
    if file_handles:
        names.add(FOR_HANDLES)
    for name, added in changes:
        if added:
            names.add(name)
        else:
            names.discard(name)
    return frozenset(names)


def bits(names: frozenset[str]) -> int:
    return sum(1 << NAMES.index(name) for name in names)


def drop(names: frozenset[str]) -> None:
    """All others, for good, of this thread and those it starts; who is not root keeps none. OSError."""
    held = _linux.capabilities()
    keep = bits(names) & held if os.geteuid() == 0 else 0
    if held >> NAMES.index("setpcap") & 1:
        _linux.drop_bounding(keep)
    _linux.clear_ambient()
    _linux.set_capabilities(keep)
