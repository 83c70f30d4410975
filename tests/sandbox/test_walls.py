"""Code in a server, started there after it has entered its sandbox, reaches the share and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsd.sandbox import landlock

ATTEMPTS = Path(__file__).with_name("attempts.py")
ROOT = os.geteuid() == 0
USER = 1234

# What leads out by a path, from a share that is a directory. `open_a_device_node` needs a right to make one.
PATHS = {
    "open_a_path",
    "open_the_password_file",
    "climb_from_the_share",
    "climb_from_proc",
    "open_the_rest_of_proc",
    "climb_from_a_subdirectory",
    "follow_an_absolute_symlink",
    "follow_a_relative_symlink",
    "follow_a_symlink_to_proc",
    "use_an_inherited_directory",
    "reopen_an_inherited_directory",
    "rename_out",
    "link_in",
    "make_outside",
    "remove_outside",
    "open_a_device_node",
    "open_by_handle",
}
DEVICES = {"open_a_device_node"}  # nodev is for a mount of one's own
# What a process namespace, a network namespace and the lack of capabilities refuse without seccomp.
BY_NAMESPACES = {
    "signal_the_supervisor",
    "signal_a_thread_of_the_supervisor",
    "trace_the_supervisor",
    "name_the_supervisor",
    "read_the_supervisors_memory",
    "reach_the_hosts_network",
    "reach_an_abstract_socket",
    "mount_a_file_system",
    "open_a_mount_of_its_own",
    "unmount_the_share",
    "copy_a_mount",
    "pivot",
    "leave_the_root",
    "make_a_mount_namespace",
    "take_back_a_capability",
    "run_a_program",
    "run_a_program_of_the_share",
}
# A library might: it is told that it can't.
SOFT = {
    "start_a_process_by_clone3",
    "map_code",
    "become_dumpable",
    "take_back_a_capability",
    "type_into_a_terminal",
    "make_an_unknown_call",
}
NEEDED = {"start_a_thread"}

Outcomes = dict[str, str]


@pytest.fixture
def base() -> Iterator[Path]:
    """`share`, and `outside` beside it, where everybody may do anything."""
    with tempfile.TemporaryDirectory(prefix="vfsd-sandbox-") as name:
        path = Path(name)
        for directory in (path, path / "share", path / "share/sub", path / "outside"):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o777)
        (path / "outside/secret").write_text("secret")
        (path / "share/file").write_text("file")
        (path / "share/program").write_bytes(Path("/bin/true").read_bytes())
        (path / "share/absolute").symlink_to(path / "outside/secret")
        (path / "share/relative").symlink_to("../outside/secret")
        (path / "share/magic").symlink_to(f"/proc/self/root{path}/outside/secret")
        for file in ("outside/secret", "share/file", "share/program"):
            (path / file).chmod(0o777)
        yield path


def attempts(
    base: Path, mode: str, seccomp: str, *features: str, user: bool = False, share: str = "share"
) -> Outcomes:
    before = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--"] if user else []
    done = subprocess.run(
        [*before, sys.executable, ATTEMPTS, mode, seccomp, base / share, base / "outside", *features],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes: Outcomes = json.loads(done.stdout)
    assert (base / "outside/secret").read_text() == "secret"
    assert os.listdir(base / "outside") == ["secret"]
    return outcomes


def done(outcomes: Outcomes) -> set[str]:
    return {name for name, outcome in outcomes.items() if outcome.startswith("done")}


users = pytest.mark.parametrize(
    "user",
    [
        pytest.param(False, marks=pytest.mark.skipif(not ROOT, reason="only root can be root")),
        pytest.param(ROOT, id="user"),
    ],
)


@users
@pytest.mark.parametrize("share", ["share", "share/file"])
def test_nothing_is_reached_in_the_default_sandbox(base: Path, user: bool, share: str) -> None:
    outcomes = attempts(base, "namespace", "kill", user=user, share=share)
    assert done(outcomes) == NEEDED, outcomes
    assert "not entered" not in outcomes.values()
    killed = {name for name, outcome in outcomes.items() if outcome.startswith(signal.SIGSYS.name)}
    assert killed == outcomes.keys() - PATHS - SOFT - NEEDED | {"open_by_handle"}, outcomes


@users
def test_the_supervisor_learns_which_call_was_refused(base: Path, user: bool) -> None:
    from vfsd.sandbox.seccomp import name_of

    outcomes = attempts(base, "namespace", "kill", user=user)
    for attempt, call in (("open_a_socket", "socket"), ("run_a_program", "execve"), ("pivot", "pivot_root")):
        signal_name, number = outcomes[attempt].split()
        assert (signal_name, name_of(int(number))) == ("SIGSYS", f"{call}(2)")


@users
def test_namespaces_hold_without_seccomp(base: Path, user: bool) -> None:
    outcomes = attempts(base, "namespace", "none", user=user)
    assert not done(outcomes) & (PATHS | BY_NAMESPACES), outcomes


@users
@pytest.mark.parametrize("mode", ["namespace", "chroot"])
def test_the_root_holds_without_landlock(base: Path, user: bool, mode: str) -> None:
    """With file handles there is none, and root reaches what lies on the same file system by them."""
    if user and mode == "chroot":
        pytest.skip("only root can chroot")
    reached = done(attempts(base, mode, "none", "handles", user=user)) & PATHS
    assert reached <= {"open_by_handle"} | (DEVICES if mode == "chroot" else set())


@pytest.mark.skipif(not ROOT, reason="only root can chroot")
@pytest.mark.parametrize("share", ["share", "share/file"])
def test_a_chroot_holds_for_paths(base: Path, share: str) -> None:
    assert not done(attempts(base, "chroot", "none", share=share)) & (PATHS - DEVICES)
    outcomes = attempts(base, "chroot", "kill", share=share)
    assert done(outcomes) - DEVICES == NEEDED, outcomes


@users
@pytest.mark.skipif(not landlock.available(), reason="this kernel has no Landlock")
@pytest.mark.parametrize("share", ["share", "share/file"])
def test_landlock_holds_for_paths_without_any_sandbox(base: Path, user: bool, share: str) -> None:
    assert not done(attempts(base, "none", "none", user=user, share=share)) & (PATHS - DEVICES)
    outcomes = attempts(base, "none", "kill", user=user, share=share)
    assert done(outcomes) - DEVICES == NEEDED, outcomes
