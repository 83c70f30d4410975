"""vfsd doctor"""

import json
import sys
from dataclasses import asdict

import click

from vfsd.cli.output import echo, escaped
from vfsd.doctor import daemon, front_end, host, shared
from vfsd.doctor.finding import Finding

EXIT_WRONG = 1


@click.command()
@click.option("--socket", metavar="PATH", help="A daemon's socket: whether it answers.")
@click.option("--shared-dir", metavar="DIR", help="A directory that is to be shared.")
@click.option("--pid", type=click.IntRange(1), metavar="PID",
              help="A running QEMU, or another front end: whether its guest's memory is shared, its DAX"
              " window, and whether AppArmor or SELinux confine it.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="A list of objects: check, level, text, remedy.")
def doctor(socket: str | None, shared_dir: str | None, pid: int | None, as_json: bool) -> None:
    """Look for what keeps a share from working, and say what to change.

    Each line is ok, a warning, or wrong; the exit status is 1 if something is wrong. Run it as the user who
    is to run the daemon. --socket connects to the daemon for a moment, as a guest of its own.
    """
    findings = [check() for check in host.CHECKS]
    if shared_dir is not None:
        findings += shared.check(shared_dir)
    if socket is not None:
        findings += daemon.check(socket)
    if pid is not None:
        findings += front_end.check(pid)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            show(finding)
    if any(finding.level == "wrong" for finding in findings):
        sys.exit(EXIT_WRONG)


def show(finding: Finding) -> None:
    echo(f"{finding.level:8} {finding.check}: {escaped(finding.text)}")
    if finding.remedy:
        echo(f"{'':8} {escaped(finding.remedy)}")
