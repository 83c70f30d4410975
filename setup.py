"""Build of the extensions; everything else is in pyproject.toml.

VFSD_BUILD=debug turns on bounds checks and assertions, VFSD_BUILD=asan adds the address and
undefined-behaviour sanitizers; VFSD_WERROR=1 makes every warning of Cython and the C compiler fatal.
CFLAGS, where it is set, says how much to optimise.
"""

import os
from pathlib import Path

import Cython.Compiler.Options
from Cython.Build import cythonize
from setuptools import Extension, setup

BUILD = os.environ.get("VFSD_BUILD", "release")
WERROR = os.environ.get("VFSD_WERROR") == "1"
if BUILD not in ("release", "debug", "asan"):
    raise SystemExit(f"VFSD_BUILD={BUILD}: use release, debug or asan")

cflags = ["-DNDEBUG", "-Wall", "-Wextra", "-fno-strict-aliasing"]
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


def extension(path: Path) -> Extension:
    folder, *rest = path.with_suffix("").parts
    return Extension(
        ".".join([PACKAGES[folder], *rest]),
        [str(path)],
        include_dirs=["vfsd/sys", "vfsd/memory", "bench"],
        define_macros=[("_GNU_SOURCE", "1")],
        extra_compile_args=cflags,
        extra_link_args=ldflags,
    )


def newer(headers: list[Path], made: list[Path]) -> bool:
    times = [path.stat().st_mtime for path in made if path.exists()]
    return bool(times) and max(path.stat().st_mtime for path in headers) > min(times)


modules = [path for folder in PACKAGES for path in sorted(Path(folder).rglob("*.pyx"))]
declared = [path for folder in PACKAGES for path in Path(folder).rglob("*.pxd")]

setup(
    ext_modules=cythonize(
        [extension(path) for path in modules],
        # Cython finds what a module depends on, but not through every circle of cimports.
        force=newer(declared, [path.with_suffix(".c") for path in modules]),
        nthreads=os.cpu_count() or 1,
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
    ),
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
)
