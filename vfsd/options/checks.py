"""Checks of single values: each takes the option's name and the operator's text and gives the value.

ConfigError names the option and says what to write instead. What takes long to import is imported by the
check that needs it: few command lines do.
"""

from __future__ import annotations

import grp
import os

from vfsd.errors import ConfigError, HostError

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfsd.hostfs.dax import DaxPolicy
    from vfsd.hostfs.ids.idmap import IdMap
    from vfsd.hostfs.ids.xattrmap import Rule
    from vfsd.sandbox.capabilities import Change
    from vfsd.sandbox.userns import IdRange

SOCKET_PATH_BYTES = 107  # sun_path of unix(7), without the NUL
TIMEOUT_S_MAX = 10**9
SIZE_SUFFIXES = {"K": 10, "M": 20, "G": 30, "T": 40}
DAX_WINDOW_MAX = 1 << 40  # bytes: RANGES_MAX pages of 4 KiB


def check_socket(option: str, text: str) -> str:
    if not text:
        raise ConfigError(option, "is empty; give the path the front end connects to")
    if len(os.fsencode(text)) > SOCKET_PATH_BYTES:
        raise ConfigError(
            option, f"is longer than a socket path can be ({SOCKET_PATH_BYTES} bytes); use a shorter one"
        )
    parent = os.path.dirname(text) or "."
    if not os.path.isdir(parent):
        raise HostError(option, f"there is no directory {parent}; make it first")
    return text


def check_group(option: str, text: str) -> int:
    """The group's number."""
    if text.isascii() and text.isdigit() and int(text) < 2**32 - 1:
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise HostError(option, f"there is no group {text!r}; make it, or give another") from None


def check_shared_dir(option: str, text: str) -> str:
    if not os.path.exists(text):
        raise HostError(option, f"{text} does not exist; name an existing directory or regular file")
    if not os.path.isdir(text) and not os.path.isfile(text):
        raise HostError(option, f"{text} is neither a directory nor a regular file; name an existing one")
    needed = os.R_OK | (os.X_OK if os.path.isdir(text) else 0)
    if not os.access(text, needed, effective_ids=True):
        raise HostError(option, f"no permission to read {text}; run as a user who may, or share another")
    return text


def check_tag(option: str, text: str) -> bytes:
    from vfsd.fuse.abi import TAG_BYTES

    tag = os.fsencode(text)
    if not tag:
        raise ConfigError(option, "is empty; give the name the guest mounts")
    if len(tag) > TAG_BYTES:
        raise ConfigError(option, f"has {len(tag)} bytes; use at most {TAG_BYTES}")
    if b"\n" in tag or b"\0" in tag:
        raise ConfigError(option, "contains a newline or NUL, which Linux refuses; leave it out")
    return tag


def check_choice(*choices: str, **spellings: str) -> Callable[[str, str], str]:
    """One of the choices; spellings: other words for some of them, as other daemons have them."""

    def check(option: str, text: str) -> str:
        text = spellings.get(text, text)
        if text not in choices:
            raise ConfigError(option, f"{text!r} is unknown; use {', '.join(choices[:-1])} or {choices[-1]}")
        return text

    return check


def check_number(least: int, most: int) -> Callable[[str, str], int]:
    def check(option: str, text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise ConfigError(option, f"{text!r} is no number from {least} to {most}; use one")
        return int(text)

    return check


def check_seconds(option: str, text: str) -> float:
    digits = text.replace(".", "", 1)
    if not digits.isascii() or not digits.isdigit() or float(text) > TIMEOUT_S_MAX:
        raise ConfigError(option, f"{text!r} is no number of seconds up to {TIMEOUT_S_MAX}; write 1.5 or so")
    return float(text)


def check_size(option: str, text: str) -> int:
    """Bytes; K, M, G and T are powers of 1024."""
    number, shift = text, 0
    if text[-1:].upper() in SIZE_SUFFIXES:
        number, shift = text[:-1], SIZE_SUFFIXES[text[-1].upper()]
    if not number.isascii() or not number.isdigit() or len(number) > 20:
        raise ConfigError(option, f"{text!r} is no size; give bytes, or a number with K, M, G or T")
    return int(number) << shift


def check_dax_window(option: str, text: str) -> int:
    from vfsd.fuse.abi import DAX_RANGE

    size = check_size(option, text)
    if size == 0 or size % DAX_RANGE or size > DAX_WINDOW_MAX:
        raise ConfigError(
            option,
            f"{text!r} is not 2M to {DAX_WINDOW_MAX >> 30}G in steps of 2M, which guests map at a time;"
            " use such a size",
        )
    return size


def check_dax_policy(option: str, text: str) -> DaxPolicy:
    from vfsd.hostfs.dax import DAX_POLICIES, DaxPolicy

    kind, colon, size = text.partition(":")
    if kind == "size" and colon:
        return DaxPolicy(size_min=check_size(option, size))
    if text not in DAX_POLICIES:
        raise ConfigError(option, f"{text!r} is unknown; use {', '.join(DAX_POLICIES)} or size:BYTES")
    return DAX_POLICIES[text]


def check_xattrmap(option: str, text: str) -> tuple[Rule, ...]:
    from vfsd.hostfs.ids.xattrmap import parse_map

    return parse_map(option, text)


def check_id_rules(option: str, texts: Sequence[str]) -> IdMap:
    from vfsd.hostfs.ids.idmap import parse_rules

    return parse_rules(option, texts)


def check_capabilities(option: str, text: str) -> tuple[Change, ...]:
    from vfsd.sandbox.capabilities import parse_changes

    return parse_changes(option, text)


def check_id_ranges(option: str, texts: Sequence[str]) -> tuple[IdRange, ...]:
    from vfsd.sandbox.userns import parse_ranges

    return parse_ranges(option, texts)


def socket_place(path: str) -> str:
    """The same for two paths of one socket."""
    return os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
