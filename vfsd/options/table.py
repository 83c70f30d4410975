"""Every option of the daemon, once: names, default, check and help.

A check takes the operator's text and gives the value, or raises ConfigError naming the option.
`-o name[=value],...` is how libvirt and the older daemons spell the same options.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfsd.errors import ConfigError
from vfsd.fuse.abi import DAX_RANGE, TAG_BYTES
from vfsd.hostfs.cache import CACHE_POLICIES, CacheMode, DirectWrites, SymlinkCache
from vfsd.hostfs.fs import FILE_HANDLES, FileHandles
from vfsd.hostfs.identity import Negotiation
from vfsd.hostfs.ids.idmap import IDENTITY, IdMap, parse_rules
from vfsd.hostfs.ids.xattrmap import Rule, parse_map
from vfsd.hostfs.ops.mappings import DAX_POLICIES, DaxPolicy
from vfsd.sandbox.userns import IdRange, check_allowed, parse_ranges

SOCKET_PATH_BYTES = 107  # sun_path of unix(7), without the NUL
REQUEST_QUEUES_MAX = 64
POLL_US_MAX = 1000
TIMEOUT_S_MAX = 10**9
SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", re.ASCII)
NEGOTIATIONS = ("never", "auto", "always")
SIZE_SUFFIXES = {"K": 10, "M": 20, "G": 30, "T": 40}
DAX_WINDOW_MAX = 1 << 40  # bytes: RANGES_MAX pages of 4 KiB
FD_BUDGET_MIN = 64
FD_BUDGET_MAX = 1 << 20  # HANDLES_MAX of the tables; Linux's default fs.nr_open
LOG_LEVELS = ("error", "warning", "info", "debug")


@dataclass(frozen=True)
class Option:
    """One option. check None: a flag, off unless given. default None: required, or simply not set.

    on: a flag that is on unless --no-NAME is given.
    bare: the value that the name alone stands for; another one then needs "=".
    multiple: it may be repeated; its check gets all of them.
    o_names: what `-o` calls it; a flag is turned off again by the same name with "no_" before it.
    o_words: whole words of `-o` that stand for a value of an option that is no flag.
    """

    name: str
    help: str
    check: Callable[[str, Any], Any] | None = None
    metavar: str = ""
    default: str | None = None
    required: bool = False
    bare: str | None = None
    aliases: tuple[str, ...] = ()
    on: bool = False
    multiple: bool = False
    o_names: tuple[str, ...] = ()
    o_words: Mapping[str, str] = field(default_factory=dict)

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
    timeout: float | None
    entry_timeout: float | None
    attr_timeout: float | None
    negative_timeout: float | None
    readdirplus: bool
    symlink_cache: SymlinkCache
    always_flush: bool
    parallel_direct_writes: DirectWrites
    writeback: bool
    allow_direct_io: bool
    allow_mmap: bool
    zero_message_open: bool
    num_request_queues: int
    xattr: bool
    readonly: bool
    xattrmap: tuple[Rule, ...] | None
    posix_acl: Negotiation
    security_label: Negotiation
    killpriv_v2: bool
    uid_map: tuple[IdRange, ...]
    gid_map: tuple[IdRange, ...]
    translate_uid: IdMap
    translate_gid: IdMap
    flock: bool
    posix_lock: bool
    announce_submounts: bool
    inode_file_handles: FileHandles
    fd_budget: int | None
    poll_us: int
    inband_notifications: bool
    dax_window: int | None
    dax_policy: DaxPolicy | None
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
        raise ConfigError(option, f"{text} does not exist; name an existing directory or regular file")
    if not os.path.isdir(text) and not os.path.isfile(text):
        raise ConfigError(
            option, f"{text} is neither a directory nor a regular file; name an existing one"
        )
    needed = os.R_OK | (os.X_OK if os.path.isdir(text) else 0)
    if not os.access(text, needed, effective_ids=True):
        raise ConfigError(option, f"no permission to read {text}; run as a user who may, or share another")
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
    if not SECONDS.fullmatch(text) or float(text) > TIMEOUT_S_MAX:
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
    size = check_size(option, text)
    if size == 0 or size % DAX_RANGE or size > DAX_WINDOW_MAX:
        raise ConfigError(
            option,
            f"{text!r} is not 2M to {DAX_WINDOW_MAX >> 30}G in steps of 2M, which guests map at a time;"
            " use such a size",
        )
    return size


def check_dax_policy(option: str, text: str) -> DaxPolicy:
    kind, colon, size = text.partition(":")
    if kind == "size" and colon:
        return DaxPolicy(size_min=check_size(option, size))
    if text not in DAX_POLICIES:
        raise ConfigError(option, f"{text!r} is unknown; use {', '.join(DAX_POLICIES)} or size:BYTES")
    return DAX_POLICIES[text]


SERVE_OPTIONS = (
    Option(
        "--socket", "Listen here for the front end (QEMU, cloud-hypervisor, ...).",
        check_socket, "PATH", required=True, aliases=("--socket-path",),
    ),
    Option(
        "--shared-dir", "Share this directory, or this one regular file.", check_shared_dir, "PATH",
        required=True, o_names=("source",),
    ),
    Option(
        "--tag", "Name the guest mounts, for front ends that ask the daemon for it (user-mode Linux,"
        " crosvm). Leave it out for QEMU, which has its own and of which 7.1 to 8.0 crash on it.",
        check_tag, "NAME",
    ),
    Option(
        "--cache", "What the guest may keep: nothing (never), names and attributes for a second"
        " (auto) or a day (metadata), or everything for a day (always).",
        check_choice(*CACHE_POLICIES, none="never"), "|".join(CACHE_POLICIES), default="auto",
        o_names=("cache",),
    ),
    Option(
        "--timeout", "Seconds that the guest may keep names and attributes, instead of the cache mode's.",
        check_seconds, "SECONDS", o_names=("timeout",),
    ),
    Option(
        "--entry-timeout", "The same for names alone.",
        check_seconds, "SECONDS", o_names=("entry_timeout",),
    ),
    Option(
        "--attr-timeout", "The same for attributes alone.",
        check_seconds, "SECONDS", o_names=("attr_timeout",),
    ),
    Option(
        "--negative-timeout", "Seconds that the guest may go on taking a name for missing: one made"
        " on the host shows up only then. 0 with --cache never and auto, 1 with the others.",
        check_seconds, "SECONDS", o_names=("negative_timeout",),
    ),
    Option(
        "--readdirplus", "Give the attributes of entries together with their names, but for --cache never.",
        on=True, o_names=("readdirplus",),
    ),
    Option(
        "--symlink-cache", "Let the guest keep where a symlink points to for as long as it knows the"
        " symlink: not at all (never), with --cache metadata and always (auto), or in each mode (always)."
        " On a local file system a symlink never changes; on procfs or FUSE it may.",
        check_choice("never", "auto", "always"), "never|auto|always", default="auto",
    ),
    Option(
        "--always-flush", "Have the guest tell each close of a file, also on file systems where"
        " closing reports no error.",
    ),
    Option(
        "--parallel-direct-writes", "Files that several threads of the guest may write to at once past"
        " its cache, a large write then in no fixed order with the others: none (never), those opened"
        " with O_DIRECT (direct), or all (always).",
        check_choice("never", "direct", "always"), "never|direct|always", default="direct",
    ),
    Option(
        "--writeback", "Let the guest keep what is written and write it later. Only for a directory"
        " that nobody else changes or needs at once.", o_names=("writeback",),
    ),
    Option(
        "--allow-direct-io", "Apply the guest's O_DIRECT on the host too, with its rules for alignment;"
        " it only goes past the guest's cache otherwise.", o_names=("allow_direct_io",),
    ),
    Option(
        "--allow-mmap", "Allow shared mappings also where the guest caches no data (--cache never and"
        " metadata; Linux 6.6 and later).", o_names=("allow_mmap",),
    ),
    Option(
        "--zero-message-open", "Let the guest open and close files without a request, for shares that"
        " are mostly read: each write costs more. Only with --cache always and as root, and only where"
        " the share's file system reports nothing at close.",
    ),
    Option(
        "--num-request-queues", "Offer at most this many request queues; the front end sets up as"
        " many as it wants.",
        check_number(1, REQUEST_QUEUES_MAX), "N", default="8",
    ),
    Option(
        "--poll-us", "Poll a busy request queue up to this many microseconds before sleeping; 0 never"
        " polls.",
        check_number(0, POLL_US_MAX), "N", default="100",
    ),
    Option("--xattr", "Pass extended attributes through.", o_names=("xattr",)),
    Option("--readonly", "Let the guest change nothing: whatever would is answered with EROFS."),
    Option(
        "--flock", "Take flock(2) locks on the host, so that they exclude other guests and the host's"
        " processes; otherwise each guest keeps its own.",
        o_names=("flock",),
    ),
    Option(
        "--posix-lock", "The same for record locks (fcntl(2), lockf(3)).", o_names=("posix_lock",),
    ),
    Option(
        "--xattrmap", "Rename, hide or refuse extended attributes by rules as virtiofsd's; turns on --xattr."
        " :map::user.virtiofs.: keeps all of the guest's apart from the host's.",
        parse_map, "RULES", o_names=("xattrmap",),
    ),
    Option(
        "--posix-acl", "Pass POSIX ACLs through: never, if the guest's kernel can (auto), or only to"
        " guests that can (always, or without a value); turns on --xattr.",
        check_choice(*NEGOTIATIONS), "|".join(NEGOTIATIONS), default="never", bare="always",
        o_words={"posix_acl": "always", "no_posix_acl": "never"},
    ),
    Option(
        "--security-label", "Give a new file the security label the guest sends with it; the values"
        " are --posix-acl's; turns on --xattr.",
        check_choice(*NEGOTIATIONS), "|".join(NEGOTIATIONS), default="never", bare="always",
        o_words={"security_label": "always", "no_security_label": "never"},
    ),
    Option(
        "--killpriv-v2", "Take set-id bits and file capabilities away when the guest writes, so that it"
        " need not ask for them before each write.", on=True, o_names=("killpriv_v2",),
    ),
    Option(
        "--uid-map", "Not as root: serve from a user namespace in which COUNT user ids from INSIDE on are"
        " the host's from OUTSIDE on, as /etc/subuid allows. May be repeated.",
        parse_ranges, ":INSIDE:OUTSIDE:COUNT:", multiple=True,
    ),
    Option(
        "--gid-map", "The same for group ids.", parse_ranges, ":INSIDE:OUTSIDE:COUNT:", multiple=True,
    ),
    Option(
        "--translate-uid", "Translate user ids between guest and host: TYPE guest, host, squash-guest,"
        " squash-host or map, or forbid-guest:FROM:COUNT. May be repeated.",
        parse_rules, "TYPE:FROM:TO:COUNT", multiple=True,
    ),
    Option(
        "--translate-gid", "The same for group ids.", parse_rules, "TYPE:FROM:TO:COUNT", multiple=True,
    ),
    Option(
        "--announce-submounts", "Let what is mounted below the shared directory be a mount of its own in"
        " the guest too, with its own st_dev.",
        on=True, o_names=("announce_submounts",),
    ),
    Option(
        "--inode-file-handles", "Bring inodes back, whose descriptors were closed to stay within the budget,"
        " by file handle: where that works (prefer), never, or always, refusing to start where the file"
        " system or a lack of rights does not allow it (mandatory). Else by directory and name.",
        check_choice(*FILE_HANDLES, fallback="prefer"), "|".join(FILE_HANDLES), default="prefer",
    ),
    Option(
        "--fd-budget", "Descriptors that the inodes and open files of all guests may have, each guest an"
        " equal part of them; three quarters of the limit (ulimit -n) unless given.",
        check_number(FD_BUDGET_MIN, FD_BUDGET_MAX), "N",
    ),
    Option(
        "--inband-notifications", "Offer kicks and calls as messages; only user-mode Linux in"
        " time-travel mode needs them, and they are slow.",
    ),
    Option(
        "--dax-window", "Let guests map files into a window of this size (DAX), where the front end"
        " can: QEMU 11.1's vhost-user-test-device-pci, crosvm. Without SIZE: 512M.",
        check_dax_window, "[SIZE]", bare="512M",
    ),
    Option(
        "--dax-policy", "Which files a guest that leaves it to the daemon maps: all, none, those with"
        " the x attribute (chattr), those whose size is a multiple of 2M, or those of that size at least;"
        " all where not given.",
        check_dax_policy, "always|never|inode|whole|size:BYTES",
    ),
    Option(
        "--log-level", "How much to say on stderr.",
        check_choice(*LOG_LEVELS, err="error", warn="warning"), "|".join(LOG_LEVELS), default="info",
        o_names=("loglevel", "log_level"),
    ),
)  # fmt: skip


def check_together(options: ServeOptions) -> None:
    """What can't be combined. ConfigError."""
    if options.dax_policy is not None and options.dax_window is None:
        raise ConfigError("--dax-policy", "there is no window; add --dax-window")
    if options.zero_message_open:
        needs = {
            "--cache always, as the guest keeps all it has read of a file": options.cache == "always",
            "to go without --writeback, which depends on how files were opened": not options.writeback,
            "to go without --readonly, which an open for writing has to be told": not options.readonly,
            "to go without --flock and --posix-lock: locks end with an open file": not (
                options.flock or options.posix_lock
            ),
            "root: a file stays in use when its mode is changed": os.geteuid() == 0,
        }
        for what, given in needs.items():
            if not given:
                raise ConfigError("--zero-message-open", f"needs {what}")
    if options.uid_map or options.gid_map:
        check_allowed(options.uid_map, options.gid_map)
    translated = {options.translate_uid, options.translate_gid} != {IDENTITY}
    if options.posix_acl != "never" and translated:
        raise ConfigError("--posix-acl", "the ids in an ACL can't be translated; leave out --translate-*")


