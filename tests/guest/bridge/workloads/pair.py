"""Several fsx at a time, a process each: pair.py SEED STEPS [SEED STEPS ...]"""

import multiprocessing
import sys

import fsx

if __name__ == "__main__":
    runs = [
        multiprocessing.Process(target=fsx.main, args=(f"fsx.{seed}", int(seed), int(steps)))
        for seed, steps in zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    sys.exit(any(run.exitcode for run in runs))
