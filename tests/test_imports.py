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
    "_memory": set(),
    "_vring": {"_memory"},
    "_ring": {"_memory", "_vring"},
    "_driver_ring": {"_memory", "_vring"},
    "_intervals": set(),
    "_dax": {"_intervals"},
    "_wire": set(),
    "errors": set(),
    "vhost": {"_memory", "_ring", "errors"},
    "fuse": {"_memory", "_wire"},
    "hostfs": {"_dax", "_memory", "_threads", "_wire", "fuse", "errors"},
    "_threads": set(),
    "_pool": {"_threads"},
    "_virtqueue": {"_memory", "_pool", "_ring", "_threads", "fuse"},
    "_replies": {"_memory", "_ring", "_threads", "_virtqueue", "fuse"},
    "_jobs": {"_memory", "_pool", "_replies", "_ring", "_threads", "_virtqueue", "fuse"},
    "_parks": {"_memory", "_replies", "_ring", "_threads", "_virtqueue", "fuse"},
    "_bounce": {"_memory", "_replies", "_ring", "_virtqueue", "fuse"},
    "_polling": {"_replies", "_ring", "_threads", "_virtqueue"},
    "_calls": {"_polling", "_ring", "_virtqueue", "fuse"},
    "_queue": {
        "_bounce", "_calls", "_jobs", "_memory", "_parks", "_polling", "_pool", "_replies", "_ring",
        "_threads", "_virtqueue", "fuse",
    },
    "share": {"_dax", "_pool", "_queue", "fuse", "hostfs", "vhost", "errors"},
    "options": {"errors", "fuse", "hostfs", "sandbox", "share"},
    "sandbox": {"errors"},
    "daemon": {"errors", "hostfs", "options", "sandbox", "share"},
    "guest": {"_dax", "_driver_ring", "_memory", "_threads", "_wire", "fuse", "vhost", "errors"},
}  # fmt: skip
GUEST_MAY_USE_OF_FUSE = {"abi", "opcodes", "shapes"}


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
        "import sys, vfsd.cli, vfsd.daemon, vfsd.share, importlib\n"
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
