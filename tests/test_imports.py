"""The direction of imports (docs/architecture.md, "Rooms")."""

import re
import subprocess
import sys
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
    "fuse": {"memory", "sys"},
    "hostfs": {"_dax", "errors", "fuse", "memory", "sys"},
    "queue": {"_ring", "fuse", "memory", "sys", "virtqueue"},
    "sandbox": {"errors", "sys"},
    "options": {"errors", "fuse", "hostfs", "sandbox"},
    "daemon": {"_dax", "errors", "fuse", "hostfs", "options", "queue", "sandbox", "vhost"},
    "guest": {"_dax", "errors", "fuse", "memory", "sys", "vhost", "virtqueue"},
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


def test_serving_loads_neither_numpy_nor_posix_ipc() -> None:
    code = (
        "import sys, vfsd.cli, vfsd.daemon.supervisor, vfsd.daemon.share, importlib\n"
        "from vfsd.fuse.opcodes import OPERATIONS\n"
        "for op in OPERATIONS: importlib.import_module('vfsd.' + op.module)\n"
        "print([m for m in ('numpy', 'posix_ipc', 'asyncio', 'ctypes') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


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
