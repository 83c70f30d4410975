"""Runs a shell script and prints, as one line of JSON, its status, seconds and output.

work.py '{"directory": ..., "script": ..., "environment": {...}}'
"""

import json
import os
import subprocess
import sys
import time

OUTPUT_MAX = 200_000


def main(directory: str, script: str, environment: dict[str, str]) -> None:
    with open(f"/tmp/work-{os.getpid()}", "w+b") as output:  # not on what is measured
        os.unlink(output.name)
        began = time.perf_counter()
        done = subprocess.run(
            ["/bin/sh", "-e", "-c", script], cwd=directory, env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        output.seek(0)
        said = output.read(OUTPUT_MAX).decode(errors="replace")
    print(json.dumps({"status": done.returncode, "seconds": seconds, "output": said}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
