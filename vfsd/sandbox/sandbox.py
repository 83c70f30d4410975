"""The walls around a server: the supervisor prepares them, each process forked for a guest enters them."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from errno import ENOSYS, EPERM
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsd.errors import ConfigError, HostError
from vfsd.sandbox import _linux, capabilities, landlock, limits, mounts, seccomp, userns
from vfsd.sandbox.userns import IdRange

if TYPE_CHECKING:
    from vfsd.sandbox.choices import Action, Mode

OWN_NAMESPACES: Final = _linux.CLONE_NEWNS | _linux.CLONE_NEWIPC | _linux.CLONE_NEWNET
PROBLEM_BYTES: Final = 200


class Walls(NamedTuple):
    """What the operator chose.

    capabilities: what is left of root's, by name. file_handles: the share needs open_by_handle_at(2), which
    reaches every file of its file systems: a wall that is then open. labels: the kernel is to give files
    their security labels.
    """

    mode: Mode
    seccomp: Action
    capabilities: frozenset[str]
    file_handles: bool = False
    labels: bool = False
    uids: tuple[IdRange, ...] = ()
    gids: tuple[IdRange, ...] = ()


class Sandbox:
    """Of one share.

    root_fd: readable descriptor of the share; within a server it is another one of the same directory,
    that no way leads out of.
    """

    def __init__(self, walls: Walls, root_fd: int) -> None:
        self.walls = walls
        self._root_fd = root_fd
        self._is_directory = stat.S_ISDIR(os.fstat(root_fd).st_mode)
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._empty = -1  # a directory without a name
        self._user = -1  # the user namespace of all servers
        self._processes = -1  # the supervisor's process namespace
        self.keeps = False  # enter_keeper() is to be had
        self.own_descriptors = -1  # within a server: its /proc/self/fd
        self.labels = -1  # the same of /proc, for thread-self/attr, where security labels are given
        self._proc = -1  # of a keeper: /proc, for each server's self/fd

    def prepare(self, keeper: bool = False) -> None:
        """In the supervisor, which has one thread: open what it needs, and try it. ConfigError.

        keeper: processes are to be forked that enter_keeper(), if that can be had: see `keeps`.
        """
        seccomp.check_available(self.walls.seccomp)
        _linux.open_ahead(os.cpu_count() or 1)
        root = os.geteuid() == 0
        if self.walls.mode == "chroot" and not root:
            raise ConfigError("--sandbox", "only root can have chroot; use namespace or none")
        if self.walls.mode == "chroot" and not self._is_directory:
            self._empty = nameless_directory()
        if self.walls.mode == "namespace":
            self._processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            if not root:
                self._user = userns.make(self.walls.uids, self.walls.gids)
                _linux.adopt_orphans()
        self.keeps = keeper and self._problem_of(keeper=True) is None
        if not self.keeps and (found := self._problem_of(keeper=False)) is not None:
            error, problem = found
            raise HostError(
                "--sandbox", f"{self.walls.mode} is not to be had here ({problem}); {self._remedy(error)}"
            )

    def fork(self) -> int:
        """As os.fork(): 0 in the child, which calls enter(). OSError."""
        if self.walls.mode != "namespace":
            return os.fork()
        if self._user >= 0:
            return self._fork_in_user_namespace()
        _linux.unshare(_linux.CLONE_NEWPID)
        try:
            pid = os.fork()
        except OSError:
            pid = -1
            raise
        finally:
            if pid != 0:
                _linux.setns(self._processes, _linux.CLONE_NEWPID)
        return pid

    def enter(self, keep: Collection[int], report: tuple[int, bytes] | None = None) -> None:
        """In the forked process, before it has other threads. OSError.

        keep: descriptors that it needs besides the share's; all others are /dev/null from now on.
        report: as for seccomp.tell_by().
        """
        self._enter_all_but_filters(keep, keeper=False)
        seccomp.tell_by(self.walls.seccomp, report)
        self._enter_filters()

    def enter_keeper(self, keep: Collection[int], report: tuple[int, bytes] | None) -> None:
        """The same in a process that forks a server and waits for it. OSError."""
        self._enter_all_but_filters(keep, keeper=True)
        seccomp.tell_by(self.walls.seccomp, report)
        seccomp.enter(self.walls.seccomp, self.walls.file_handles, keeper=True)

    def enter_server(self) -> None:
        """What is left to be entered in a server that a keeper has forked. OSError."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self.own_descriptors = os.open("self/fd", flags, dir_fd=self._proc)
        self._enter_filters()

    def open_descriptors(self) -> set[int]:
        """Of this process, which has entered it."""
        return limits.held(self.own_descriptors)

    def fdinfo(self, fd: int) -> str:
        """/proc/self/fdinfo of that descriptor, in a forked server before enter_server(). OSError."""
        info = os.open(f"self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        with open(info) as file:
            return file.read()

    def _enter_all_but_filters(self, keep: Collection[int], keeper: bool) -> None:
        self._enter_root(keeper)
        ours = {self._root_fd, self.own_descriptors, self.labels, self._proc}
        limits.plug({*keep, *ours}, self.own_descriptors, self._null)
        with suppress(PermissionError):  # a user namespace of one group keeps what its maker had
            os.setgroups([])
        limits.restrict()
        capabilities.drop(self.walls.capabilities)
        _linux.forbid_new_privileges()

    def _enter_filters(self) -> None:
        if not self.walls.file_handles:  # what they open has no path
            self._enter_landlock()
        seccomp.enter(self.walls.seccomp, self.walls.file_handles)

    def close(self) -> None:
        for fd in (self._null, self._empty, self._user, self._processes):
            if fd >= 0:
                os.close(fd)
        self._null = self._empty = self._user = self._processes = -1

    def _fork_in_user_namespace(self) -> int:
        """By way of a process that ends at once: no way leads back out of a user namespace."""
        told, tell = os.pipe()
        wait, go = os.pipe()
        between = os.fork()
        if between == 0:
            try:
                _linux.setns(self._user, _linux.CLONE_NEWUSER)
                userns.become_root(self.walls.uids, self.walls.gids)
                _linux.unshare(_linux.CLONE_NEWPID)
                server = os.fork()
                if server:
                    os.write(tell, str(server).encode())
            except OSError as problem:
                os.write(tell, str(-(problem.errno or EPERM)).encode())
                server = -1
            if server:
                os._exit(0)
            for fd in (told, tell, go):
                os.close(fd)
            os.read(wait, 1)  # until it is the supervisor's child
            os.close(wait)
            return 0
        os.close(tell)
        os.close(wait)
        with open(told, "rb") as said, open(go, "wb", buffering=0) as start:
            os.waitpid(between, 0)
            answer = int(said.read(16) or -EPERM)
            if answer < 0:
                raise OSError(-answer, os.strerror(-answer))
            start.write(b"1")
        return answer

    def _enter_root(self, keeper: bool) -> None:
        fresh = True
        if self.walls.mode == "namespace":
            if self._is_directory:
                os.fchdir(self._root_fd)
            _linux.unshare(OWN_NAMESPACES)
            _linux.receive_mounts_only()
            fresh = mounts.hide_proc()
        self.own_descriptors = mounts.apart(mounts.OWN_DESCRIPTORS)
        if self.walls.labels and fresh:
            self.labels = mounts.apart(mounts.PROC)
        if keeper:
            self._proc = self._open_proc(fresh and self.walls.mode == "namespace")
        if self.walls.mode == "namespace" and self._is_directory:
            mounts.enter_directory()
        elif self.walls.mode == "namespace":
            mounts.enter_nothing()
        elif self.walls.mode == "chroot":
            os.fchdir(self._root_fd if self._is_directory else self._empty)
            os.chroot(".")
        if self._is_directory and self.walls.mode != "none":
            root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.dup2(root, self._root_fd, inheritable=False)
            os.close(root)

    def _open_proc(self, covered: bool) -> int:
        """/proc for a keeper's servers. OSError where they could open more of it than processes.

        covered: what is mounted on /proc has those alone.
        """
        if covered:
            return mounts.apart(mounts.PROC)
        try:
            return mounts.processes_alone()
        except OSError:
            if self.walls.file_handles or not landlock.available():
                raise
        return mounts.apart(mounts.PROC)  # nothing there can be opened beneath the share

    def _enter_landlock(self) -> None:
        beneath = [self._root_fd]
        if self.labels >= 0:
            beneath.append(os.open("self/task", os.O_PATH | os.O_CLOEXEC, dir_fd=self.labels))
        landlock.enter(beneath)

    def _problem_of(self, keeper: bool) -> tuple[int, str] | None:
        """Enter it in a process that ends then. What went wrong: an errno, and words for it."""
        told, tell = os.pipe()
        try:
            pid = self.fork()
            if pid == 0:
                status = 1
                try:
                    self._enter_for_trial({tell}, keeper)
                    status = 0
                except OSError as error:
                    status = error.errno or status
                    os.write(tell, (error.strerror or str(error)).encode()[:PROBLEM_BYTES])
                finally:
                    os._exit(status)
            os.close(tell)
            tell = -1
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            problem = os.read(told, PROBLEM_BYTES).decode()
        except OSError as error:
            status, problem = 1, error.strerror or str(error)
        finally:
            os.close(told)
            if tell >= 0:
                os.close(tell)
        return None if status == 0 else (status, problem)

    def _enter_for_trial(self, keep: Collection[int], keeper: bool) -> None:
        if keeper:
            self.enter_keeper(keep, None)
            self.enter_server()
        else:
            self.enter(keep)

    def _remedy(self, error: int) -> str:
        if self.walls.mode == "none":
            return "use --seccomp none, or a newer kernel"
        if self.walls.mode == "chroot":
            return "start it with CAP_SYS_CHROOT, or use none"
        if error == ENOSYS:  # mount_setattr(2)
            return f"use Linux 5.12 or newer, {'' if self._user >= 0 else 'chroot '}or none"
        if self._user >= 0:
            return "allow user namespaces (user.max_user_namespaces, AppArmor), or use none"
        return "start it with CAP_SYS_ADMIN, or use chroot or none"


def nameless_directory() -> int:
    """A descriptor of an empty directory in which nothing can be made."""
    import tempfile

    path = tempfile.mkdtemp()
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.rmdir(path)
