"""Every option of the daemon, once: names, default, check and help.

A check takes the operator's text and gives the value, or raises ConfigError naming the option.
"""

from __future__ import annotations

from vfsd.hostfs.choices import (
    CACHE_MODES,
    DIRECT_WRITES,
    FILE_HANDLES,
    NEGOTIATIONS,
    SYMLINK_CACHES,
)
from vfsd.options.checks import (
    check_capabilities,
    check_choice,
    check_dax_policy,
    check_dax_window,
    check_group,
    check_id_ranges,
    check_id_rules,
    check_number,
    check_seconds,
    check_shared_dir,
    check_socket,
    check_tag,
    check_xattrmap,
)
from vfsd.sandbox.choices import ACTIONS, MODES

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from vfsd.hostfs.choices import CacheMode, DirectWrites, FileHandles, Negotiation, SymlinkCache
    from vfsd.hostfs.dax import DaxPolicy
    from vfsd.hostfs.ids.idmap import IdMap
    from vfsd.hostfs.ids.xattrmap import Rule
    from vfsd.sandbox.capabilities import Change
    from vfsd.sandbox.choices import Action, Mode
    from vfsd.sandbox.userns import IdRange

REQUEST_QUEUES_MAX = 64
POLL_US_MAX = 1000
FD_BUDGET_MIN = 64
FD_BUDGET_MAX = 1 << 20  # HANDLES_MAX of the tables; Linux's default fs.nr_open
LOG_LEVELS = ("off", "error", "warning", "info", "debug")
LOG_FORMATS = ("text", "json")
THREAD_POOL_MAX = 1024
NOFILE_MAX = 1 << 30  # the largest fs.nr_open