def o_spellings() -> dict[str, tuple[Option, str | bool | None]]:
    """Every word `-o` knows: the option, and the value it stands for (None: one follows after "=")."""
    known: dict[str, tuple[Option, str | bool | None]] = {}
    for option in SERVE_OPTIONS:
        for name in option.o_names:
            known[name] = (option, True if option.check is None else None)
            if option.check is None:
                known[f"no_{name}"] = (option, False)
        known.update({word: (option, value) for word, value in option.o_words.items()})
    return known


def split_o(text: str) -> list[str]:
    """The words of one `-o`: between commas, where two commas are one of the word itself."""
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",") if word]


def read_o(lists: Sequence[str]) -> dict[str, tuple[str, str | bool]]:
    """What `-o` gives, the last word for an option: by Option.key its spelling and value. ConfigError."""
    known = o_spellings()
    given: dict[str, tuple[str, str | bool]] = {}
    for word in (word for text in lists for word in split_o(text)):
        name, equals, value = word.partition("=")
        spelled = f"-o {name}"
        if name not in known:
            raise ConfigError(spelled, f"is unknown; use {', '.join(known)}")
        option, stands_for = known[name]
        if equals and stands_for is not None:
            raise ConfigError(spelled, f"takes no value; leave out {equals + value!r}")
        if not equals and stands_for is None:
            raise ConfigError(spelled, f"needs a value; write {name}={option.metavar}")
        given[option.key] = (spelled, value if stands_for is None else stands_for)
    return given


def check_options(given: dict[str, Any], o_lists: Sequence[str] = ()) -> ServeOptions:
    """Text by Option.key, None where not given, and the texts of `-o`, to checked values. ConfigError.

    An option given by its own name outweighs `-o`.
    """
    in_o = read_o(o_lists)
    values: dict[str, Any] = {}
    for option in SERVE_OPTIONS:
        spelled, text = option.name, given[option.key]
        if text is None and option.key in in_o:
            spelled, text = in_o[option.key]
        if option.check is None:
            values[option.key] = option.on if text is None else text
            continue
        if text is None:
            text = option.default
        if text is None and option.required:
            raise ConfigError(option.name, f"is missing; add {option.name} {option.metavar}")
        values[option.key] = None if text is None else option.check(spelled, text)
    options = ServeOptions(**values)
    check_together(options)
    return options
