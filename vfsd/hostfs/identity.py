"""Whose files are and what is attached to them: the operator's choices, and what INIT has to agree on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from vfsd.errors import HostError
from vfsd.fuse.abi import Init
from vfsd.hostfs.ids import idmap, xattrmap
from vfsd.hostfs.ids._credentials import supplementary_groups_work
from vfsd.hostfs.table._tables import Tables

if TYPE_CHECKING:
    from vfsd.hostfs.choices import Negotiation

# What root needs to make files for others (linux/capability.h).
CREATOR_CAPABILITIES = {"CAP_SETGID": 6, "CAP_SETUID": 7}

POSIX_ACL = Init.POSIX_ACL | Init.DONT_MASK | Init.SETXATTR_EXT


def has_selinux() -> bool:
    """is_selinux_enabled(3): SELinux is on, and has a policy; without one all of the kernel is `kernel`."""
    with open("/proc/filesystems") as file:
        if "selinuxfs" not in file.read().split():
            return False
    with open("/proc/self/attr/current", "rb") as current:
        return current.read().rstrip(b"\0\n") != b"kernel"


def check_rights() -> None:
    """ConfigError for a root that can't make files for others; another user makes all of them its own."""
    if os.geteuid() != 0:
        return
    with open("/proc/self/status") as file:
        status = file.read()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    missing = [name for name, bit in CREATOR_CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        raise HostError(
            "capabilities", f"root without {' and '.join(missing)} can't make files for a guest's users;"
            f" grant {'them' if len(missing) > 1 else 'it'}, or run as another user",
        )  # fmt: skip


class IdentityPolicy(NamedTuple):
    posix_acl: Negotiation
    security_label: Negotiation
    killpriv_v2: bool
    uids: idmap.IdMap
    gids: idmap.IdMap
    xattr_rules: tuple[xattrmap.Rule, ...]

    def offered(self) -> Init:
        # Virtio-fs guests check permissions themselves, always: ids are needed of who creates only.
        flags = Init.ALLOW_IDMAP
        if supplementary_groups_work():
            flags |= Init.CREATE_SUPP_GROUP
        if self.killpriv_v2:
            flags |= Init.HANDLE_KILLPRIV_V2
        if self.posix_acl != "never":
            flags |= POSIX_ACL
        if self.security_label != "never":
            flags |= Init.SECURITY_CTX
        return flags

    def required(self) -> Init:
        """Without which there shall be no session."""
        flags = POSIX_ACL if self.posix_acl == "always" else Init(0)
        return flags | Init.SECURITY_CTX if self.security_label == "always" else flags

    def compile(self, tables: Tables) -> None:
        """Before the first request."""
        uids, gids, rules = self.uids, self.gids, self.xattr_rules
        tables.set_id_maps(
            idmap.pack(uids.to_host), idmap.pack(uids.to_guest),
            idmap.pack(gids.to_host), idmap.pack(gids.to_guest),
        )  # fmt: skip
        tables.set_xattr_rules(xattrmap.pack(rules), xattrmap.host_capability(rules))

    def agree(self, tables: Tables, flags: Init) -> None:
        """What INIT has settled, before the guest's next request."""
        tables.agree_identity(
            posix_acl=POSIX_ACL in flags,
            killpriv_v2=Init.HANDLE_KILLPRIV_V2 in flags,
            setxattr_ext=Init.SETXATTR_EXT in flags,
            security_ctx=Init.SECURITY_CTX in flags,
            supp_group=Init.CREATE_SUPP_GROUP in flags,
        )