class Option:
    """One option. check None: a flag, off unless given. default None: required, or simply not set.

    on: a flag that is on unless --no-NAME is given.
    bare: the value that the name alone stands for; another one then needs "=".
    multiple: it may be repeated; its check gets all of them.
    o_names: what `-o` calls it; a flag is turned off again by the same name with "no_" before it.
    o_words: whole words of `-o` that stand for a value of an option that is no flag.
    of_process: it is one for all shares of a process.
    """

    def __init__(
        self, name: str, help: str, check: Callable[[str, Any], Any] | None = None, metavar: str = "", *,
        default: str | None = None, required: bool = False, bare: str | None = None,
        aliases: tuple[str, ...] = (), on: bool = False, multiple: bool = False,
        o_names: tuple[str, ...] = (), o_words: Mapping[str, str] | None = None,
        of_process: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.help = help
        self.check = check
        self.metavar = metavar
        self.default = default
        self.required = required
        self.bare = bare
        self.aliases = aliases
        self.on = on
        self.multiple = multiple
        self.o_names = o_names
        self.o_words = o_words or {}
        self.of_process = of_process

    @property
    def key(self) -> str:
        return self.name.lstrip("-").replace("-", "_")


class ServeOptions:
    """The checked values, by Option.key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ServeOptions) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    socket: str | None
    socket_group: int | None
    fd: int | None
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
    preserve_noatime: bool
    allow_mmap: bool
    zero_message_open: bool
    num_request_queues: int
    xattr: bool
    readonly: bool
    xattrmap: tuple[Rule, ...] | None
    posix_acl: Negotiation
    security_label: Negotiation
    killpriv_v2: bool
    sandbox: Mode
    seccomp: Action
    modcaps: tuple[Change, ...] | None
    nodev: bool
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
    thread_pool_size: int
    control_socket: str | None
    stop_timeout: float
    keeper: bool
    rlimit_nofile: int | None
    log_level: str
    log_format: str
    syslog: bool


SERVE_OPTIONS = (
    Option(
        "--socket", "Listen here for the front end (QEMU, cloud-hypervisor, ...).",
        check_socket, "PATH", aliases=("--socket-path",),
    ),
    Option(
        "--socket-group", "Let this group use the socket: its name or number. Only the daemon's user may,"
        " unless given.",
        check_group, "GROUP",
    ),
    Option(
        "--fd", "Instead of --socket: this inherited descriptor is the socket, listening or connected.",
        check_number(0, NOFILE_MAX), "N",
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
        check_choice(*CACHE_MODES, none="never"), "|".join(CACHE_MODES), default="auto",
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
        check_choice(*SYMLINK_CACHES), "|".join(SYMLINK_CACHES), default="auto",
    ),
    Option(
        "--always-flush", "Have the guest tell each close of a file, also on file systems where"
        " closing reports no error.",
    ),
    Option(
        "--parallel-direct-writes", "Files that several threads of the guest may write to at once past"
        " its cache, a large write then in no fixed order with the others: none (never), those opened"
        " with O_DIRECT (direct), or all (always).",
        check_choice(*DIRECT_WRITES), "|".join(DIRECT_WRITES), default="direct",
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
        "--preserve-noatime", "Apply the guest's O_NOATIME on the host too, which only a file's owner may;"
        " reading changes the time of access otherwise.",
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
        check_xattrmap, "RULES", o_names=("xattrmap",),
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
        "--sandbox", "What keeps a guest's server apart from the host: namespaces in which there is nothing"
        " but the share (namespace), the share as its root alone (chroot, as root), or only what works"
        " without either: Landlock, seccomp, dropped capabilities (none).",
        check_choice(*MODES), "|".join(MODES), default="namespace", o_names=("sandbox",),
    ),
    Option(
        "--seccomp", "What becomes of a server that makes a system call it has no need of: it is ended,"
        " and the log says for which (kill), the kernel logs it (log), a debugger sees it (trap); none"
        " allows all.",
        check_choice(*ACTIONS), "|".join(ACTIONS), default="kill",
    ),
    Option(
        "--modcaps", "Capabilities that a server keeps besides those it needs, or loses:"
        " +sys_admin:-mknod. Guests may store what acts on the host only with +sys_admin (trusted.* and"
        " security.* attributes) and +setfcap (file capabilities).",
        check_capabilities, "+NAME:-NAME...", o_names=("modcaps",),
    ),
    Option(
        "--nodev", "Let the guest make no device nodes; neither it nor its server can open one in any case.",
    ),
    Option(
        "--uid-map", "Not as root: serve from a user namespace in which COUNT user ids from INSIDE on are"
        " the host's from OUTSIDE on, as /etc/subuid allows. May be repeated.",
        check_id_ranges, ":INSIDE:OUTSIDE:COUNT:", multiple=True,
    ),
    Option(
        "--gid-map", "The same for group ids.", check_id_ranges, ":INSIDE:OUTSIDE:COUNT:", multiple=True,
    ),
    Option(
        "--translate-uid", "Translate user ids between guest and host: TYPE guest, host, squash-guest,"
        " squash-host or map, or forbid-guest:FROM:COUNT. May be repeated.",
        check_id_rules, "TYPE:FROM:TO:COUNT", multiple=True,
    ),
    Option(
        "--translate-gid", "The same for group ids.", check_id_rules, "TYPE:FROM:TO:COUNT", multiple=True,
    ),
    Option(
        "--announce-submounts", "Let what is mounted below the shared directory be a mount of its own in"
        " the guest too, with its own st_dev.",
        on=True, o_names=("announce_submounts",),
    ),
    Option(
        "--inode-file-handles", "Bring inodes back, whose descriptors were closed to stay within the budget,"
        " by file handle: where that works (prefer), never, or always, refusing to start where the file"
        " system or a lack of rights does not allow it (mandatory). Else by directory and name. A"
        " server that opens handles could open any file of the share's file system.",
        check_choice(*FILE_HANDLES, fallback="prefer"), "|".join(FILE_HANDLES), default="never",
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
        "--dax-policy", "Which files a guest that leaves it to the daemon maps: those its front end can map"
        " (a QEMU without the library of docs/dax.md refuses most), all, none, those with the x attribute"
        " (chattr), those whose size is a multiple of 2M, or those of that size at least; auto where not"
        " given.",
        check_dax_policy, "auto|always|never|inode|whole|size:BYTES",
    ),
    Option(
        "--thread-pool-size", "At most this many threads for each guest's requests that have to wait, for a"
        " disk or so; they come as they are needed. 0: as many as there is use for.",
        check_number(0, THREAD_POOL_MAX), "N", default="0",
    ),
    Option(
        "--control-socket", "Listen here for vfsd ctl, of the daemon's own user and of root.",
        check_socket, "PATH", of_process=True,
    ),
    Option(
        "--stop-timeout", "At SIGTERM, and when a front end leaves, what is still under way has this long to"
        " end; then the guest's server is killed.",
        check_seconds, "SECONDS", default="5",
    ),
    Option(
        "--keeper", "When a guest's server dies, have another one go on with what the guest has open and has"
        " asked for; the guest notices nothing. Not with --dax-window.", on=True,
    ),
    Option(
        "--rlimit-nofile", "The limit of open descriptors (ulimit -n); 0 leaves it alone. As high as"
        " is allowed, up to 1000000, unless given.",
        check_number(0, NOFILE_MAX), "N", of_process=True,
    ),
    Option(
        "--log-level", "How much to say.",
        check_choice(*LOG_LEVELS, err="error", warn="warning", trace="debug"), "|".join(LOG_LEVELS),
        default="info", o_names=("loglevel", "log_level"), o_words={"debug": "debug"},
        of_process=True,
    ),
    Option(
        "--log-format", "What a line of the log is: text, or a JSON object with time, level, logger, pid,"
        " message and, of a bug, traceback. systemd's journal is told the level in both.",
        check_choice(*LOG_FORMATS), "|".join(LOG_FORMATS), default="text", of_process=True,
    ),
    Option("--syslog", "Log to syslog(3) instead of stderr.", of_process=True),
)  # fmt: skip
