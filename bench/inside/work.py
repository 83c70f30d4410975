"""Runs a shell script and prints, as one line of JSON, its status, seconds and output.

    work.py '{"directory": ..., "before": ..., "script": ..., "after": ..., "environment": {...}}'

before and after are scripts that are not timed; when one of them fails its status and output are given.
after is empty, or its output is given too.
"""

import json
import os
import subprocess
import sys
import time

OUTPUT_MAX = 200_000


def run(script: str, directory: str, environment: dict[str, str]) -> tuple[int, float, str]:
    """(status, seconds, output)"""
    with open(f"/tmp/work-{os.getpid()}", "w+b") as output:  # not on what is measured
        os.unlink(output.name)
        began = time.perf_counter()
        done = subprocess.run(
            ["/bin/sh", "-e", "-c", script], cwd=directory, env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        output.seek(0)
        return done.returncode, seconds, output.read(OUTPUT_MAX).decode(errors="replace")


def main(directory: str, before: str, script: str, after: str, environment: dict[str, str]) -> None:
    status, seconds, output, last = 0, 0.0, "", ""
    if before:
        status, _, output = run(before, directory, environment)
    if status == 0:
        status, seconds, output = run(script, directory, environment)
    if status == 0 and after:
        status, _, last = run(after, directory, environment)
        output = output if status == 0 else last
    print(json.dumps({"status": status, "seconds": seconds, "output": output, "after": last}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
