"""What boots guests: tools/guests of a source checkout."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

HARNESS = Path(__file__).resolve().parent.parent / "tools"


def harness() -> Any:
    """tools/guests of the checkout. ImportError: this is none."""
    if str(HARNESS) not in sys.path:
        sys.path.append(str(HARNESS))
    return importlib.import_module("guests")
