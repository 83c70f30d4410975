#!/bin/busybox sh
# First process of a guest (user-mode Linux or QEMU). Prepares places to write, loads the virtio-fs
# driver, then runs the commands that guest.py sends over a serial line:
#   in:  ID BASE64-OF-SHELL-SCRIPT
#   out: the script's output, newline, NONCE ID STATUS, newline
# From the kernel command line, as environment: GUEST_KIND, GUEST_NONCE, GUEST_FILES, GUEST_PATH,
# and GUEST_MODULES of user-mode Linux.
b=/bin/busybox
kind=$GUEST_KIND nonce=$GUEST_NONCE files=$GUEST_FILES modules=$GUEST_MODULES
export PATH="$GUEST_PATH" HOME=/tmp LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
unset GUEST_KIND GUEST_NONCE GUEST_FILES GUEST_PATH GUEST_MODULES

$b mount -t proc proc /proc
if [ "$kind" = uml ]; then
    # The root is the host's, read-only: everything that is written goes to a tmpfs or to the share.
    channel=/dev/ttyS0
    $b mount -t tmpfs tmpfs /mnt
    $b mkdir /mnt/share /mnt/files
    [ -z "$files" ] || $b mount -o bind "$files" /mnt/files
    modules=$modules/$($b uname -r)/kernel/fs/fuse
    for name in fuse virtiofs; do $b insmod "$modules/$name.ko"; done  # which may be below /tmp
    for directory in /tmp /run /var/tmp; do $b mount -t tmpfs tmpfs $directory; done
else
    channel=/dev/ttyS1
    $b mount -t devtmpfs devtmpfs /dev
    $b --install -s /bin
    mkdir -p /sys /tmp /run /var/tmp /mnt/share /mnt/files
    mount -t sysfs sysfs /sys
    for directory in /tmp /run; do mount -t tmpfs tmpfs $directory; done
    while read -r name; do insmod "/modules/$name"; done </modules/order
fi
$b mkdir -p /dev/shm /dev/pts
$b mount -t tmpfs tmpfs /dev/shm
cd /tmp || exit 1

exec 0<>$channel 1>&0
$b stty raw -echo <$channel
echo "$nonce 0 0"
while read -r id script; do
    [ "$id" != poweroff ] || break
    echo "$script" | $b base64 -d >/run/step
    # By its path: busybox would run its own shell, which prefers busybox to the programs in PATH.
    /bin/sh /run/step </dev/null 2>&1
    printf '\n%s %s %s\n' "$nonce" "$id" "$?"
done
$b poweroff -f
