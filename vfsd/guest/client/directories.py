"""Reading directories (fs/fuse/readdir.c)."""

import os
from collections.abc import Iterator
from errno import EIO
from os import strerror
from typing import NamedTuple

from vfsd.fuse import abi
from vfsd.fuse.abi import Fopen, Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.client.attributes import update_attributes
from vfsd.guest.client.connection import NAME_MAX
from vfsd.guest.client.inodes import Dentry, Listing
from vfsd.guest.client.openfile import OpenFile
from vfsd.guest.client.replies import STATX_MTIME, Entry

GETDENTS_SIZE = 32768  # what glibc's readdir(3) asks for at a time


class Dirent(NamedTuple):
    """type: DT_*; offset: where the next entry is."""

    name: bytes
    ino: int
    offset: int
    type: int


def read_directory(file: OpenFile) -> Iterator[Dirent]:
    """All entries from the start, "." and ".." included (fuse_readdir)."""
    inode, conn = file.inode, file.conn
    inode.check_good()
    caches = bool(file.open_flags & Fopen.CACHE_DIR)
    if caches:
        if conn.has(Init.AUTO_INVAL_DATA):
            update_attributes(inode, STATX_MTIME)
        listing = inode.listing
        mtime_ns, iversion = inode.attr.mtime_ns, inode.iversion
        if listing is not None and (listing.mtime_ns, listing.iversion) == (mtime_ns, iversion):
            conn.hit("listings")
            yield from map(Dirent._make, listing.entries)
            return
    entries: list[tuple[bytes, int, int, int]] = []
    position = 0
    while batch := read_batch(file, position):
        yield from batch
        entries += batch
        position = batch[-1].offset
    if caches:
        inode.listing = Listing(entries, mtime_ns, iversion)


def read_batch(file: OpenFile, position: int) -> list[Dirent]:
    """One READDIR or READDIRPLUS; empty at the end."""
    conn, inode = file.conn, file.inode
    plus = use_readdirplus(file, position)
    buffer = bytearray(max(abi.PAGE_SIZE, min(GETDENTS_SIZE, conn.max_pages * abi.PAGE_SIZE)))
    args = abi.READ_IN.pack(file.fh, position, len(buffer), 0, 0, file.flags & ~os.O_CREAT, 0)
    asked = conn.attr_version
    opcode = Opcode.READDIRPLUS if plus else Opcode.READDIR
    parallel = conn.has(Init.PARALLEL_DIROPS)
    with inode.names.shared() if parallel else inode.names.alone():
        _, length = conn.call(opcode, inode.nodeid, args, into=buffer, argvar=True)
        return list(parse(file, bytes(buffer[:length]), plus, asked))


def use_readdirplus(file: OpenFile, position: int) -> bool:
    """fuse_use_readdirplus: with AUTO at the start, and after somebody wanted the attributes."""
    conn, inode = file.conn, file.inode
    if not conn.has(Init.DO_READDIRPLUS):
        return False
    if not conn.has(Init.READDIRPLUS_AUTO):
        return True
    advised, inode.advise_readdirplus = inode.advise_readdirplus, False
    return advised or position == 0


def parse(file: OpenFile, data: bytes, plus: bool, asked: int) -> Iterator[Dirent]:
    """parse_dirfile, parse_dirplusfile"""
    at, head = 0, abi.ENTRY_OUT_SIZE if plus else 0
    while at + head + abi.DIRENT.size <= len(data):
        ino, offset, length, kind = abi.DIRENT.unpack_from(data, at + head)
        start = at + head + abi.DIRENT.size
        name = data[start : start + length]
        if not 0 < length <= NAME_MAX:
            raise OSError(EIO, strerror(EIO))
        if start + length > len(data):
            break
        if b"/" in name or b"\0" in name:
            raise OSError(EIO, strerror(EIO))
        if plus:
            link_entry(file.dentry, name, Entry.parse(file.conn, data, asked, at))
        yield Dirent(name, ino, offset, kind)
        at = (start + length + 7) & ~7


def link_entry(parent: Dentry, name: bytes, entry: Entry) -> None:
    """fuse_direntplus_link: the entry's lookup counts, whether anybody asks for the name or not."""
    if entry.nodeid == 0 or name in (b".", b".."):
        return
    conn, tree = parent.sb.conn, parent.sb.tree
    if entry.nodeid == abi.ROOT_ID or not entry.attr.valid:
        conn.forget(entry.nodeid, 1)
        return
    known = tree.find(parent, name)
    if known is not None:
        try:
            inode = known.inode
            if (
                inode is not None and inode.nodeid == entry.nodeid and not inode.bad
                and inode.automount == entry.submount
                and not inode.is_other(entry.generation, entry.attr.mode)
            ):  # fmt: skip
                with tree.lock:
                    inode.nlookup += 1
                inode.change_attributes(entry.attr, entry.attr_deadline, entry.asked)
                known.deadline = entry.entry_deadline
                inode.init_readdirplus = conn.has(Init.READDIRPLUS_AUTO)
                return
            tree.invalidate(known)
        finally:
            tree.put(known)
    inode = tree.iget(entry)
    inode.init_readdirplus = conn.has(Init.READDIRPLUS_AUTO)
    tree.put(tree.splice(parent, name, inode, entry.entry_deadline))
