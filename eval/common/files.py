"""read_json: what an earlier run has kept, or None."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .protocol import BenchError


def read_json(path: Path) -> Any:
    """The value in a file, None where there is no file. Raises BenchError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read ({error}): remove it") from error
