"""ENVIRONMENT: of a child process that imports what the tests import, by `pythonpath` in setup.cfg."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PLACES = [ROOT, ROOT / "apps", ROOT / "tests", ROOT / "tests" / "support"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([*map(str, _PLACES), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
