"""Build of the extensions; everything else is in pyproject.toml.

VFSD_BUILD=debug turns on bounds checks and assertions, VFSD_BUILD=asan adds the address and
undefined-behaviour sanitizers; VFSD_WERROR=1 makes every warning of Cython and the C compiler fatal.
CFLAGS, where it is set, says how much to optimise.
"""

import multiprocessing
import os
from pathlib import Path

import Cython.Compiler.Options
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("VFSD_BUILD", "release")
WERROR = os.environ.get("VFSD_WERROR") == "1"
if BUILD not in ("release", "debug", "asan"):
    raise SystemExit(f"VFSD_BUILD={BUILD}: use release, debug or asan")

HARDENING = "vfsd/sys/_hardening.h"
cflags = ["-DNDEBUG", "-Wall", "-Wextra", "-fno-strict-aliasing"]
cflags += ["-fstack-protector-strong", "-include", HARDENING]
# Which the C library asks for with HARDENING: an eventfd that is full needs no further write.
cflags.append("-Wno-unused-result")
if "CFLAGS" not in os.environ:
    cflags.append("-O2")
ldflags: list[str] = []
if BUILD != "release":
    cflags += ["-O1", "-g", "-UNDEBUG"]
if BUILD == "asan":
    cflags += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
    ldflags += ["-fsanitize=address,undefined"]
if WERROR:
    cflags.append("-Werror")
    Cython.Compiler.Options.warning_errors = True


# Folders of sources, and the packages they are (pyproject.toml has the same).
PACKAGES = {"vfsd": "vfsd", "bench": "vfsd_bench"}
JOBS = os.cpu_count() or 1


def sources(suffix: str) -> list[Path]:
    return [path for folder in PACKAGES for path in sorted(Path(folder).rglob(f"*{suffix}"))]


def extension(path: Path) -> Extension:
    folder, *rest = path.with_suffix("").parts
    return Extension(
        ".".join([PACKAGES[folder], *rest]),
        [str(path)],
        include_dirs=["vfsd/sys", "vfsd/memory", "bench"],
        define_macros=[("_GNU_SOURCE", "1")],
        depends=[HARDENING],
        extra_compile_args=cflags,
        extra_link_args=ldflags,
    )


def newer(headers: list[Path], made: list[Path]) -> bool:
    times = [path.stat().st_mtime for path in made if path.exists()]
    return bool(times) and max(path.stat().st_mtime for path in headers) > min(times)


class TranslateAndBuild(build_ext):
    """Runs Cython on all modules at once, and only when extensions are built: not for an sdist or metadata."""

    def build_extensions(self) -> None:
        # Forked, so that Cython's global options hold in the processes too: from Python 3.14 on the default
        # is a server that starts them from nothing.
        multiprocessing.set_start_method("fork", force=True)
        translated = cythonize(
            self.extensions,
            # Cython finds what a module depends on, but not through every circle of cimports.
            force=newer(sources(".pxd"), [path.with_suffix(".c") for path in sources(".pyx")]),
            nthreads=JOBS,
            compiler_directives={
                "language_level": 3,
                "binding": True,
                "embedsignature": True,
                "auto_pickle": False,
                "cdivision": True,
                "initializedcheck": False,
                "boundscheck": BUILD != "release",
                "wraparound": False,
                "warn.unused": True,
                "warn.maybe_uninitialized": True,
            },
        )
        made = {module.name: module.sources for module in translated}
        for module in self.extensions:
            module.sources = made[module.name]
        super().build_extensions()


# Processes that are not forked import this file again.
if __name__ == "__main__":
    setup(
        ext_modules=[extension(path) for path in sources(".pyx")],
        cmdclass={"build_ext": TranslateAndBuild},
        options={"build_ext": {"parallel": JOBS}},
    )
