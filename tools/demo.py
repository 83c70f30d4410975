"""Shows vfsd at work: shares a sample directory with a real Linux guest and checks a round trip.

Prints what happens step by step. Ends with status 0 only if the guest and this machine computed the
same checksums.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from guests import Daemon, DaemonError, GuestError, UmlGuest
from guests.qemu import device_arguments, machine_arguments

from vfsd.guest import mount

TAG = "demo"
SAMPLE_BYTES = 4 << 20
WRITE_BLOCKS = 2048


def main() -> int:
    """Run the demonstration; the value is the exit status."""
    missing = UmlGuest.missing()
    if missing:
        say(f"No real Linux guest can be had here: {missing}.", "The built-in guest takes its place.")
    directory = Path(tempfile.mkdtemp(prefix="vfsd-demo-"))
    try:
        return demonstrate(directory, with_builtin if missing else with_uml)
    except (DaemonError, GuestError, AssertionError) as error:
        print(f"This did not work: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def demonstrate(directory: Path, guest: Callable[[Daemon, str], bool]) -> int:
    """The steps, on an empty directory."""
    say(f"Making a sample directory to share: {directory}")
    (directory / "hello.txt").write_text("Hello from the host.\n")
    (directory / "random.bin").write_bytes(os.urandom(SAMPLE_BYTES))

    daemon = Daemon(directory, tag=TAG)
    say("Starting the daemon; it is listening:", shlex.join(daemon.argv))
    with daemon:
        right = guest(daemon, checksum(directory / "random.bin"))
    say("The daemon ended on SIGTERM with exit status 0.")
    attach()
    return 0 if right else 1


def with_uml(daemon: Daemon, expected: str) -> bool:
    """A real Linux kernel, as a process, mounts the share. expected: checksum of random.bin."""
    say("Booting a real Linux guest (user-mode Linux) with a virtio-fs device.")
    started = time.monotonic()
    with UmlGuest(daemon.socket, tag=TAG) as guest:
        release = guest.check("uname -r").strip()
        elapsed = time.monotonic() - started
        say(f"Linux {release} is up in the guest after {elapsed:.1f} s; it mounts the share.")
        guest.mount()
        shell(guest, f"mount | grep {guest.share}")
        shell(guest, f"ls -l {guest.share}")
        shell(guest, f"cat {guest.share}/hello.txt")

        say("The guest reads the host's file: checksums on both sides.")
        seen = guest.check(f"sha256sum <{guest.share}/random.bin").split()[0]
        read_right = compare(guest=seen, host=expected)

        say("The guest writes a file: checksums on both sides.")
        copy = f"{guest.share}/from-guest.bin"
        guest.check(f"dd if=/dev/urandom of={copy} bs=4096 count={WRITE_BLOCKS}")
        written = guest.check(f"sha256sum <{copy}").split()[0]
        write_right = compare(guest=written, host=checksum(daemon.shared / "from-guest.bin"))
    say("The guest unmounted the share and powered off.")
    return read_right and write_right


def with_builtin(daemon: Daemon, expected: str) -> bool:
    """The same with vfsd's own guest driver, which needs neither root nor a kernel."""
    say("The built-in guest mounts the share.")
    with mount(daemon.socket) as fs:
        for name in fs.listdir("/"):
            print(f"  {fs.stat(name).st_size:8} {name}")
        print(f"  {fs.read_bytes('hello.txt').decode()}", end="", flush=True)

        say("The guest reads the host's file: checksums on both sides.")
        read_right = compare(guest=hashlib.sha256(fs.read_bytes("random.bin")).hexdigest(), host=expected)

        say("The guest writes a file: checksums on both sides.")
        data = os.urandom(WRITE_BLOCKS * 4096)
        fs.write_bytes("from-guest.bin", data)
        written = checksum(daemon.shared / "from-guest.bin")
        write_right = compare(guest=hashlib.sha256(data).hexdigest(), host=written)
    say("The guest unmounted the share.")
    return read_right and write_right


def say(text: str, detail: str = "") -> None:
    """One step, at once, also into a pipe."""
    print(f"* {text}", *(["  " + detail] if detail else []), sep="\n", flush=True)


def shell(guest: UmlGuest, command: str) -> None:
    """Run a command in the guest and show it with its output."""
    print(f"  guest# {command}")
    for line in guest.check(command).splitlines():
        print(f"  {line}", flush=True)


def compare(*, guest: str, host: str) -> bool:
    """Print both checksums and whether they are equal."""
    print(f"  guest {guest}\n  host  {host}")
    print("  equal" if guest == host else "  DIFFERENT", flush=True)
    return guest == host


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def attach() -> None:
    """How to do the same with a virtual machine."""
    program = Path(sys.executable).parent / "vfsd"
    socket = Path("/tmp/vfsd.sock")
    qemu = [
        f"qemu-system-{platform.machine()}",
        *machine_arguments(1024),
        *device_arguments(socket, TAG),
    ]
    say("To share a directory with a QEMU guest of your own:")
    print(f"  {program} serve --socket {socket} --shared-dir /srv/share")
    print(f"  {shlex.join(qemu)}")
    print("  (with your disk, network and so on added; accel=kvm where there is KVM)")
    print("  then, as root in the guest:")
    print(f"  mount -t virtiofs {TAG} /mnt", flush=True)


if __name__ == "__main__":
    sys.exit(main())
