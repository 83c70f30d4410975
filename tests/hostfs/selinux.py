"""Where SELinux rules, vfsd has it label what a guest makes: nothing is changed afterwards. Prints JSON.

A program for a machine that has SELinux and no policy: a guest of tests/linux. It loads one.
"""

import json
import os
import subprocess
from pathlib import Path

from fuse.fixtures import guests_of
from fuse.ops import LINUX_FLAGS
from fuse.wire import ROOT
from guests import Daemon

from .test_identity import GROUP, MAKERS, USER, context_ext
from .test_labels import IN_ATTRIB, Events

LABEL = "security.selinux"
SHARE = Path("/tmp/share")


def load_policy() -> None:
    for kind, at in (("sysfs", "/sys"), ("selinuxfs", "/sys/fs/selinux")):
        if not os.path.ismount(at):
            subprocess.run(["mount", "-t", kind, kind, at], check=True)
    policy = Path(__file__).with_suffix(".policy").read_bytes()
    fd = os.open("/sys/fs/selinux/load", os.O_WRONLY)
    assert os.write(fd, policy) == len(policy)
    os.close(fd)


def context(kind: str) -> bytes:
    return context_ext((LABEL.encode(), f"u:object_r:{kind}\0".encode()))


def main() -> None:
    load_policy()
    SHARE.mkdir(mode=0o777)
    subprocess.run(["mount", "-t", "tmpfs", "none", SHARE], check=True)
    SHARE.chmod(0o777)
    labels, nameless = {}, []
    daemon = Daemon(SHARE, options=("--posix-acl", "--security-label"))
    with daemon, guests_of(daemon) as start:
        guest = start()
        guest.init(flags=LINUX_FLAGS)
        events = Events(SHARE)
        for kind in ("one_t", "two_t"):
            for op, make in MAKERS.items():
                make(guest)(ROOT, f"{op} {kind}".encode(), uid=USER, gid=GROUP, ext=context(kind))
            entry, fh = guest.tmpfile(ROOT, ext=context(kind))
            nameless.append(guest.getxattr(entry.nodeid, LABEL.encode()).decode())
            guest.release(entry.nodeid, fh)
        for op, make in MAKERS.items():
            make(guest)(ROOT, f"{op} later".encode())
        for path in SHARE.iterdir():
            labels[path.name] = os.getxattr(path, LABEL, follow_symlinks=False).decode()
        changed = [name.decode() for mask, name in events.take() if mask & IN_ATTRIB]
    print(json.dumps({"labels": labels, "nameless": nameless, "changed": changed}))


if __name__ == "__main__":
    main()
