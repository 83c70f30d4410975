"""Build of the extensions, and where manual pages go; everything else is in pyproject.toml.

VFSD_BUILD=debug turns on bounds checks and assertions, VFSD_BUILD=asan adds the address and
undefined-behaviour sanitizers, VFSD_BUILD=tsan the thread sanitizer, VFSD_BUILD=none leaves the extensions
out. VFSD_WERROR=1 makes every warning of Cython and the C compiler fatal. CFLAGS, where it is set, says how
much to optimise.
"""

import multiprocessing
import os
import re
from pathlib import Path

import Cython.Compiler.Options
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("VFSD_BUILD", "release")
WERROR = os.environ.get("VFSD_WERROR") == "1"
SANITIZERS = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}
if BUILD not in ("release", "debug", *SANITIZERS, "none"):
    raise SystemExit(f"VFSD_BUILD={BUILD}: use release, debug, {', '.join(SANITIZERS)} or none")

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
if BUILD in SANITIZERS:
    cflags += [SANITIZERS[BUILD], "-fno-omit-frame-pointer"]
    ldflags.append(SANITIZERS[BUILD])
if BUILD == "tsan":
    # It does not see fences; ours order a store before a load of another word, and publish nothing.
    cflags.append("-Wno-tsan")
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
        include_dirs=["vfsd/sys", "vfsd/memory", "vfsd/state", "bench"],
        define_macros=[("_GNU_SOURCE", "1")],
        depends=["setup.py", *map(str, sources(".h"))],
        extra_compile_args=cflags,
        extra_link_args=ldflags,
    )


CIMPORT = re.compile(r"^ *(?:from ([\w.]+) )?cimport (?:\(([^)]*)\)|(.*))", re.M)


def cimported(path: Path) -> set[Path]:
    """The .pxd files that a source file names, and its own."""
    found = {path.with_suffix(".pxd")}
    for module, listed, line in CIMPORT.findall(path.read_text()):
        names = [words[0] for name in (listed or line).split(",") if (words := name.split())]
        for dotted in (module, *names, *(f"{module}.{name}" for name in names)):
            folder, *rest = dotted.strip(".").split(".")
            folder = next((key for key, package in PACKAGES.items() if package == folder), folder)
            found.add(Path(folder, *rest[:-1], f"{rest[-1]}.pxd") if rest else path)
    return {path for path in found if path.suffix == ".pxd" and path.is_file()}


def outdated(path: Path) -> bool:
    """Whether a .pyx file's translation is older than a declaration it depends on.

    cythonize() finds these too, but not through every circle of cimports.
    """
    translation = path.with_suffix(".c")
    reached: set[Path] = set()
    unread = {path}
    while unread:
        reached |= unread
        unread = set().union(*map(cimported, unread)) - reached
    return translation.exists() and any(
        file.stat().st_mtime > translation.stat().st_mtime for file in reached
    )


# What `make man` has written, where it has.
DATA = {
    "share/man/man1": "man/*.1",
    "share/man/man5": "man/*.5",
    "share/man/man7": "man/*.7",
    "share/bash-completion/completions": "man/bash/*",
    "share/zsh/site-functions": "man/zsh/*",
    "share/fish/vendor_completions.d": "man/fish/*",
}


class TranslateAndBuild(build_ext):
    """Runs Cython on all modules at once, and only to build them: not for an sdist or metadata."""

    def build_extensions(self) -> None:
        # Forked, so that Cython's global options hold in the processes too: from Python 3.14 on the default
        # is a server that starts them from nothing.
        multiprocessing.set_start_method("fork", force=True)
        for path in filter(outdated, sources(".pyx")):
            path.with_suffix(".c").unlink()
        translated = cythonize(
            self.extensions,
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
        ext_modules=[] if BUILD == "none" else [extension(path) for path in sources(".pyx")],
        data_files=[(folder, sorted(map(str, Path().glob(found)))) for folder, found in DATA.items()],
        cmdclass={"build_ext": TranslateAndBuild},
        options={"build_ext": {"parallel": JOBS}},
    )
