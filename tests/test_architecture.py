"""Which modules may import which, what importing the light ones loads, how long a file may be, and who sets paths."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import from its own layer and from the layers before it.
LAYERS = (
    ("agentsd", "files", "messages", "fields", "config", "trained"),
    ("attention", "grid_split", "merging", "step_cache"),
    ("layer_plan",),
    ("unet",),
    ("patch",),
    ("report", "describing", "multiply_adds", "visualize", "maps", "images", "vision"),
    ("cli", "commands", "__main__"),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

# What these import is bounded more closely than by the layers; what they hold themselves is always allowed.
ONLY = {"agentsd": set(), "files": set(), "messages": set(), "fields": set(), "vision": {"attention", "messages"}}

OUTSIDE = {"apps", "eval", "tests"}
MOST_LINES = 400


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The file or folder of agentsd that a module belongs to; "agentsd" for the package's own __init__."""
    return module.split(".")[1] if "." in module else module


def statements(node: ast.AST, for_types: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import, at the top or inside a function; those that a type checker alone reads only with `for_types`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for alternative in [*(child.body if for_types else []), *child.orelse]:
                yield from statements(ast.Module([alternative], []), for_types)
        else:
            yield from statements(child, for_types)


def imports(file: Path, root: Path, modules: set[str], for_types: bool = False) -> Iterator[str]:
    """The modules that a file imports, by their whole names."""
    package = module_name(file, root).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for statement in statements(ast.parse(file.read_text("utf-8")), for_types):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        above = package[: len(package) + 1 - statement.level] if statement.level else []
        source = ".".join([*above, *([statement.module] if statement.module else [])])
        for alias in statement.names:  # `from . import x` may name a module, or something in the package
            name = f"{source}.{alias.name}"
            # The package itself finds its public names in its modules, lazily: those count as what they are.
            lazy = source == "agentsd" and alias.name != "__version__"
            yield name if name in modules or lazy else source


def violations(root: Path) -> list[str]:
    """What is wrong with the imports of the package `agentsd` that lies in a folder."""
    files = {module_name(file, root): file for file in sorted((root / "agentsd").rglob("*.py"))}
    found, arrows = [], {}
    for module, file in files.items():
        part = part_of(module)
        if part not in RANK:
            found.append(f"{module} has no place in LAYERS")
            continue
        arrows[module] = {target for target in imports(file, root, set(files), True) if target in files}
        for target in imports(file, root, set(files)):
            top = target.split(".")[0]
            if top in OUTSIDE:
                found.append(f"{module} imports {target}")
            if top != "agentsd":
                continue
            other = part_of(target)
            if part in ONLY and other != part and other not in ONLY[part]:
                found.append(f"{module} imports {target}")
            elif other not in RANK:
                found.append(f"{module} imports {target}, which is no module")
            elif RANK[other] > RANK[part]:
                found.append(f"{module} imports {target}, which is in a later layer")
    return found + ring(arrows)


def ring(arrows: dict[str, set[str]]) -> list[str]:
    """One ring of imports as a sentence; none where there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return [f"cycle: {' -> '.join(error.args[1])}"]
    return []


def test_imports_run_one_way():
    assert violations(ROOT) == []


def violations_of_commands(root: Path) -> list[str]:
    """What is wrong with the imports between and inside the folders `eval` and `apps`.

    eval imports what it measures from apps; apps import no eval. What all benchmarks share imports none of them.
    """
    files = {module_name(file, root): file for file in sorted((root / "eval").rglob("*.py"))}
    # apps/ is no package: it is the place where its modules are found.
    files |= {module_name(file, root / "apps"): file for file in sorted((root / "apps").rglob("*.py"))}
    found, arrows = [], {}
    for module, file in files.items():
        app = file.is_relative_to(root / "apps")
        arrows[module] = set(imports(file, root / "apps" if app else root, set(files), for_types=True)) & set(files)
        for target in arrows[module]:
            if app and target.split(".")[0] == "eval":
                found.append(f"{module} imports {target}")
            if module.startswith("eval.common.") and not target.startswith(("eval.common", "eval.launch")):
                found.append(f"{module} imports {target}")
    return found + ring(arrows)


def test_eval_imports_apps_and_apps_import_no_eval():
    assert violations_of_commands(ROOT) == []


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("apps/demo.py", "def f():\n    from eval.common.protocol import PROMPT", "demo imports eval.common.protocol"),
        ("eval/common/protocol.py", "from eval.fid import scores", "eval.common.protocol imports eval.fid.scores"),
        ("eval/common/protocol.py", "from playground import form", "eval.common.protocol imports playground.form"),
        ("eval/fid/scores.py", "if TYPE_CHECKING:\n    from .report import a", "cycle: eval.fid."),
        ("apps/playground/form.py", "from . import page", "cycle: playground."),
    ],
)
def test_a_circle_of_apps_and_eval_is_found(tmp_path, file, code, message):
    good = {
        "apps/demo.py": "from playground import page",
        "apps/playground/page.py": "from .form import Form",
        "apps/playground/form.py": "import agentsd",
        "eval/common/protocol.py": "import agentsd",
        "eval/fid/scores.py": "from eval.common.protocol import PROMPT",
        "eval/fid/report.py": "from . import scores\nfrom playground.form import Form",
    }
    for name, text in good.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    assert violations_of_commands(tmp_path) == []
    (tmp_path / file).write_text(code, "utf-8")
    found = violations_of_commands(tmp_path)
    assert any(one.startswith(message) for one in found), found


def test_one_file_alone_changes_where_python_looks_for_modules():
    files = [file for top in ("agentsd", "apps", "eval", "tests") for file in (ROOT / top).rglob("*.py")]
    changing = [file for file in files if re.search(r"\bsys\.path\b", file.read_text("utf-8"))]
    assert {file.relative_to(ROOT).as_posix() for file in changing} == {"eval/launch.py"}


GOOD = {
    "__init__": "import importlib",
    "files": "import os",
    "config": "import math",
    "attention": "import torch",
    "merging": "from .config import AgentConfig",
    "layer_plan": "from . import config, merging",
    "unet/__init__": "",
    "unet/unet_call": "from ..layer_plan import plan_layer\nfrom .layers import find",
    "unet/layers": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..config import AgentConfig",
    "patch": "from .unet.unet_call import UNetCall",
    "vision/__init__": "from .swin import Swin",
    "vision/swin": "from agentsd.attention import agent_attention",
    "cli": "from . import __version__\nfrom agentsd import patch",
}


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("config", "from .patch import apply_patch", "agentsd.config imports agentsd.patch, which is in a later layer"),
        (
            "merging",
            "def f():\n    import agentsd.unet.unet_call",
            "agentsd.merging imports agentsd.unet.unet_call, which is",
        ),
        ("unet/layers", "from .. import patch", "agentsd.unet.layers imports agentsd.patch, which is"),
        ("unet/layers", "try:\n    from .unet_call import f\nexcept ImportError:\n    pass", "cycle: agentsd.unet."),
        ("unet/layers", "if TYPE_CHECKING:\n    from .unet_call import f", "cycle: agentsd.unet."),
        ("vision/swin", "if TYPE_CHECKING:\n    from . import Swin", "cycle: agentsd.vision"),
        ("config", "if TYPE_CHECKING:\n    from .layer_plan import plan_layer", "cycle: agentsd."),
        ("vision/swin", "from ..merging import merge_tokens", "agentsd.vision.swin imports agentsd.merging"),
        ("vision/swin", "from . import Swin", "cycle: agentsd.vision"),
        ("files", "from .config import AgentConfig", "agentsd.files imports agentsd.config"),
        ("__init__", "from .patch import apply_patch", "agentsd imports agentsd.patch"),
        ("config", "from agentsd import apply_patch", "agentsd.config imports agentsd.apply_patch, which is no module"),
        ("patch", "from eval.fid import fid", "agentsd.patch imports eval.fid"),
        ("other", "", "agentsd.other has no place in LAYERS"),
    ],
)
def test_the_check_finds_an_arrow_that_runs_back(tmp_path, module, code, message):
    def write(module: str, code: str) -> None:
        file = tmp_path / "agentsd" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, "utf-8")

    for name, good in GOOD.items():
        write(name, good)
    assert violations(tmp_path) == []
    write(module, code)
    found = violations(tmp_path)
    assert any(one.startswith(message) for one in found), found


def test_the_mathematics_loads_no_diffusers():
    code = (
        "import json, sys, agentsd.merging, agentsd.attention, agentsd.layer_plan, agentsd.config; "
        "print(json.dumps([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == ["torch"]


def test_no_file_is_too_long():
    lengths = {file: len(file.read_text("utf-8").splitlines()) for file in (ROOT / "agentsd").rglob("*.py")}
    assert len(lengths) > 20
    assert {file.name: length for file, length in lengths.items() if length > MOST_LINES} == {}
