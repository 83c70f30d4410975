"""vfsd mount"""

import logging
import os
import stat
from errno import ECONNREFUSED

import click

from vfsd.daemon.process import Signals, raise_descriptor_limit
from vfsd.daemon.systemd import notify_ready
from vfsd.errors import ConfigError
from vfsd.guest.bridge.device_mount import UNMOUNTED, DeviceMount
from vfsd.guest.bridge.mounting import DEVICE, mount_flags
from vfsd.guest.driver.device import Device
from vfsd.vhost.orders import ORDERS

log = logging.getLogger("vfsd")


@click.command()
@click.argument("directory", metavar="DIR")
@click.option("--socket", "path", required=True, metavar="PATH", help="The daemon's socket.")
@click.option("-o", "options", default="", metavar="OPTIONS",
              help="As for mount(8): ro, nosuid, noatime, ...")  # fmt: skip
@click.option(
    "--order", type=click.Choice(sorted(ORDERS)), default="qemu", show_default=True,
    help="The front end whose order of messages to follow.",
)  # fmt: skip
@click.option("--queues", type=click.IntRange(1, 64), default=1, show_default=True,
              help="Request queues.")  # fmt: skip
@click.option("--queue-size", type=click.IntRange(8, 32768), default=1024, show_default=True,
              help="Elements of each queue, a power of two.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 64), default=None,
              help="Threads that read requests.  [default: one for each queue, at least 2]")  # fmt: skip
@click.option("--foreground", is_flag=True, help="Stay in the foreground, as it does anyway.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info",
              show_default=True, help="The least severe messages to show.")  # fmt: skip
def mount(
    directory: str, path: str, options: str, order: str, queues: int, queue_size: int,
    threads: int | None, foreground: bool, log_level: str,
) -> None:  # fmt: skip
    """Mount the file system of a virtio-fs daemon at DIR, without a virtual machine.

    A share that is one regular file is mounted on a regular file.

    Stays in the foreground, logs to stderr, says READY when it is mounted, and ends when DIR is
    unmounted. SIGTERM and SIGINT unmount it. Needs root.
    """
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s", force=True)
    flags = mount_flags(options)
    check(directory, path, queue_size)
    raise_descriptor_limit()
    with Signals() as signalled:
        try:
            device = Device.connect(path, order=order, queues=queues, queue_size=queue_size)
        except OSError as problem:
            advice = "start the daemon first" if problem.errno == ECONNREFUSED else "see what the daemon says"
            raise ConfigError("--socket", f"{path}: {problem.strerror}; {advice}") from problem
        source = device.tag or path
        try:
            mounted = DeviceMount(
                device, directory, source=source, flags=flags, threads=threads or max(2, queues)
            )
        except OSError as problem:
            raise ConfigError("DIR", f"{directory} can't be mounted: {problem.strerror}") from problem
        with mounted:
            notify_ready()
            log.info("READY: %s is mounted on %s", source, directory)
            ended = mounted.wait(signalled.fileno())
            why = mounted.why if ended else "ended by a signal"
    if ended and why != UNMOUNTED:
        raise ConfigError("--socket", f"{path}: {why}; {directory} is unmounted")
    log.info("%s", why)


def check(directory: str, path: str, queue_size: int) -> None:
    """ConfigError for what can be seen before anything is made."""
    if os.geteuid() != 0:
        raise ConfigError("vfsd mount", "only root may mount; run it as root")
    if not os.path.exists(DEVICE):
        raise ConfigError(DEVICE, "is not there; load the module fuse")
    if not os.path.isdir(directory) and not os.path.isfile(directory):
        raise ConfigError("DIR", f"{directory} is neither a directory nor a regular file; make it first")
    if queue_size & (queue_size - 1):
        raise ConfigError("--queue-size", f"{queue_size} is no power of two")
    try:
        mode = os.stat(path).st_mode
    except OSError as problem:
        raise ConfigError("--socket", f"{path}: {problem.strerror}; start the daemon first") from problem
    if not stat.S_ISSOCK(mode):
        raise ConfigError("--socket", f"{path} is no socket")
