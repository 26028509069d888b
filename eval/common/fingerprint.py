"""Fingerprints of what can change an image: the code of a method, the weights of a pipeline, the packages' versions."""

from __future__ import annotations

import ast
import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import agentsd

from .methods import METHODS
from .protocol import CONTROLS

_PACKAGE = Path(agentsd.__file__).parent
_METHODS = _PACKAGE / "images" / "methods.py"  # applies every method; what it imports is what can change an image
_SCENARIOS = Path(__file__).with_name("scenarios.py")
_PACKAGES = ("agentsd", "torch", "diffusers", "transformers", "tomesd", "DeepCache")


def code_fingerprint(method: str) -> str | None:
    """A hash over the source code that decides what a method's images look like; None for unpatched diffusers.

    agentsd and its controls: every file of agentsd that images/methods.py imports, directly or not. tomesd, whose own
    version is noted apart: methods.py and what that imports directly. A method of a --method-module: that file.
    Comments, docstrings, annotations and the texts of errors and warnings do not count.
    """
    if method == "sd":
        return None
    files = {_SCENARIOS}
    if method in ("agentsd", *CONTROLS):
        files |= imported_files(_METHODS)
    elif method == "tomesd":
        files |= imported_files(_METHODS, depth=1)
    elif source := METHODS[method].source:
        files.add(source)  # what it imports in turn is not followed
    digest = hashlib.sha256()
    for text in sorted(effective_code(path.read_text(encoding="utf-8")) for path in files):
        digest.update(text.encode() + b"\0")  # not its name: a file that was moved makes the same images
    return digest.hexdigest()[:16]


def imported_files(path: Path, depth: int | None = None) -> set[Path]:
    """A file of a package and the files of the same package it imports by relative imports, up to so many steps away.

    A package's __init__.py is left out: ours hold names and no code.
    """
    found, edge, steps = {path}, {path}, 0
    while edge and (depth is None or steps < depth):
        edge = {other for file in edge for other in _imports(file)} - found
        found |= edge
        steps += 1
    return found


@functools.cache
def effective_code(source: str) -> str:
    """Source code without what cannot change a result; equal for sources that compute the same in the same way."""
    return ast.unparse(_Effective().visit(ast.parse(source)))


class _Effective(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant):
            return None  # a docstring
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "warnings.warn":
            return ast.Pass()
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(kind, None)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        if node.level:  # from another file of the package, whose own code is hashed
            return None
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        node.body = [*node.body, ast.Pass()]  # it may have been a docstring alone
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [*node.body, ast.Pass()]
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def _imports(path: Path) -> set[Path]:
    found = set()
    for level, module, imported in _relative_imports(path.read_text(encoding="utf-8")):
        folder = path.parents[level - 1].joinpath(*module.split("."))
        names = [folder.with_suffix(".py"), *(folder / f"{name}.py" for name in imported)]
        found |= {name for name in names if name.is_file()}
    return found


@functools.cache
def _relative_imports(source: str) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
    """(level, module, names) of each relative import, as in (2, "images", ("methods",))."""
    return tuple(
        (node.level, node.module or "", tuple(alias.name for alias in node.names))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level
    )


def weights_fingerprint(pipe: Any) -> str:
    """A hash over 64 values from each weight of the pipeline: tells revisions, fine-tunings and LoRAs apart."""
    digest = hashlib.sha256()
    for name in sorted(pipe.components):
        component = pipe.components[name]
        if not isinstance(component, torch.nn.Module):
            continue
        for key, weight in sorted(component.state_dict().items()):
            values = weight.detach().flatten()
            sample = values[:: max(1, values.numel() // 64)][:64].float().cpu().numpy()
            digest.update(f"{name}.{key}{tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of the packages that have a hand in the images."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # the package's version does not tell CPU and CUDA builds apart
