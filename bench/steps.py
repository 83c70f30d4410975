"""What one operation of a workload asks of a daemon: a sequence of requests, and what each must answer.

The numbers are those of `_load.pyx`, which refuses to be imported when they differ.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

ANY_SIZE = (1 << 64) - 1  # of Step.want: a size that others may be changing


class Node(IntEnum):
    """Whose nodeid a request carries."""

    FIXED = 0  # Step.node
    ITEM = 1  # that of the item this operation works on
    MADE = 2  # the last one a reply of this operation has given


class Number(IntEnum):
    """What the eight hex digits in a name count."""

    SLOT = 0  # operations under way at the same time differ
    ITEM = 1  # items, in turn


class Order(IntEnum):
    """How the blocks of a file follow each other."""

    SEQUENTIAL = 0
    SCATTERED = 1


class Check(IntEnum):
    """What a good reply is, besides its error, its length and its unique, which are always checked."""

    NOTHING = 0
    ATTR = 1  # attributes: type and mode are Step.mode, the size Step.want
    KNOWN = 2  # an entry: the item's nodeid, and attributes as above
    MADE = 3  # an entry with a nodeid, kept for Node.MADE and for forgetting; attributes as above
    ABSENT = 4  # ENOENT, or an entry without a nodeid
    OPENED = 5  # a handle, kept
    CREATED = 6  # an entry as MADE, and a handle
    DATA = 7  # the block's contents, cut at the file's end
    WRITTEN = 8  # the number of bytes sent
    BYTES = 9  # exactly Step.reply
    LISTING = 10  # entries; repeated from where it ended until empty, Step.want in all
    LISTING_PLUS = 11  # the same with READDIRPLUS; nodeids are kept for forgetting


class Wrong(IntEnum):
    """What was wrong with a reply."""

    ERROR = 1
    LENGTH = 2
    NODE = 3
    MODE = 4
    SIZE = 5
    DATA = 6
    BYTES = 7
    LISTING = 8
    ENTRIES = 9


class Step(NamedTuple):
    """One request. Sizes and offsets in bytes, offsets from the end of the in header.

    opcode FORGET forgets everything that the operation has been given and awaits no reply, but
    waits while more than FORGETS_MAX are on their way.
    """

    opcode: int
    args: bytes = b""
    node: int = 0
    node_from: Node = Node.FIXED
    number: Number = Number.SLOT
    number_at: int = -1  # eight bytes that become hex digits
    second_at: int = -1
    fh_at: int = -1  # where the handle goes that the operation has opened
    offset_at: int = -1  # where the block's offset goes, or the place in a directory
    out_args: int = 0
    out_pages: int = 0
    in_pages: int = 0
    argvar: bool = False  # the reply may be shorter
    check: Check = Check.NOTHING
    error: int = 0  # the errno it must answer
    mode: int = 0
    want: int = 0
    reply: bytes = b""


@dataclass(frozen=True)
class Items:
    """What operations work on in turn."""

    count: int = 1
    nodes: tuple[int, ...] = ()  # of all of them, or empty


class File(NamedTuple):
    """Blocks of a file of `blocks` * `block` bytes, at most `size` of which there are."""

    block: int = 0
    blocks: int = 1  # a power of two
    size: int = 0
    order: Order = Order.SEQUENTIAL
    seed: int = 0  # of the contents; see _common.h


class Program(NamedTuple):
    """A workload as the load generator runs it."""

    steps: tuple[Step, ...]
    items: Items = Items()
    file: File = File()
