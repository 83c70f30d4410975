"""What AppArmor or SELinux let a process do less than its user."""

import re
from pathlib import Path
from typing import NamedTuple

APPARMOR = re.compile(r"(.+) \((\w+)\)")
SELINUX = Path("/sys/fs/selinux")
LOOK = "what is denied: dmesg | grep DENIED (AppArmor), ausearch -m avc -ts recent (SELinux)"


class Confinement(NamedTuple):
    """label: the profile, or the context. enforced: not only told of in the log."""

    module: str
    label: str
    enforced: bool

    def __str__(self) -> str:
        return f"{self.module} {'confines it by' if self.enforced else 'would confine it by'} {self.label}"


def confinements(process: Path, selinux: Path = SELINUX) -> list[Confinement]:
    """Of a folder of /proc. selinux: where selinuxfs is, if anywhere."""
    found = []
    match = APPARMOR.fullmatch(read_or_empty(process / "attr/apparmor/current"))
    if match and match[2] != "unconfined":
        found.append(Confinement("AppArmor", match[1], match[2] != "complain"))
    # Another module, as Smack, has other words there.
    context = read_or_empty(process / "attr/current")
    domain = context.split(":")[2] if context.count(":") >= 3 else ""
    if selinux.exists() and domain and not domain.startswith("unconfined"):
        enforce = read_or_empty(selinux / "enforce")
        found.append(Confinement("SELinux", context, enforce != "0"))
    return found


def enforces(selinux: Path = SELINUX) -> bool:
    return read_or_empty(selinux / "enforce") == "1"


def read_or_empty(path: Path) -> str:
    try:
        return path.read_text().strip(" \n\0")
    except OSError:
        return ""
