"""The command lines that launchers give virtiofsd, how they learn that it is there, and how they end it.

Taken from the launchers' sources; the file is named with each.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

# How the launcher knows that the daemon listens: it has handed the listening socket over and connects at
# once; by a line on stderr; by the socket, or the pid file beside it, that appears.
Ready = Literal["handed", "line", "socket", "pidfile"]
# How it ends: by itself, when the front end leaves; SIGTERM to its process group; SIGKILL to its process.
End = Literal["leave", "term", "kill"]


class Launcher(NamedTuple):
    """words: {dir} is the shared directory, {sock} the socket's path, {fd} the number of the listening
    socket, {group} a group of the user. order: whose order of messages the front end has. local: started
    in the shared directory ("dir") or the socket's ("sock"). environment: all there is of it."""

    words: str
    ready: Ready
    end: End
    fd: int = 30
    order: str = "qemu"
    local: Literal["", "dir", "sock"] = ""
    environment: Mapping[str, str] | None = None


LAUNCHERS = {
    # libvirt/libvirt src/qemu/qemu_virtiofs.c; with separate-options
    "libvirt-separate": Launcher(
        "--fd={fd} --shared-dir {dir} --cache always --sandbox namespace --xattr --thread-pool-size=16"
        " --rlimit-nofile=4096 --log-level debug",
        "handed", "term", 21,
    ),
    "libvirt-separate-readonly": Launcher(
        "--fd={fd} --shared-dir {dir} --cache never --sandbox chroot --readonly --thread-pool-size=0",
        "handed", "term", 21,
    ),
    # the same without it, as 9.0 always has it
    "libvirt": Launcher(
        "--fd={fd} -o source={dir},cache=always,sandbox=namespace,xattr,no_flock,no_posix_lock"
        " --thread-pool-size=16 -d",
        "handed", "term",
    ),
    "libvirt-plain": Launcher("--fd={fd} -o source={dir}", "handed", "term"),
    "libvirt-lock": Launcher("--fd={fd} -o source={dir},cache=none,flock,posix_lock", "handed", "term"),
    "libvirt-comma": Launcher("--fd={fd} -o source={dir}/a,,b,cache=always", "handed", "term"),
    # kata-containers/kata-containers src/runtime/virtcontainers/virtiofsd.go
    "kata-go": Launcher(
        "--syslog --cache=auto --shared-dir={dir} --fd={fd} --inode-file-handles=prefer"
        " --thread-pool-size=1 --announce-submounts",
        "handed", "kill", 3,
    ),
    "kata-go-2": Launcher(
        "--syslog -o no_posix_lock --cache=auto --shared-dir={dir} --fd={fd} --thread-pool-size=1"
        " -o announce_submounts",
        "handed", "kill", 3,
    ),
    # kata-containers/kata-containers, below src/runtime-rs/crates/resource/src:
    # share_fs/share_virtio_fs_standalone.rs
    "kata-rust": Launcher(
        "--socket-path {sock} --shared-dir {dir} --cache auto --sandbox none --seccomp none"
        " --inode-file-handles prefer --thread-pool-size=1 --announce-submounts --xattr",
        "line", "kill", order="cloud-hypervisor",
    ),
    "kata-rust-rootless": Launcher(
        "--socket-path virtiofsd.sock --shared-dir {dir} --cache never --sandbox none --seccomp none"
        " --inode-file-handles=never",
        "line", "kill", local="sock",
    ),
    # proxmox/qemu-server PVE/QemuServer/Virtiofs.pm: it keeps no pid
    "proxmox": Launcher(
        "--fd={fd} --shared-dir={dir} --xattr --posix-acl --announce-submounts --allow-direct-io"
        " --cache=auto --writeback --syslog",
        "handed", "leave",
    ),
    # lxc/incus internal/server/device/device_utils_disk.go
    "incus": Launcher(
        "--fd={fd} --cache=never --shared-dir={dir} --posix-acl=auto", "handed", "leave", 3
    ),
    "incus-idmap": Launcher(
        "--fd={fd} --cache=metadata --shared-dir={dir} --translate-uid=map:0:1000000:65536"
        " --translate-uid=forbid-guest:0:0 --translate-gid=map:0:1000000:65536"
        " --translate-gid=forbid-guest:0:0 --translate-uid=forbid-guest:65536:4294901759"
        " --translate-gid=forbid-guest:65536:4294901759",
        "handed", "leave", 3,
    ),
    # canonical/lxd lxd/device/device_utils_disk.go
    "lxd": Launcher("--fd={fd} -o source={dir}", "handed", "leave", 3),
    # microvm-nix/microvm.nix nixos-modules/microvm/virtiofsd/default.nix
    "microvm.nix": Launcher(
        "--socket-path={sock} --socket-group={group} --shared-dir={dir} --rlimit-nofile 4096"
        " --thread-pool-size 2 --posix-acl --xattr --cache=auto --inode-file-handles=prefer"
        " --tag=ro-store --readonly",
        "socket", "term", order="cloud-hypervisor",
    ),
    # cloud-hypervisor/cloud-hypervisor cloud-hypervisor/tests/common/utils.rs
    "cloud-hypervisor": Launcher(
        "--shared-dir {dir} --socket-path {sock} --cache never --tag myfs",
        "socket", "kill", order="cloud-hypervisor",
    ),
    # arighi/virtme-ng virtme/commands/run.py
    "virtme-ng": Launcher(
        "--syslog --no-announce-submounts --socket-path {sock} --shared-dir {dir} --sandbox none",
        "pidfile", "term",
    ),
    # lima-vm/lima pkg/driver/qemu/qemu.go
    "lima": Launcher("--socket-path {sock} --shared-dir {dir}", "socket", "kill"),
    # containers/podman pkg/machine/qemu/virtiofsd.go
    "podman-machine": Launcher(
        "--sandbox none --socket-path {sock} --shared-dir . --seccomp=none", "socket", "kill", local="dir"
    ),
    # coreos/coreos-assembler mantle/platform/qemu.go
    "coreos-assembler": Launcher(
        "--sandbox none --socket-path {sock} --shared-dir . --modcaps=-mknod:-setfcap --seccomp=none",
        "socket", "kill", local="dir", environment={"RUST_LOG": "ERROR"},
    ),
    # bootc-dev/bcvk crates/bcvk-qemu/src/virtiofsd.rs
    "bcvk": Launcher(
        "--socket-path {sock} --shared-dir {dir} --cache=never --allow-mmap --sandbox=none --readonly"
        " --inode-file-handles=fallback",
        "socket", "term",
    ),
    # systemd/mkosi mkosi/qemu.py
    "mkosi": Launcher(
        "--shared-dir {dir} --xattr --no-announce-submounts --sandbox=chroot --inode-file-handles=prefer"
        " --fd {fd}",
        "handed", "term",
    ),
    # kubevirt/kubevirt pkg/virt-controller/services/virtiofs.go
    "kubevirt": Launcher(
        "--socket-path={sock} --shared-dir={dir} --sandbox=none --cache=auto"
        " --migration-on-error=guest-error --migration-mode=find-paths",
        "socket", "leave",
    ),
    "kubevirt-2022": Launcher(
        "--socket-path={sock} -o source={dir} -o sandbox=chroot -o xattr"
        " -o xattrmap=:map::user.virtiofsd.:",
        "socket", "leave",
    ),
}  # fmt: skip
