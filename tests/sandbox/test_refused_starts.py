"""Walls that a host can't or may not give: one line says what to do, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from answering import answering
from fuse.fixtures import guests_of
from guests import Daemon

USER = 1234
ROOT = os.geteuid() == 0
SERVE = [sys.executable, "-m", "vfsd", "serve", "--socket"]
VIRTIOFSD = [str(Path(sys.executable).parent / "vfsd-virtiofsd"), "--socket-path"]
# Who has no newuidmap(1) and is not root.
SETPRIV = shutil.which("setpriv") or "setpriv"
AS_USER = [SETPRIV, "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--"] if ROOT else []
WITHOUT_UIDMAP = ["env", "PATH=/nonexistent", *AS_USER]
OWN_ID = USER if ROOT else os.geteuid()
OWN_GROUP = USER if ROOT else os.getegid()
MANY_UIDS = [f"--uid-map=:0:{OWN_ID}:1:", "--uid-map=:1:900000:1000:"]
MANY_GIDS = [f"--gid-map=:0:{OWN_GROUP}:1:", "--gid-map=:1:900000:1000:"]

# A user namespace without further ones, as one that is not its root.
NO_NAMESPACES = [
    "unshare", "--user", f"--map-user={USER}", f"--map-group={USER}", "--keep-caps",
    "sh", "-c", 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"', "sh",
    "setpriv", "--ambient-caps=-all", "--inh-caps=-all", "--",
]  # fmt: skip

needs_root = pytest.mark.skipif(not ROOT, reason="starts as root")


@pytest.fixture
def share() -> Iterator[Path]:
    """A directory that every user may reach and write to, alone in another one."""
    with tempfile.TemporaryDirectory(prefix="vfsd-refused-") as name:
        base = Path(name)
        (base / "share").mkdir()
        for path in (base, base / "share"):
            path.chmod(0o777)
        yield base / "share"


def refusal(
    share: Path, *arguments: str, before: Sequence[str] = (), program: Sequence[str] = SERVE, status: int = 2
) -> str:
    """What it says."""
    # A group of its own, in which nobody is left.
    with subprocess.Popen(
        [*before, *program, str(share.parent / "v"), "--shared-dir", str(share), *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == status, said
    assert said.count("\n") == 1 and "Traceback" not in said, said
    assert sorted(os.listdir(share.parent)) == ["share"] and os.listdir(share) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return said


def works(share: Path, *options: str, before: Sequence[str] = (), owner: int = -1) -> None:
    """It serves a guest."""
    daemon = Daemon(share, options=options, before=before, owner=owner)
    with daemon, guests_of(daemon) as start:
        guest = start()
        guest.init()
        guest.mkdir(1, b"made")
    assert os.listdir(share) == ["made"]


# ---- rights


@needs_root
def test_root_that_may_make_no_namespaces(share: Path) -> None:
    said = refusal(share, before=["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])
    assert "--sandbox: namespace is not to be had here" in said and "CAP_SYS_ADMIN" in said


@needs_root
def test_root_that_may_not_chroot(share: Path) -> None:
    before = ["setpriv", "--bounding-set", "-sys_chroot", "--inh-caps", "-sys_chroot"]
    assert "CAP_SYS_CHROOT" in refusal(share, "--sandbox=chroot", before=before)


def test_what_can_not_be_combined(share: Path) -> None:
    assert "--modcaps: 'sys_admin'" in refusal(share, "--modcaps=sys_admin")
    assert "--modcaps: -setuid" in refusal(share, "--modcaps=-setuid")
    assert "--sandbox" in refusal(share, "--sandbox=jail")
    assert "--seccomp" in refusal(share, "--seccomp=maybe")


# ---- user namespaces


@pytest.mark.parametrize(
    ("option", "tool", "maps"),
    [("--uid-map", "newuidmap", MANY_UIDS), ("--gid-map", "newgidmap", MANY_GIDS)],
)
@pytest.mark.parametrize(("program", "status"), [(SERVE, 2), (VIRTIOFSD, 1)], ids=["serve", "virtiofsd"])
def test_many_ids_without_newuidmap(
    share: Path, option: str, tool: str, maps: list[str], program: list[str], status: int
) -> None:
    said = refusal(share, *maps, before=WITHOUT_UIDMAP, program=program, status=status)
    assert f"{option}: there is no {tool}; install it" in said


def test_an_own_id_needs_no_newuidmap(share: Path) -> None:
    maps = [f"--uid-map=:0:{OWN_ID}:1:", f"--gid-map=:0:{OWN_GROUP}:1:"]
    works(share, *maps, before=WITHOUT_UIDMAP, owner=OWN_ID)


@pytest.fixture
def no_namespaces() -> list[str]:
    """Before a command: it may make no user namespace."""
    tried = subprocess.run([*NO_NAMESPACES, "true"], capture_output=True, text=True, timeout=30)
    if tried.returncode:
        pytest.skip(f"no user namespace to forbid them in: {tried.stderr}")
    return NO_NAMESPACES


@pytest.mark.parametrize(("program", "status"), [(SERVE, 2), (VIRTIOFSD, 1)], ids=["serve", "virtiofsd"])
def test_user_namespaces_are_forbidden(
    share: Path, no_namespaces: list[str], program: list[str], status: int
) -> None:
    said = refusal(share, before=no_namespaces, program=program, status=status)
    assert "--sandbox: the host allows no user namespace" in said
    assert "user.max_user_namespaces" in said and "or use none" in said


def test_without_user_namespaces_the_remedy_works(share: Path, no_namespaces: list[str]) -> None:
    works(share, "--sandbox=none", before=no_namespaces)


# ---- what an older kernel, or a container, has not


@pytest.mark.parametrize("action", ["kill", "trap", "log"])
@pytest.mark.parametrize("problem", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
def test_a_kernel_without_seccomp(share: Path, action: str, problem: int) -> None:
    said = refusal(share, "--seccomp", action, before=answering(seccomp=problem))
    assert f"--seccomp: this kernel can't {action}; use --seccomp none" in said


def test_virtiofsd_on_a_kernel_without_seccomp(share: Path) -> None:
    assert "--seccomp" in refusal(share, before=answering(seccomp=errno.ENOSYS), program=VIRTIOFSD, status=1)


def test_without_seccomp_the_remedy_works(share: Path) -> None:
    works(share, "--seccomp=none", before=answering(seccomp=errno.ENOSYS))


@pytest.mark.parametrize("problem", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_kernel_without_landlock_does_without(share: Path, problem: int) -> None:
    """One that is too old, one that has it switched off, a container that does not know it."""
    works(share, before=answering(landlock_create_ruleset=problem))


@needs_root
def test_a_kernel_that_can_not_restrict_mounts(share: Path) -> None:
    """Before Linux 5.12."""
    before = answering(mount_setattr=errno.ENOSYS)
    said = refusal(share, before=before)
    assert "mount_setattr(2): Function not implemented" in said
    assert "use Linux 5.12 or newer, chroot or none" in said
    works(share, "--sandbox=chroot", before=before)


@needs_root
@pytest.mark.parametrize(
    "call", ["unshare", "mount", "open_tree", "move_mount", "mount_setattr", "pivot_root", "umount2"]
)
def test_a_container_that_refuses_a_step_to_the_namespace(share: Path, call: str) -> None:
    said = refusal(share, before=answering(**{call: errno.EPERM}))
    assert f"--sandbox: namespace is not to be had here ({call}(2): Operation not permitted)" in said
    assert "CAP_SYS_ADMIN, or use chroot or none" in said
