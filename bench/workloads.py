"""The workloads of the wire level: what is asked, and the floor under it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from vfsd.fuse import abi
from vfsd.fuse.opcodes import NUMBER
from vfsd.fuse.shapes import SHAPES

from .client import Client
from .fixture import FILE_SIZE, FILES, SEED, SMALL_ENTRIES, THOUSAND, XATTR, XATTR_VALUE
from .steps import ANY_SIZE, Check, File, Items, Node, Number, Order, Program, Step

NAME = b"########"  # digits go here
LISTING = 32768  # bytes of a listing's reply, as glibc asks for them
REGULAR, DIRECTORY, LINK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
TARGET = b"a/target/of/a/link"
NO_SUCH_OPCODE = 63
ENOSYS = 38
FORGET = Step(NUMBER["FORGET"])


@dataclass(frozen=True)
class Workload:
    """One row. program: makes it, once the daemon's file system can be asked.

    floor: the kind of _floor.pyx; None when there are no such calls. items: how many things one
    operation does, which figures are given by. writes: the host's file is compared afterwards.
    """

    name: str
    title: str
    program: Callable[[Client], Program]
    floor: str | None
    unit: str = "op"
    items: Callable[[int], int] = lambda large: 1
    block: int = 0
    order: Order = Order.SEQUENTIAL
    writes: bool = False
    at_end: bool = False
    direct: bool = False
    xattr: bool = False


def step(name: str, args: bytes = b"", **more: object) -> Step:
    """One request, with the room its reply needs."""
    shape = SHAPES[NUMBER[name]]
    out_args, out_pages, argvar = shape.room(args)
    return Step(
        NUMBER[name], args, out_args=out_args, out_pages=out_pages, argvar=argvar
    )._replace(**more)  # type: ignore[arg-type]  # fmt: skip


def entry(mode: int, check: Check = Check.MADE, want: int = 0) -> dict[str, object]:
    return {"check": check, "mode": mode, "want": want}


def nop(client: Client) -> Program:
    return Program((Step(NO_SUCH_OPCODE, error=ENOSYS),))


def getattr_(client: Client) -> Program:
    return Program(
        (step("GETATTR", bytes(16), node_from=Node.ITEM, **entry(REGULAR, Check.ATTR, FILE_SIZE)),),
        client.files(),
    )


def lookup(client: Client) -> Program:
    hit = step(
        "LOOKUP", b"f" + NAME + b"\0", node=client.directory("files"), number=Number.ITEM, number_at=1,
        **entry(REGULAR, Check.KNOWN, FILE_SIZE),
    )  # fmt: skip
    return Program((hit,), client.files())


def lookup_new(client: Client) -> Program:
    new = step(
        "LOOKUP", b"f" + NAME + b"\0", node=client.directory("new"), number=Number.ITEM, number_at=1,
        **entry(REGULAR, Check.MADE, FILE_SIZE),
    )  # fmt: skip
    return Program((new, FORGET), Items(FILES))


def lookup_absent(client: Client) -> Program:
    absent = step(
        "LOOKUP", b"n" + NAME + b"\0", node=client.directory("files"), number=Number.ITEM, number_at=1,
        check=Check.ABSENT,
    )  # fmt: skip
    return Program((absent,), Items(FILES))


def opened(flags: int = os.O_RDONLY, **more: object) -> Step:
    return step("OPEN", abi.OPEN_IN.pack(flags, 0), check=Check.OPENED, **more)


def released(flags: int = os.O_RDONLY, **more: object) -> Step:
    return step("RELEASE", abi.RELEASE_IN.pack(0, flags, 0, 0), fh_at=0, **more)


def open_release(client: Client) -> Program:
    return Program((opened(node_from=Node.ITEM), released(node_from=Node.ITEM)), client.files())


def open_flush_release(client: Client) -> Program:
    flush = step("FLUSH", abi.FLUSH_IN.pack(0, 0, 0, 1), fh_at=0, node_from=Node.ITEM)
    return Program((opened(node_from=Node.ITEM), flush, released(node_from=Node.ITEM)), client.files())


def create(client: Client) -> Program:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    made = abi.CREATE_IN.pack(flags, REGULAR | 0o644, 0o022, 0)
    own = client.own
    return Program(
        (
            step("CREATE", made + b"w" + NAME + b"\0", node=own, number_at=len(made) + 1,
                 **entry(REGULAR | 0o644, Check.CREATED)),
            step("WRITE", abi.READ_IN.pack(0, 0, 4096, 0, 0, os.O_RDWR, 0), fh_at=0, node_from=Node.MADE,
                 in_pages=4096, check=Check.WRITTEN),
            released(os.O_RDWR, node_from=Node.MADE),
            step("UNLINK", b"w" + NAME + b"\0", node=own, number_at=1),
            FORGET,
        ),
    )  # fmt: skip


def mkdir_rmdir(client: Client) -> Program:
    made = abi.MKDIR_IN.pack(0o755, 0o022)
    own = client.own
    return Program(
        (
            step("MKDIR", made + b"w" + NAME + b"\0", node=own, number_at=len(made) + 1,
                 **entry(DIRECTORY | 0o755)),
            step("RMDIR", b"w" + NAME + b"\0", node=own, number_at=1),
            FORGET,
        ),
    )  # fmt: skip


def rename(client: Client) -> Program:
    own = client.own
    client.make_names(b"a")

    def to(old: bytes, new: bytes) -> Step:
        return step("RENAME", abi.RENAME_IN.pack(own) + old + NAME + b"\0" + new + NAME + b"\0",
                    node=own, number_at=9, second_at=19)  # fmt: skip

    return Program((to(b"a", b"b"), to(b"b", b"a")))


def symlink_readlink(client: Client) -> Program:
    own = client.own
    return Program(
        (
            step("SYMLINK", b"w" + NAME + b"\0" + TARGET + b"\0", node=own, number_at=1, **entry(LINK)),
            step("READLINK", node_from=Node.MADE, check=Check.BYTES, reply=TARGET),
            step("UNLINK", b"w" + NAME + b"\0", node=own, number_at=1),
            FORGET,
        ),
    )


def setattr_step(client: Client, shown: int = REGULAR, want: int = 8192, **fields: int) -> Step:
    names = ("valid", "padding", "fh", "size", "lock_owner", "atime", "mtime", "ctime", "atimensec",
             "mtimensec", "ctimensec", "mode")  # fmt: skip
    args = abi.SETATTR_IN.pack(*(fields.get(name, 0) for name in names), 0, 0, 0, 0)
    return step("SETATTR", args, node=client.file, **entry(shown, Check.ATTR, want))


def setattr_mode(client: Client) -> Program:
    mode = REGULAR | 0o640
    return Program((setattr_step(client, mode, valid=abi.Fattr.MODE, mode=mode),))


def setattr_times(client: Client) -> Program:
    valid = abi.Fattr.ATIME | abi.Fattr.MTIME
    times = {"atime": 10**9, "mtime": 10**9, "atimensec": 1, "mtimensec": 1}
    return Program((setattr_step(client, valid=valid, **times),))


def setattr_size(client: Client) -> Program:
    nodes = client.make_names(b"t")  # as many as operations under way, which may still meet on one
    return Program(
        tuple(
            setattr_step(
                client, want=size if len(nodes) == 1 else ANY_SIZE, valid=abi.Fattr.SIZE, size=size
            )._replace(node=0, node_from=Node.ITEM)
            for size in (4096, 8192)
        ),
        Items(len(nodes), nodes),
    )


def getxattr(client: Client) -> Program:
    node = client.files().nodes[0]
    client.expect_xattr(node)
    name = XATTR.encode() + b"\0"
    return Program(
        (step("GETXATTR", abi.GETXATTR_IN.pack(256, 0) + name, node=node, check=Check.BYTES,
              reply=XATTR_VALUE),),
    )  # fmt: skip


def statfs(client: Client) -> Program:
    return Program((step("STATFS", node=abi.ROOT_ID),))


def listing(opcode: str, directory: str, new: bool = False) -> Callable[[Client], Program]:
    """OPENDIR, listing until it is empty, RELEASEDIR; new: forget everything each time."""

    def program(client: Client) -> Program:
        client.expect_readdirplus(opcode)
        items = client.directories(directory)
        plus = opcode == "READDIRPLUS"
        if plus and not new:
            client.list_all(directory)
        args = abi.READ_IN.pack(0, 0, LISTING, 0, 0, 0, 0)
        entries = 2 + client.tree.entries(directory)
        steps = (
            step("OPENDIR", abi.OPEN_IN.pack(os.O_RDONLY | os.O_DIRECTORY, 0), check=Check.OPENED,
                 node_from=Node.ITEM),
            step(opcode, args, node_from=Node.ITEM, fh_at=0, offset_at=8, want=entries,
                 check=Check.LISTING_PLUS if plus else Check.LISTING),
            step("RELEASEDIR", abi.RELEASE_IN.pack(0, 0, 0, 0), fh_at=0, node_from=Node.ITEM),
        )  # fmt: skip
        return Program((*steps, FORGET) if new else steps, items)

    return program


def blocks_of(size: int, block: int) -> int:
    """The largest power of two of blocks that a file has."""
    return 1 << ((size // block).bit_length() - 1)


def reading(
    block: int, order: Order, direct: bool = False, at_end: bool = False
) -> Callable[[Client], Program]:
    def program(client: Client) -> Program:
        node, fh = client.open_big(os.O_RDONLY | (os.O_DIRECT if direct else 0))
        args = abi.READ_IN.pack(fh, 0, block, 0, 0, 0, 0)
        size = client.tree.big
        if at_end:
            args = abi.READ_IN.pack(fh, size, block, 0, 0, 0, 0)
            return Program((step("READ", args, node=node, check=Check.BYTES),))
        read = step("READ", args, node=node, offset_at=8, check=Check.DATA)
        return Program((read,), Items(), File(block, blocks_of(size, block), size, order, SEED))

    return program


def writing(
    block: int, order: Order, direct: bool = False, sync: bool = False
) -> Callable[[Client], Program]:
    def program(client: Client) -> Program:
        node, fh = client.open_own_big(os.O_RDWR | (os.O_DIRECT if direct else 0))
        args = abi.READ_IN.pack(fh, 0, block, 0, 0, os.O_RDWR, 0)
        size = client.tree.big
        steps = [step("WRITE", args, node=node, offset_at=8, in_pages=block, check=Check.WRITTEN)]
        if sync:
            steps.append(step("FSYNC", abi.FSYNC_IN.pack(fh, 0, 0), node=node))
        return Program(tuple(steps), Items(), File(block, blocks_of(size, block), size, order))

    return program


def data(name: str, title: str, block: int, order: Order, **more: bool) -> list[Workload]:
    """Reading and writing in blocks, and the same with O_DIRECT."""
    rows = []
    for direct in (False, True):
        suffix, extra = ("-direct", ", O_DIRECT") if direct else ("", "")
        rows += [
            Workload(f"read-{name}{suffix}", f"read {title}{extra}", reading(block, order, direct), "read",
                     "MB", block=block, order=order, direct=direct),
            Workload(f"write-{name}{suffix}", f"write {title}{extra}", writing(block, order, direct),
                     "write", "MB", block=block, order=order, direct=direct, writes=True),
        ]  # fmt: skip
    return rows


def ten(_large: int) -> int:
    return SMALL_ENTRIES


def thousand(_large: int) -> int:
    return THOUSAND


def many(large: int) -> int:
    return large


WORKLOADS: dict[str, Workload] = {
    row.name: row
    for row in (
        Workload("nop", "unknown opcode", nop, None),
        Workload("getattr", "getattr", getattr_, "getattr"),
        Workload("lookup", "lookup, inode known", lookup, "lookup"),
        Workload("lookup-new", "lookup, inode new; forget", lookup_new, "lookup-new"),
        Workload("lookup-absent", "lookup, no such name", lookup_absent, "lookup-absent"),
        Workload("open-release", "open, release", open_release, "open-release"),
        Workload("open-flush-release", "open, flush, release", open_flush_release, "open-release"),
        Workload("create", "create, write, release, unlink, forget", create, "create"),
        Workload("mkdir-rmdir", "mkdir, rmdir, forget", mkdir_rmdir, "mkdir-rmdir"),
        Workload("rename", "rename there and back", rename, "rename"),
        Workload("symlink-readlink", "symlink, readlink, unlink, forget", symlink_readlink,
                 "symlink-readlink"),
        Workload("setattr-mode", "setattr: mode", setattr_mode, "setattr-mode"),
        Workload("setattr-times", "setattr: times", setattr_times, "setattr-times"),
        Workload("setattr-size", "setattr: size, twice", setattr_size, "setattr-size"),
        Workload("getxattr", "getxattr", getxattr, "getxattr", xattr=True),
        Workload("statfs", "statfs", statfs, "statfs"),
        Workload("readdir-10", "readdir, 10", listing("READDIR", "small"), "readdir", "entry", ten),
        Workload("readdir-10000", "readdir, 10,000", listing("READDIR", "large"), "readdir",
                 "entry", many),
        Workload("readdirplus-10", "readdirplus, 10, known",
                 listing("READDIRPLUS", "small"), "readdirplus", "entry", ten),
        Workload("readdirplus-10000", "readdirplus, 10,000, known",
                 listing("READDIRPLUS", "large"), "readdirplus", "entry", many),
        Workload("readdirplus-10-new", "readdirplus, 10, new; forget",
                 listing("READDIRPLUS", "small-new", True), "readdirplus-new", "entry", ten),
        Workload("readdirplus-1000-new", "readdirplus, 1,000, new; forget",
                 listing("READDIRPLUS", "thousand-new", True), "readdirplus-new", "entry", thousand),
        Workload("readdirplus-10000-new", "readdirplus, 10,000, new; forget",
                 listing("READDIRPLUS", "large-new", True), "readdirplus-new", "entry", many),
        Workload("fsync", "write 4 KiB, fsync", writing(4096, Order.SCATTERED, sync=True), "write-fsync",
                 block=4096, order=Order.SCATTERED, writes=True),
        Workload("read-eof", "read at the end of a file", reading(4096, Order.SEQUENTIAL, at_end=True),
                 "read", block=4096, at_end=True),
        *data("4k", "4 KiB, random", 4096, Order.SCATTERED),
        *data("128k", "128 KiB, sequential", 1 << 17, Order.SEQUENTIAL),
        *data("1m", "1 MiB, sequential", 1 << 20, Order.SEQUENTIAL),
    )
}  # fmt: skip
