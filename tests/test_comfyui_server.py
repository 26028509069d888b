"""End to end: our workflow posted to ComfyUI's server over HTTP, with the node folder linked into it."""

from __future__ import annotations

import copy
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from comfyui_support import REPOSITORY, comfyui_folder, environment
from PIL import Image

NODE = REPOSITORY / "apps" / "comfyui"
AGENTS, SAMPLER, REPORT, PREVIEW = "2", "6", "9", "10"


class Server:
    """ComfyUI's main.py on 127.0.0.1, with files of its own in a folder."""

    def __init__(self, folder):
        comfyui = comfyui_folder()
        self.folder = folder
        nodes = folder / "custom_nodes"
        nodes.mkdir()
        (nodes / "agentsd").symlink_to(NODE)
        shutil.copy(REPOSITORY / "tests" / "support" / "comfyui_checkpoint.py", nodes)
        page = folder / "page"  # the browser's part is a package of its own, which no test needs
        page.mkdir()
        (page / "index.html").write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.log = folder / "log.txt"
        command = [comfyui / "venv" / "bin" / "python", "main.py", "--cpu", "--port", str(port), "--disable-api-nodes"]
        command += [
            "--base-directory",
            str(folder),
            "--front-end-root",
            str(page),
            "--database-url",
            "sqlite:///:memory:",
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=comfyui / "ComfyUI", stdout=log, stderr=subprocess.STDOUT, env=environment()
            )
        self._wait(lambda: self.get("/system_stats"), 240)

    def _wait(self, ready, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if (answer := ready()) is not None:
                    return answer
            except urllib.error.URLError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-4000:])

    def get(self, path):
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return answer.read()

    def run(self, workflow):
        """Post a workflow and wait for it; returns ComfyUI's history of it."""
        body = json.dumps({"prompt": workflow}).encode()
        request = urllib.request.Request(self.address + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        return self._wait(lambda: json.loads(self.get(f"/history/{number}")).get(number), 120)

    def image(self, workflow):
        """The image of a workflow as an array."""
        history = self.run(workflow)
        assert history["status"]["status_str"] == "success", history["status"]
        (saved,) = (image for output in history["outputs"].values() for image in output.get("images", ()))
        png = self.get("/view?" + urllib.parse.urlencode(saved))
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    comfyui_folder()
    server = Server(tmp_path_factory.mktemp("comfyui"))
    yield server
    server.process.kill()
    server.process.wait()


def workflow(steps=3, **settings):
    """The workflow file on the tiny checkpoint, 128 px, few steps."""
    graph = json.loads((NODE / "workflow.json").read_text())
    graph["1"]["inputs"]["ckpt_name"] = "tiny.safetensors"
    graph["5"]["inputs"].update(width=128, height=128)
    graph[SAMPLER]["inputs"].update(steps=steps, cfg=3.0)
    graph[AGENTS]["inputs"].update(settings)
    return graph


def without_the_node():
    graph = copy.deepcopy(workflow())
    for number in (AGENTS, REPORT, PREVIEW):
        del graph[number]
    graph[SAMPLER]["inputs"]["model"] = ["1", 0]
    return graph


def test_the_node_is_listed_with_every_widget_of_the_workflow(server):
    nodes = json.loads(server.get("/object_info"))
    assert nodes["AgentSD"]["category"] == nodes["AgentSDReport"]["category"] == "model_patches/unet"
    widgets = nodes["AgentSD"]["input"]
    assert widgets["optional"]["preset"][0] == "COMBO"  # ComfyUI's current form of nodes
    assert widgets["optional"]["cache_interval"][1]["default"] == 3  # of a new node
    assert set(workflow()[AGENTS]["inputs"]) == {*widgets["required"], *widgets["optional"]}


def test_workflows_of_the_first_version_run_uncached(server):
    old = workflow(steps=12)
    for name in server_widgets(server):
        old[AGENTS]["inputs"].pop(name)
    history = server.run(old)
    assert history["status"]["status_str"] == "success", history["status"]
    (text,) = history["outputs"][REPORT]["text"]
    assert "12 model calls" in text and "cached" not in text


def server_widgets(server):
    """The widgets that came after the first version."""
    return json.loads(server.get("/object_info"))["AgentSD"]["input"]["optional"]


def test_cached_steps_over_http(server):
    history = server.run(workflow(steps=12, preset="cache"))
    (text,) = history["outputs"][REPORT]["text"]
    assert "12 model calls" in text and "7 whole and 5 cached" in text


def test_an_image_over_http(server):
    plain = server.image(without_the_node())
    patched = server.image(workflow())
    assert plain.shape == (128, 128, 3) and plain.std() > 5
    assert abs(plain - patched).max() > 2
    assert np.array_equal(server.image(workflow(ratio=0.0, early=0.0)), plain)
    # The same graph without the node again: nothing is left behind. ComfyUI would answer the very same from memory.
    again = without_the_node()
    again[SAMPLER]["inputs"]["denoise"] = 0.9999
    assert np.array_equal(server.image(again), plain)


def test_the_report_over_http(server):
    history = server.run(workflow(seed=1))
    (text,) = history["outputs"][REPORT]["text"]
    assert "none cached, as runs of fewer than 10 steps are not" in text
    assert "3 model calls" in text and "16×16 = 256 tokens" in text and "128×128 px" in text
    assert history["outputs"][PREVIEW]["text"] == [text]


def test_bad_input_is_shown_at_the_node(server):
    history = server.run(workflow(ratio=0.9))
    (error,) = (content for kind, content in history["status"]["messages"] if kind == "execution_error")
    assert error["node_id"] == AGENTS
    assert "ratio=0.9: at most 0.75 of the tokens" in error["exception_message"]


# -- what the page shows ---------------------------------------------------------------------------------------------

EXAMPLES = sorted((NODE / "example_workflows").glob("*.json"))


def as_prompt(graph, nodes):
    """A workflow of the page as what `POST /prompt` takes, as ComfyUI's page converts it."""
    links = {link[0]: link for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        values, inputs = list(node["widgets_values"]), {}
        given = nodes[node["type"]]["input"]
        linked = {slot["name"]: slot["link"] for slot in node["inputs"]}
        for name, spec in {**given.get("required", {}), **given.get("optional", {})}.items():
            if name in linked:
                if linked[name] is not None:
                    _, source, slot, target, _, kind = links[linked[name]]
                    assert target == node["id"] and (spec[0] in (kind, "*"))
                    inputs[name] = [str(source), slot]
                continue
            inputs[name] = values.pop(0)
            if len(spec) > 1 and spec[1].get("control_after_generate"):
                assert values.pop(0) in ("fixed", "randomize")
        if node["type"] == "LoadImage":
            assert values.pop(0) == "image"  # the button that uploads one
        assert not values, (node["type"], values)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_workflows(server, file):
    nodes = json.loads(server.get("/object_info"))
    prompt = as_prompt(json.loads(file.read_text("utf-8")), nodes)
    if file.stem in ("controlnet", "sdxl"):  # whose models no test has: that every value stands in its place
        return
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = "tiny.safetensors"
        elif node["class_type"] == "EmptyLatentImage":
            inputs.update(width=128, height=128)
        elif node["class_type"] == "KSampler":
            inputs["steps"] = 12
        elif node["class_type"] == "LoadImage":
            Image.new("RGB", (128, 128), "teal").save(server.folder / "input" / inputs["image"])
    history = server.run(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    text = " ".join(one for output in history["outputs"].values() for one in output.get("text", ()))
    assert "12 model calls" in text and "cached" in text


def test_help_and_texts_are_served(server):
    assert server.get("/extensions/agentsd/docs/AgentSD.md").startswith(b"# AgentSD")
    assert "/extensions/agentsd/old_workflows.js" in json.loads(server.get("/extensions"))
    for file in EXAMPLES:
        assert server.get(f"/api/workflow_templates/agentsd/{file.stem}.jpg").startswith(b"\xff\xd8")
    texts = json.loads(server.get("/i18n"))["en"]["nodeDefs"]
    assert "cache_interval" in texts["AgentSD"]["inputs"]
