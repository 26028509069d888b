"""examples/serve.py as its own process under parallel requests, and what agentsd/SERVING.md says."""

from __future__ import annotations

import io
import json
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from child import ENVIRONMENT, ROOT
from conftest import SD_BETAS, draw, make_pipeline
from diffusers import DDIMScheduler
from PIL import Image

import agentsd
from agentsd.patch import get_patch

PAGE = (ROOT / "agentsd" / "SERVING.md").read_text("utf-8")

pytest.importorskip("fastapi")

SETTINGS = (None, {}, {"preset": "fast"}, {"cache_interval": 3, "ratio": 0.3})
SMALL = {"height": 64, "width": 64, "steps": 12}


class Server:
    """A running examples/serve.py."""

    def __init__(self, folder, log):
        command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--model", str(folder), "--port", "0"]
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.2)
        self.address = found[1]

    def ask(self, body: object) -> tuple[int, bytes]:
        """Status and content; text is sent as it stands."""
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        request = urllib.request.Request(f"{self.address}/images", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Server(folder, tmp_path_factory.mktemp("log") / "server.txt")
    yield server
    server.process.send_signal(signal.SIGINT)
    server.process.wait(60)


def test_parallel_requests_each_get_the_image_made_alone(server, folder):
    requests = [
        {"prompt": prompt, "seed": seed, "patch": patch, **SMALL}
        for patch in SETTINGS
        for seed, prompt in enumerate(("a zebra", "a castle"))
    ]
    alone = [server.ask(request) for request in requests]
    assert [status for status, _ in alone] == [200] * len(requests)
    assert len({content for _, content in alone}) == len(requests)  # settings, prompts and seeds all matter
    order = list(range(len(requests))) * 2
    random.Random(0).shuffle(order)
    wrong = {"prompt": "a zebra", "patch": {"ratio": 2}}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.ask, [one for i in order for one in (requests[i], wrong)]))
    assert [answer[0] for answer in answers[1::2]] == [422] * len(order)
    assert answers[::2] == [alone[i] for i in order]
    # The unpatched ones are those of the pipeline itself, bit for bit, whatever ran before.
    pipe = agentsd.load_pipeline(folder, scheduler="ddim", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    for request, (_, content) in list(zip(requests, alone))[:2]:
        expected = draw(
            pipe, steps=12, seed=request["seed"], prompt=request["prompt"], height=64, width=64, output_type="pil"
        )[0]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(expected))
    with urllib.request.urlopen(f"{server.address}/health") as answer:
        assert json.load(answer) == {"waiting": 0}
    log = server.log.read_text()
    assert "'cached': " in log and "waited" in log and "Traceback" not in log


@pytest.mark.parametrize(
    "body, reason",
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "width": 100}, "multiple of 8"),
        ({"prompt": "a", "height": 4096}, "less than or equal to 1024"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "patch": {"ratio": 2}}, "ratio=2"),
        ({"prompt": "a", "patch": {"ratio": "0.4"}}, "ratio='0.4'"),
        ({"prompt": "a", "patch": {"preset": "fats"}}, "must be one of"),
        ({"prompt": "a", "patch": {"rato": 0.4}}, "rato"),
        ({"prompt": "a", "patch": {"cache_interval": 3, "cache_depth": 9}}, "cache_depth"),
        ({"prompt": "a", "patch": {"config": 1}}, "config=1"),
        ('{"prompt": "a", "guidance": NaN}', "guidance"),
        ('{"prompt": "a", "patch": {"ratio": NaN}}', "ratio=nan"),
        ({"prompt": "a", "sed": 1}, "sed"),
        ("{", "body: JSON"),
        ([], ""),
    ],
)
def test_bad_input_is_answered_with_422_and_the_reason(server, body, reason):
    status, content = server.ask(body)
    assert status == 422 and reason in json.dumps(json.loads(content), ensure_ascii=False).replace('\\"', '"'), content


def test_snippets_of_the_page_run(fresh_dynamo, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # what they compile is tested below
    names = {"pipe": make_pipeline(), "agentsd": agentsd, "torch": torch}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    for block in blocks:
        exec(compile(block, "SERVING.md", "exec"), names)
    assert len(blocks) == 3 and len(names["images"]) == 2
    assert names["make"]("a zebra", 0, preset="fast").size == (128, 128)


def test_kept_memory_is_what_the_page_says_and_freed_when_it_says():
    pipe = make_pipeline(scheduler=DDIMScheduler(**SD_BETAS, clip_sample=False))
    agentsd.apply_patch(pipe, cache_interval=3, ratio=0, early=0)
    kept = []

    def look(pipe, step, timestep, values):
        tracks = get_patch(pipe).runs.run.cache._tracks.values()
        kept.append([feature for track in tracks for _, feature in track.features])
        return values

    draw(pipe, steps=20, callback_on_step_end=look)
    channels = pipe.unet.config.block_out_channels[0]
    shapes = {tuple(feature.shape) for features in kept for feature in features}
    assert {shape[0] for shape in shapes} == {2} and {shape[2:] for shape in shapes} == {(16, 16)}
    assert {shape[1] for shape in shapes} == {channels}
    assert max(map(len, kept)) == 2 and kept[-1] == []
