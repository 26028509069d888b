"""launch: run a command of this folder, with the repository and apps/ as the places to import from.

Python makes a script's own folder the first of these places, and in eval/ no `eval` can be found. This is the one place
that changes them; tests get the same ones from setup.cfg. apps/ is there for the programs that the benchmarks measure.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PLACES = (str(REPOSITORY), str(REPOSITORY / "apps"))


def launch(script: str) -> None:
    """End the process with what `main()` of the module eval.NAME returns, `script` being the path of eval/NAME.py."""
    sys.path[:1] = PLACES  # in place of eval/
    sys.exit(importlib.import_module(f"eval.{Path(script).stem}").main())
