"""The direction of imports (docs/architecture.md, "Rooms")."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vfsd"
IMPORT = re.compile(r"^\s*(?:from|cimport|import) (vfsd[\w.]*)(?: c?import \(?([\w, ]*))?", re.M)

# Below vfsd: what a room may use of ours, besides itself. A name with a dot is one module of a room.
ALLOWED = {
    "errors": set(),
    "sys": set(),
    "memory": {"sys"},
    "virtqueue": {"memory", "sys"},
    "_ring": {"memory", "sys", "virtqueue"},
    "_dax_intervals": set(),
    "_dax": {"_dax_intervals"},
    "vhost": {"_ring", "errors", "memory"},
    "state": {"sys"},
    "fuse": {"memory", "state", "sys"},
    "hostfs": {"_dax", "errors", "fuse", "memory", "state", "sys"},
    "queue": {"_ring", "fuse", "memory", "state", "sys", "virtqueue"},
    "sandbox": {"errors", "sys"},
    "options": {"errors", "fuse", "hostfs", "sandbox"},
    "control": {"options"},
    "daemon": {
        *{"_dax", "control", "errors", "fuse", "hostfs", "options", "queue", "sandbox", "state", "sys"},
        "vhost",
    },
    "virtiofsd": {"daemon", "errors", "options"},
    "doctor": {"errors", "fuse", "guest", "hostfs", "sandbox"},
    "guest": {"_dax", "errors", "fuse", "memory", "sys", "vhost", "virtqueue"},
}
# Within vfsd.guest.
GUEST_ROOMS = {
    "driver": {"buffer"},
    "client": {"buffer", "driver"},
    "face": {"buffer", "client", "driver"},
    "bridge": {"buffer", "driver"},
}
GUEST_MAY_USE_OF_FUSE = {"_wire", "abi", "opcodes", "shapes"}


def imported(path: Path) -> set[str]:
    """Dotted names of what a source file imports of ours, without the package's own name."""
    names = set()
    for module, what in IMPORT.findall(path.read_text()):
        parts = module.split(".")[1:]
        names |= {".".join([*parts, name.strip()]) for name in (what or "").split(",") if name.strip()}
        names.add(".".join(parts))
    return {name for name in names if name}


def sources(room: str) -> list[Path]:
    files = [path for path in PACKAGE.glob(f"{room}.*") if path.suffix in (".py", ".pyx", ".pxd", ".pyi")]
    folder = PACKAGE / room
    return files + [p for p in folder.rglob("*") if p.suffix in (".py", ".pyx", ".pxd", ".pyi")]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    found = sources(room)
    assert found, f"there is no {room}"
    rooms = {path.stem for path in PACKAGE.iterdir()}
    for path in found:
        used = {name.split(".")[0] for name in imported(path)} & rooms - {room, "__init__"}
        assert used <= ALLOWED[room], f"{path.name} imports {used - ALLOWED[room]}"


def test_the_guest_uses_of_fuse_only_what_both_sides_share() -> None:
    for path in sources("guest"):
        of_fuse = {name.split(".")[1] for name in imported(path) if name.startswith("fuse.")}
        assert of_fuse <= GUEST_MAY_USE_OF_FUSE, path.name


@pytest.mark.parametrize("room", GUEST_ROOMS)
def test_a_room_of_the_guest_imports_only_what_lies_below_it(room: str) -> None:
    for path in sources(f"guest/{room}"):
        used = {name.split(".")[1] for name in imported(path) if name.startswith("guest.")}
        assert used - {room} <= GUEST_ROOMS[room], path.name


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of ours that a file imports anywhere: in functions and for type checkers alone, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
    return found & modules


def test_no_module_is_in_an_import_circle() -> None:
    paths = [path for suffix in ("*.py", "*.pyi") for path in PACKAGE.rglob(suffix)]
    modules = {module_name(path) for path in paths}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for path in paths:
        graph[module_name(path)] |= imports_of(path, modules) - {module_name(path)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as problem:
        pytest.fail(" imports ".join(reversed(problem.args[1])))


def test_serving_loads_neither_numpy_nor_posix_ipc() -> None:
    code = (
        "import sys, vfsd.cli, vfsd.daemon.supervisor, vfsd.daemon.share, importlib\n"
        "from vfsd.fuse.opcodes import OPERATIONS\n"
        "for op in OPERATIONS: importlib.import_module('vfsd.' + op.module)\n"
        "print([m for m in ('numpy', 'posix_ipc', 'asyncio', 'ctypes') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_vfsd_virtiofsd_listens_before_it_imports_what_takes_long(tmp_path: Path) -> None:
    """Python alone is a third of the time until then."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "before = set(sys.modules)\n"
        "from vfsd.daemon.sockets import open_socket\n"
        "from vfsd.options.virtiofsd import parse\n"
        "from vfsd.virtiofsd.main import read\n"
        "from vfsd.virtiofsd.pidfile import PidFile\n"
        f"options = read(parse(['--shared-dir=/', '-o', 'xattr,cache=none', '--socket-path={tmp_path}/s']))\n"
        "PidFile('--socket-path', options.socket), open_socket(options)\n"
        "print(*sorted(name for name in set(sys.modules) - before if name.partition('.')[0] != 'vfsd'))\n"
    )
    out = subprocess.run([sys.executable, "-ISEc", code], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) <= {"__future__", "_socket", "errno", "fcntl", "grp"}


def test_vfsd_virtiofsd_needs_no_click() -> None:
    code = "import sys, vfsd.virtiofsd.life; print('click' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_each_operation_has_one_home() -> None:
    import importlib

    from vfsd.fuse.init import Session
    from vfsd.fuse.opcodes import OPERATIONS, Home

    assert len({op.opcode for op in OPERATIONS}) == len(OPERATIONS)
    for op in OPERATIONS:
        module = importlib.import_module(f"vfsd.{op.module}")
        home = Session if op.module == "fuse.init" else module
        if op.home is Home.PYTHON:
            assert callable(getattr(home, op.name.lower())), op
        else:
            assert callable(module.install), op
