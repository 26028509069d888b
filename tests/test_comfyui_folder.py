"""The folder of the ComfyUI nodes: it needs nothing installed, and what ComfyUI shows of it is up to date."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import build_comfyui
import comfyui
import numpy as np
import pytest
from child import ENVIRONMENT
from comfyui.core import MODULES
from comfyui.schema import PATCH
from comfyui_support import REPOSITORY
from PIL import Image

import agentsd

EXAMPLES = sorted((REPOSITORY / "apps" / "comfyui" / "example_workflows").glob("*.json"))

# Loads a folder as ComfyUI does, where no agentsd is installed and diffusers cannot be imported.
LOAD = """
import importlib.util, sys
folder, older = sys.argv[1], sys.argv[2]
sys.modules.update(diffusers=None, transformers=None, accelerate=None, comfy=None)
own = importlib.util.find_spec
def find_spec(name, *more):
    if name == "agentsd":
        return own(name) if older else None
    return None if name == "agentsd.step_cache" else own(name, *more)
importlib.util.find_spec = find_spec
spec = importlib.util.spec_from_file_location("agentsd_nodes", folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["agentsd_nodes"] = module
spec.loader.exec_module(module)
import agentsd
print(*module.NODE_CLASS_MAPPINGS, agentsd.__file__)
print(sorted(module.NODE_CLASS_MAPPINGS["AgentSD"].INPUT_TYPES()["optional"]), hasattr(module, "comfy_entrypoint"))
"""


def load(folder, older=""):
    command = [sys.executable, "-c", LOAD, str(folder), older]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_the_built_folder_needs_nothing_installed(tmp_path, capsys):
    folder = tmp_path / "agentsd-nodes"
    assert build_comfyui.main([str(folder)]) == 0
    assert f"{folder}: the nodes" in capsys.readouterr().out
    done = load(folder)
    assert done.returncode == 0, done.stderr
    names, widgets = done.stdout.splitlines()
    assert names == f"AgentSD AgentSDReport {folder / 'core' / 'agentsd' / '__init__.py'}"
    assert "cache_interval" in widgets


def test_the_built_folder_carries_the_sources_as_they_are(tmp_path):
    folder = tmp_path / "agentsd-nodes"
    build_comfyui.build(folder)
    copied = {file.stem: file.read_bytes() for file in (folder / "core" / "agentsd").iterdir()}
    assert copied == {name: (REPOSITORY / "agentsd" / f"{name}.py").read_bytes() for name in MODULES}
    for name in ("nodes.py", "wrapper.py", "pyproject.toml", "web/docs/AgentSD.md", "locales/en/nodeDefs.json"):
        assert (folder / name).read_bytes() == (REPOSITORY / "apps" / "comfyui" / name).read_bytes()
    assert (folder / "LICENSE").is_file()
    with pytest.raises(FileExistsError, match="remove it, or name another"):
        build_comfyui.build(folder)
    with pytest.raises(FileNotFoundError, match="there is no folder .*ConfyUI"):
        build_comfyui.build(tmp_path / "ConfyUI" / "agentsd")
    assert not (tmp_path / "ConfyUI").exists()


def test_a_link_to_a_clone_finds_the_clone(tmp_path):
    link = tmp_path / "agentsd"
    link.symlink_to(REPOSITORY / "apps" / "comfyui")
    done = load(link)
    assert done.stdout.splitlines()[0].endswith(str(REPOSITORY / "agentsd" / "__init__.py")), done.stderr


def test_a_folder_without_core_says_what_to_do(tmp_path):
    copy = tmp_path / "deep" / "nodes" / "agentsd"
    shutil.copytree(REPOSITORY / "apps" / "comfyui", copy)
    done = load(copy)
    assert done.returncode == 1 and "ImportError: AgentSD: its core was not found. Link the folder" in done.stderr


def test_an_older_agentsd_is_told(tmp_path):
    folder = tmp_path / "agentsd-nodes"
    build_comfyui.build(folder)
    code = LOAD.replace("own(name) if older else None", "object()")
    command = [sys.executable, "-c", code, str(folder), "older"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert "is older than its nodes; update or uninstall it" in done.stderr


def test_texts_are_those_of_the_nodes():
    assert json.loads(build_comfyui.TEXTS.read_text("utf-8")) == build_comfyui.texts(), (
        "run python apps/build_comfyui.py --texts"
    )


def test_the_registry_gets_the_version_of_the_package():
    text = (REPOSITORY / "apps" / "comfyui" / "pyproject.toml").read_text("utf-8")
    assert f'version = "{agentsd.__version__}"' in text and "[tool.comfy]" in text


def test_every_node_has_a_help_page():
    for name in comfyui.NODE_CLASS_MAPPINGS:
        page = REPOSITORY / "apps" / "comfyui" / comfyui.WEB_DIRECTORY / "docs" / f"{name}.md"
        assert page.read_text("utf-8").startswith("# ")


OLD_WORKFLOW = """
import { writeFileSync } from "node:fs";
import { registered } from "./scripts/app.js";
await import("./extensions/agentsd/old_workflows.js");
const found = {};
for (const [name, values] of Object.entries({ old: 8, partly: 10, saved: 16, other: 8 })) {
  class Node {
    widgets = [...Array(16).keys()].map((i) => ({ name: i === 9 ? "cache_interval" : `w${i}`, value: 3 }));
    onConfigure(info) { this.called = info; }
  }
  registered.beforeRegisterNodeDef(Node, { name: name === "other" ? "KSampler" : "AgentSD" });
  const node = new Node();
  node.onConfigure({ widgets_values: Array(values).fill(3) });
  found[name] = [node.widgets.map((widget) => widget.value).join(""), node.called !== undefined];
}
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_workflows_of_the_first_version_stay_uncached_on_comfyuis_page(tmp_path):
    """ComfyUI gives a widget that a workflow has no value for a new node's default; the page's script undoes it."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "extensions" / "agentsd").mkdir(parents=True)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    app = "export let registered; export const app = { registerExtension(one) { registered = one; } };"
    (tmp_path / "scripts" / "app.js").write_text(app)
    script = REPOSITORY / "apps" / "comfyui" / "web" / "old_workflows.js"
    shutil.copy(script, tmp_path / "extensions" / "agentsd")
    (tmp_path / "test.js").write_text(OLD_WORKFLOW)
    done = subprocess.run(["node", "test.js"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    old, kept = "3333333331333333", "3" * 16
    assert json.loads(done.stdout) == {
        "old": [old, True],
        "partly": [kept, True],
        "saved": [kept, True],
        "other": [kept, True],
    }


def test_the_script_of_the_page_knows_the_place_of_the_widget():
    widgets = [one.name for one in PATCH.inputs[1:]]
    assert len(PATCH.required[1:]) == 8 and widgets[9] == "cache_interval"  # as in the test above


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_workflow_has_a_thumbnail(file):
    """ComfyUI shows NAME.jpg beside NAME.json in its templates."""
    thumbnail = file.with_suffix(".jpg")
    assert thumbnail.stat().st_size <= 60_000
    with Image.open(thumbnail) as image:
        assert image.format == "JPEG" and image.width >= 400 and np.asarray(image).std() > 10
