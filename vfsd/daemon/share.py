"""One shared directory, as the operator's options describe it. Servers inherit it when they are forked."""

import importlib
import logging
import os
import stat
from errno import EINVAL
from typing import NamedTuple

from vfsd._dax import load_numpy
from vfsd.daemon.process import guest_descriptors
from vfsd.errors import HostError
from vfsd.fuse.opcodes import OPERATIONS
from vfsd.hostfs.cache import CACHE_POLICIES, CachePolicy
from vfsd.hostfs.dax import AUTO
from vfsd.hostfs.fs import Policy
from vfsd.hostfs.identity import IdentityPolicy, check_rights, has_selinux
from vfsd.hostfs.ids.idmap import IDENTITY
from vfsd.hostfs.lock._locks import Locks
from vfsd.hostfs.table._tables import file_handles_work
from vfsd.options.table import ServeOptions
from vfsd.sandbox import capabilities
from vfsd.sandbox.sandbox import Sandbox, Walls

log = logging.getLogger("vfsd")

OFFLOAD_THREADS = 128  # unless the operator says; they come only as requests block


class ShareSettings(NamedTuple):
    """What does not change while the share is served.

    tag: None leaves the config space, and so the tag, to the front end.
    dax_window: bytes, 0 for none.
    fd_budget: descriptors that a guest's inodes and open files together may have.
    poll_us: the longest a request queue polls before it sleeps.
    offload_threads: how many of a guest's requests may wait at once, each on a thread.
    stop_timeout_s: until a server is killed that is to end.
    keeper: whether another server follows one that dies.
    """

    path: str
    policy: Policy
    walls: Walls
    tag: bytes | None
    num_request_queues: int
    inband: bool
    fd_budget: int
    poll_us: int
    offload_threads: int
    stop_timeout_s: float
    dax_window: int = 0
    keeper: bool = False


class Share:
    """A directory, or one regular file, to serve. OSError when it can't be opened."""

    def __init__(self, settings: ShareSettings) -> None:
        self.settings = settings
        self.root_fd = open_root(settings.path)
        self.locks = Locks()
        self.sandbox = Sandbox(settings.walls, self.root_fd)

    def prepare(self) -> None:
        """Before the first fork: everything a server would import or open by path. ConfigError."""
        if self.settings.dax_window:
            load_numpy()
        for module in {op.module for op in OPERATIONS}:
            importlib.import_module(f"vfsd.{module}")
        self.sandbox.prepare(self.settings.keeper)
        if self.settings.keeper and not self.sandbox.keeps:
            self.settings = self.settings._replace(keeper=False)
            log.warning("a server that dies is not followed by another one: the host lets it have no /proc of"
                        " its own, and Landlock is missing or off (--inode-file-handles)")  # fmt: skip

    def close(self) -> None:
        self.sandbox.close()
        self.locks.close()
        os.close(self.root_fd)


def open_root(path: str) -> int:
    """A readable descriptor of a directory or regular file. OSError, EINVAL for what is neither.

    Anything else is not opened at all: that might act on a device.
    """
    anchor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(anchor).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise OSError(EINVAL, "it is neither a directory nor a regular file", path)
        return os.open(f"/proc/self/fd/{anchor}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(anchor)


def open_share(options: ServeOptions) -> Share:
    check_rights()
    settings = ShareSettings(
        path=options.shared_dir,
        policy=policy_of(options),
        walls=walls_of(options),
        tag=options.tag,
        num_request_queues=options.num_request_queues,
        inband=options.inband_notifications,
        fd_budget=guest_descriptors(options.fd_budget),
        poll_us=options.poll_us,
        offload_threads=options.thread_pool_size or OFFLOAD_THREADS,
        stop_timeout_s=options.stop_timeout,
        dax_window=options.dax_window or 0,
        keeper=options.keeper and not options.dax_window,
    )
    try:
        share = Share(settings)
    except OSError as problem:
        raise HostError(
            "--shared-dir", f"{options.shared_dir} can't be opened ({problem.strerror}); share another"
        ) from problem
    if options.inode_file_handles == "mandatory" and not file_handles_work(share.root_fd):
        share.close()
        raise HostError(
            "--inode-file-handles", f"file handles can't be opened in {options.shared_dir}; prefer them,"
            " run as root, or share a directory of a file system that has them",
        )  # fmt: skip
    return share


def walls_of(options: ServeOptions) -> Walls:
    handles = options.inode_file_handles != "never"
    return Walls(
        mode=options.sandbox,
        seccomp=options.seccomp,
        capabilities=capabilities.kept(
            options.modcaps or (), device_nodes=not options.nodev, file_handles=handles
        ),
        file_handles=handles,
        labels=options.security_label != "never" and has_selinux(),
        uids=options.uid_map,
        gids=options.gid_map,
    )


def cache_policy(options: ServeOptions) -> CachePolicy:
    """The cache mode's, but for what is said in particular."""
    policy = CACHE_POLICIES[options.cache].with_timeouts(options.timeout, options.timeout, None)
    policy = policy.with_timeouts(options.entry_timeout, options.attr_timeout, options.negative_timeout)
    return policy._replace(
        readdirplus=policy.readdirplus and options.readdirplus,
        symlinks=policy.symlinks if options.symlink_cache == "auto" else options.symlink_cache == "always",
    )


def policy_of(options: ServeOptions) -> Policy:
    negotiated = {options.posix_acl, options.security_label} != {"never"}
    return Policy(
        cache=cache_policy(options),
        xattr=options.xattr or negotiated or options.xattrmap is not None,
        # The kernel makes those of another user count in that user's namespaces only, if it takes them.
        file_capabilities=os.geteuid() != 0 or ("setfcap", True) in (options.modcaps or ()),
        noflush=not options.always_flush,
        parallel_writes=options.parallel_direct_writes,
        writeback=options.writeback,
        direct_io=options.allow_direct_io,
        noatime=options.preserve_noatime,
        mmap=options.allow_mmap,
        readonly=options.readonly,
        zero_open=options.zero_message_open,
        dax=None if options.dax_window is None else options.dax_policy or AUTO,
        flock=options.flock,
        posix_lock=options.posix_lock,
        submounts=options.announce_submounts,
        file_handles=options.inode_file_handles != "never",
        identity=IdentityPolicy(
            posix_acl=options.posix_acl,
            security_label=options.security_label,
            killpriv_v2=options.killpriv_v2,
            uids=options.translate_uid or IDENTITY,
            gids=options.translate_gid or IDENTITY,
            xattr_rules=options.xattrmap or (),
        ),
    )
