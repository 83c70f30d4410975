"""POSIX ACLs as a guest enforces them where the daemon keeps them (fs/posix_acl.c, FUSE_POSIX_ACL)."""

from struct import Struct
from typing import NamedTuple

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"
VERSION = 2
HEADER = Struct("<I")
ENTRY = Struct("<HHI")  # tag, permissions, id
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


class Entry(NamedTuple):
    tag: int
    perm: int
    id: int


def parse(value: bytes) -> list[Entry]:
    """linux/posix_acl_xattr.h. ValueError."""
    if len(value) < HEADER.size or (len(value) - HEADER.size) % ENTRY.size:
        raise ValueError(f"{len(value)} bytes are no ACL")
    if HEADER.unpack_from(value) != (VERSION,):
        raise ValueError("an ACL of another version")
    return [Entry(*fields) for fields in ENTRY.iter_unpack(value[HEADER.size :])]


def allows(entries: list[Entry], owner: int, group: int, caller: tuple[int, set[int]], wanted: int) -> bool:
    """posix_acl_permission. caller: uid and all gids. wanted: MAY_* bits."""
    uid, gids = caller
    mask = next((entry.perm for entry in entries if entry.tag == MASK), 7)
    in_group = False
    for tag, perm, ident in entries:
        if tag == USER_OBJ and uid == owner:
            return wanted & ~perm == 0
        if tag == USER and uid == ident:
            return wanted & ~(perm & mask) == 0
        if (tag == GROUP_OBJ and group in gids) or (tag == GROUP and ident in gids):
            in_group = True
            if wanted & ~perm == 0:
                return wanted & ~mask == 0
        if tag == OTHER:
            return not in_group and wanted & ~perm == 0
    return False
