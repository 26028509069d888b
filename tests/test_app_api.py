"""The app over HTTP: /compare, /inspect and /sweep for gradio_client, many at once, and what it refuses."""

from __future__ import annotations

import csv
import socket
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import torch
from app_support import serving, tiny_models
from PIL import Image

pytest.importorskip("gradio")
from gradio_client import Client
from gradio_client.exceptions import AppError

from agentsd import AgentConfig
from agentsd.config import PRESETS
from agentsd.images.compare import generate
from agentsd.images.methods import METHODS
from agentsd.images.png import read_settings
from agentsd.images.request import Request
from agentsd.patch import get_patch

MISSING = "/nonexistent/model"


@pytest.fixture(scope="module")
def outside():
    """Addresses beyond this machine that the process tried to reach."""
    seen = []
    connect = socket.socket.connect

    def watched(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            seen.append(address)
        return connect(self, address)

    socket.socket.connect = watched
    yield seen
    socket.socket.connect = connect


@pytest.fixture(scope="module")
def app(outside):
    models = tiny_models("tiny", "other", MISSING)
    with serving(models) as (address, studio):
        yield address, studio


@pytest.fixture(scope="module")
def client(app):
    return Client(app[0], verbose=False, download_files=tempfile.mkdtemp(prefix="agentsd-test-"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def expected(studio, request, method="agentsd", config=None, model="tiny"):
    return np.asarray(generate(studio.models.get(model).pipe, request, method, config).image)


def test_compare(app, client):
    answer = client.predict(
        "a zebra", steps=3, seed=5, ratio=0.3, rounds=1, scheduler="model's own", api_name="/compare"
    )
    assert set(answer) == {*METHODS, "verdict"}
    request, config = Request("a zebra", steps=3, seed=5, guidance=5.0), AgentConfig(ratio=0.3)
    for method in METHODS:
        one = answer[method]
        assert np.array_equal(pixels(one["picture"]), expected(app[1], request, method, config)), method
        assert read_settings(one["picture"]) == one["settings"] and one["settings"]["method"] == method
        assert one["seconds"] > 0 and len(one["all_seconds"]) == 1
    assert answer["sd"]["speed_up"] is None and answer["agentsd"]["speed_up"] > 0
    assert answer["agentsd"]["distance"] > 0 and "Timings unstable" in answer["verdict"]
    assert [answer[method]["stable"] for method in METHODS] == [False] * 3


def test_only_the_prompt_must_be_given(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/compare", "/inspect", "/sweep"} <= set(endpoints)
    for name in ("/compare", "/inspect", "/sweep"):
        needed = [p["parameter_name"] for p in endpoints[name]["parameters"] if not p["parameter_has_default"]]
        assert needed == ["prompt"], name
        given = {p["parameter_name"] for p in endpoints[name]["parameters"]}
        assert {"ratio", "early", "alpha", "broadcast_exponent", "patch_seed", "scheduler", "width"} <= given
    # The events of the page are for the page alone.
    assert set(endpoints) <= {"/compare", "/inspect", "/sweep", "/example"}


def test_inspect(app, client):
    answer = client.predict(
        "a zebra", steps=3, layer="1", call=0, agent=7, scheduler="model's own", api_name="/inspect"
    )
    assert (answer["phase"], answer["call"], answer["grid"], answer["num_agents"]) == ("agent", 0, [16, 16], 16)
    request = Request("a zebra", steps=3, guidance=5.0)
    assert np.array_equal(pixels(answer["picture"]), expected(app[1], request))
    assert pixels(answer["merge_map"]).shape == pixels(answer["agent_map"]).shape == (128, 128, 3)
    late = client.predict("a zebra", steps=3, call=2, api_name="/inspect")
    assert late["phase"] == "merge" and late["agent_map"] is None


def test_sweep(app, client):
    answer = client.predict(
        "a zebra", steps=2, field="early", first=0, last=1, count=3, scheduler="ddim", rounds=1, api_name="/sweep"
    )
    assert [one["value"] for one in answer["drawings"]] == [None, 0.0, 0.5, 1.0]
    assert [one["method"] for one in answer["drawings"]] == ["sd"] + ["agentsd"] * 3
    assert [one["settings"]["patch"]["early"] for one in answer["drawings"][1:]] == [0.0, 0.5, 1.0]
    assert {one["settings"]["scheduler"] for one in answer["drawings"]} == {"DDIMScheduler"}
    assert not np.array_equal(pixels(answer["drawings"][1]["picture"]), pixels(answer["drawings"][3]["picture"]))
    with open(answer["table"]) as file:
        assert [row["early"] for row in csv.DictReader(file)] == ["", "0", "0.5", "1"]
    assert pixels(answer["sheet"]).shape[0] > 256
    about = read_settings(answer["sheet"])
    assert about["sweep"] == {"field": "early", "values": [0.0, 0.5, 1.0]} and about["patch"]["early"] == 0.4
    assert type(app[1].models.get("tiny").pipe.scheduler).__name__ == "PNDMScheduler"


def test_a_preset_with_single_settings_beside_it(client):
    values = {"steps": 1, "rounds": 1, "width": 64, "height": 64, "preset": "fastest", "cache_interval": 2}
    patch = client.predict("a zebra", **values, api_name="/compare")["agentsd"]["settings"]["patch"]
    assert AgentConfig(**patch) == AgentConfig(**{**PRESETS["fastest"], "cache_interval": 2})


@pytest.mark.parametrize(
    "endpoint, values, message",
    [
        ("/compare", {"prompt": ""}, "prompt: is empty"),
        ("/compare", {"prompt": "x" * 10_000}, "10,000 characters"),
        ("/compare", {"steps": 100_000}, "steps=100000: must be an integer in 1 … 150"),
        ("/compare", {"width": 8192}, "width=8192: must be"),
        ("/compare", {"width": "wide"}, "width='wide'"),
        ("/compare", {"ratio": "high"}, "ratio='high'"),
        ("/compare", {"model": "/etc"}, "must be one this app was started with: tiny, other"),
        ("/compare", {"model": MISSING}, "there is no folder '/nonexistent/model'"),
        ("/inspect", {"layer": "nowhere"}, "layer='nowhere': must be a number or name of a patched layer"),
        ("/inspect", {"call": 99}, "call=99"),
        ("/inspect", {"agent": 99, "steps": 4}, "agent=99: must lie in 0 … 15"),
        ("/inspect", {"call": None}, "call=None"),
        ("/sweep", {"field": "prompt"}, "field='prompt'"),
        ("/sweep", {"count": 1000}, "count=1000"),
        ("/compare", {"preset": "fats"}, "preset='fats': must be one of paper, fast"),
        ("/compare", {"cache_interval": 0}, "cache_interval=0"),
        ("/sweep", {"field": "cache_interval", "first": 1, "last": 2, "count": 4}, "fewer integers from 1 to 2"),
        ("/sweep", {"first": 0.1, "last": 0.9}, "ratio=0.9: at most 0.75"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(client, endpoint, values, message):
    with pytest.raises(AppError, match=message):
        client.predict(**{"prompt": "a zebra", "steps": 2, **values}, api_name=endpoint)


def test_out_of_memory_is_told_and_the_app_goes_on(app, client):
    unet = app[1].models.get("tiny").pipe.unet

    def fail(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    handle = unet.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(AppError, match="Out of memory at 64 × 64 px: choose a smaller"):
        client.predict("a zebra", steps=2, width=64, height=64, api_name="/compare")
    handle.remove()
    assert client.predict("a zebra", steps=2, width=64, height=64, api_name="/compare")["verdict"]


def test_a_cancelled_call_ends_at_its_next_step(app, client):
    calls = []
    handle = app[1].models.get("tiny").pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    job = client.submit("a zebra", steps=150, width=256, height=256, api_name="/compare")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    client.predict("a zebra", steps=1, api_name="/inspect")
    handle.remove()
    assert len(calls) < 150  # of 450
    assert get_patch(app[1].models.get("tiny").pipe) is None


def test_a_dozen_at_once(app, client):
    studio = app[1]
    wanted = [
        {
            "prompt": f"a zebra number {i}",
            "seed": i,
            "steps": 1 + i % 2,
            "rounds": 1,
            "ratio": round(0.05 + i * 0.03, 2),
            "width": 64,
            "height": 64 + 64 * (i % 2),
            "model": ("tiny", "other")[i % 3 == 0],
            "scheduler": ("model's own", "ddim", "euler")[i % 3],
        }
        for i in range(12)
    ]
    jobs = [client.submit(**values, api_name="/compare") for values in wanted]
    places = set()
    while not all(job.done() for job in jobs):
        places |= {job.status().rank for job in jobs}
        time.sleep(0.02)
    assert len({place for place in places if place is not None}) >= 6  # told where they stand
    for values, job in zip(wanted, jobs):
        answer = job.result()
        for method in METHODS:
            settings = answer[method]["settings"]
            assert {name: settings[name] for name in ("prompt", "seed", "steps", "model")} == {
                name: values[name] for name in ("prompt", "seed", "steps", "model")
            }
            assert settings["scheduler_name"] == values["scheduler"]
        assert answer["agentsd"]["settings"]["patch"]["ratio"] == values["ratio"]
        # and the images are those of the settings: nothing of other requests leaked into them
        if values["scheduler"] == "model's own":
            names = ("prompt", "steps", "seed", "width", "height")
            request = Request(**{name: values[name] for name in names}, guidance=5.0)
            config = AgentConfig(ratio=values["ratio"])
            for method in METHODS:
                alone = expected(studio, request, method, config, values["model"])
                assert np.array_equal(pixels(answer[method]["picture"]), alone), (values, method)
    asked = studio.models._load.asked
    assert asked.count("tiny") == asked.count("other") == 1 and set(asked) == {"tiny", "other", MISSING}
    for name in ("tiny", "other"):
        pipe = studio.models.get(name).pipe
        assert get_patch(pipe) is None and not hasattr(pipe.unet, "_tome_info")
        assert type(pipe.scheduler).__name__ == "PNDMScheduler"


def test_it_listens_on_this_machine_only(app):
    assert app[0].startswith("http://127.0.0.1:")


def test_only_its_own_files_are_served(app, client):
    from playground.server import folder

    address = app[0].rstrip("/")
    own = list(Path(folder()).glob("outputs/*/*.png"))[0]
    root = Path(__file__).parents[1]
    weights = root / "agentsd/demo_model/unet/diffusion_pytorch_model.safetensors"
    assert weights.is_file() and httpx.get(f"{address}/gradio_api/file={own}").status_code == 200
    up = "../" * 12
    for path in (
        "/etc/passwd", str(weights), str(root / "README.md"), str(Path(__file__)), f"{own.parent}/{up}etc/passwd",
        f"{folder()}/{up}etc/passwd", "README.md", "/proc/self/environ", str(Path.home() / ".bashrc"),
        "http://127.0.0.1:1/x", "https://example.com/", "file:///etc/passwd", str(own.parent), folder(),
    ):  # fmt: skip
        for spelled in (path, quote(path, safe="")):
            for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/proxy="):
                # httpx would tidy "..": the server must see it
                answer = _get_as_is(address, f"{route}{spelled}")
                assert answer.split()[1] != b"200", (route, spelled)


def _get_as_is(address, target):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        return connection.recv(200)


def test_a_path_in_place_of_an_upload_is_refused(app):
    """Gradio's File takes {"path": …} from its clients: it must be one that was uploaded."""
    address = app[0].rstrip("/")
    config = httpx.get(f"{address}/config").json()
    restoring = [
        dependency["id"] for dependency in config["dependencies"]
        if any(target[1] == "upload" for target in dependency["targets"])
    ]  # fmt: skip
    assert restoring
    payload = {
        "data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
        "fn_index": restoring[0],
        "session_hash": "x",
    }
    answer = httpx.post(f"{address}/gradio_api/run/predict", json=payload)
    assert answer.status_code >= 400 and "root:" not in answer.text


def test_nothing_outside_was_reached(app, client, outside):
    assert outside == []


def test_a_port_that_is_taken_is_told(app, capsys):
    import demo

    assert demo.main(["--port", app[0].rstrip("/").rsplit(":", 1)[1], "--model", MISSING]) == 2
    told = capsys.readouterr().err
    assert "is taken: give another --port" in told
    assert MISSING not in told  # before any model is loaded
    assert demo.main(["--port", "7860", "--host", "192.0.2.1"]) == 2  # an address of no machine (RFC 5737)
    assert "cannot listen on 192.0.2.1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        demo.main(["--max-size", "100"])
    assert raised.value.code == 2 and "multiple of 8" in capsys.readouterr().err
    assert demo.main(["--dtype", "int8"]) == 2 and "dtype='int8'" in capsys.readouterr().err
