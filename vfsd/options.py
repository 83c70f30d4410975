"""Every option of the daemon, once: names, default, check and help.

A check takes the operator's text and gives the value, or raises ConfigError naming the option.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfsd.errors import ConfigError
from vfsd.hostfs.fs import CACHE_POLICIES, CacheMode
from vfsd.share import TAG_BYTES

SOCKET_PATH_BYTES = 107  # sun_path of unix(7), without the NUL
REQUEST_QUEUES_MAX = 64
POLL_US_MAX = 1000
LOG_LEVELS = ("error", "warning", "info", "debug")


@dataclass(frozen=True)
class Option:
    """One option. check None: a flag, off unless given. default None: required, or simply not set."""

    name: str
    help: str
    check: Callable[[str, str], Any] | None = None
    metavar: str = ""
    default: str | None = None
    required: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.name.lstrip("-").replace("-", "_")


@dataclass(frozen=True)
class ServeOptions:
    """The checked values, by Option.key."""

    socket: str
    shared_dir: str
    tag: bytes | None
    cache: CacheMode
    num_request_queues: int
    xattr: bool
    poll_us: int
    inband_notifications: bool
    log_level: str


def check_socket(option: str, text: str) -> str:
    if not text:
        raise ConfigError(option, "is empty; give the path the front end connects to")
    if len(os.fsencode(text)) > SOCKET_PATH_BYTES:
        raise ConfigError(
            option, f"is longer than a socket path can be ({SOCKET_PATH_BYTES} bytes); use a shorter one"
        )
    parent = os.path.dirname(text) or "."
    if not os.path.isdir(parent):
        raise ConfigError(option, f"there is no directory {parent}; make it first")
    return text


def check_shared_dir(option: str, text: str) -> str:
    if not os.path.exists(text):
        raise ConfigError(option, f"{text} does not exist; name an existing directory")
    if not os.path.isdir(text):
        raise ConfigError(option, f"{text} is no directory; name an existing directory")
    if not os.access(text, os.R_OK | os.X_OK, effective_ids=True):
        raise ConfigError(
            option, f"no permission to read {text}; run as a user who may, or share another directory"
        )
    return text


def check_tag(option: str, text: str) -> bytes:
    tag = os.fsencode(text)
    if not tag:
        raise ConfigError(option, "is empty; give the name the guest mounts")
    if len(tag) > TAG_BYTES:
        raise ConfigError(option, f"has {len(tag)} bytes; use at most {TAG_BYTES}")
    if b"\n" in tag or b"\0" in tag:
        raise ConfigError(option, "contains a newline or NUL, which Linux refuses; leave it out")
    return tag


def check_choice(*choices: str) -> Callable[[str, str], str]:
    def check(option: str, text: str) -> str:
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


SERVE_OPTIONS = (
    Option(
        "--socket", "Listen here for the front end (QEMU, cloud-hypervisor, ...).",
        check_socket, "PATH", required=True, aliases=("--socket-path",),
    ),
    Option("--shared-dir", "Share this directory.", check_shared_dir, "DIR", required=True),
    Option(
        "--tag", "Name the guest mounts, for front ends that ask the daemon for it (user-mode Linux,"
        " crosvm). Leave it out for QEMU, which has its own and of which 7.1 to 8.0 crash on it.",
        check_tag, "NAME",
    ),
    Option(
        "--cache", "What the guest may keep: nothing (never), names and attributes for a second"
        " (auto), or everything for a day (always).",
        check_choice(*CACHE_POLICIES), "|".join(CACHE_POLICIES), default="auto",
    ),
    Option(
        "--num-request-queues", "Offer at most this many request queues; the front end sets up as"
        " many as it wants.",
        check_number(1, REQUEST_QUEUES_MAX), "N", default="8",
    ),
    Option(
        "--poll-us", "Poll a busy request queue up to this many microseconds before sleeping; 0 never"
        " polls.",
        check_number(0, POLL_US_MAX), "N", default="50",
    ),
    Option("--xattr", "Pass extended attributes through."),
    Option(
        "--inband-notifications", "Offer kicks and calls as messages; only user-mode Linux in"
        " time-travel mode needs them, and they are slow.",
    ),
    Option("--log-level", "How much to say on stderr.", check_choice(*LOG_LEVELS),
           "|".join(LOG_LEVELS), default="info"),
)  # fmt: skip


def check_options(given: dict[str, Any]) -> ServeOptions:
    """Text by Option.key, None where not given, to checked values. ConfigError."""
    values: dict[str, Any] = {}
    for option in SERVE_OPTIONS:
        text = given[option.key]
        if option.check is None:
            values[option.key] = bool(text)
            continue
        if text is None:
            text = option.default
        if text is None and option.required:
            raise ConfigError(option.name, f"is missing; add {option.name} {option.metavar}")
        values[option.key] = None if text is None else option.check(option.name, text)
    return ServeOptions(**values)
