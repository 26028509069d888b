"""Step caching of the ComfyUI node with every kind of conditioning and model, against a naive reference.

The reference (`with_whole_parts` of comfyui_worker.py) runs all of the UNet and of the ControlNets in a cached call,
and the kept feature takes the place of what the last skipped layer returned.
"""

from __future__ import annotations

import pytest
import torch
from comfyui_support import comfyui  # noqa: F401

STEPS, WHOLE = 12, 7
"""Steps of a run, and how many of them are whole in the plan with preset fast."""
OFF = [("AgentSD", dict(ratio=0.0, early=0.0, cache_interval=1))]
FAST = [("AgentSD", dict(preset="fast"))]
KINDS = {  # calls a step: conditionings that differ in kind are calls of their own
    "T2I-Adapter": 2,
    "ControlLoRA": 2,
    "GLIGEN": 2,
    "inpainting": 1,
    "LoRA hooks": 2,
    "context windows": 3,  # windows
}


@pytest.fixture(scope="module", autouse=True)
def models(comfyui):  # noqa: F811
    """Tiny models with two resnets a level, as SD 1.5 has."""
    comfyui("make_random", name="two")
    comfyui("make_random", name="refiner", seed=10)
    comfyui("make_random", name="inpainting", in_channels=9)


def distance(one, other):
    return float((one - other).abs().max() / other.std())


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_the_naive_reference_with(comfyui, kind):  # noqa: F811
    model = "inpainting" if kind == "inpainting" else "two"
    arguments = dict(model=model, kind=kind, steps=STEPS, scheduler="karras")
    plain = comfyui("sample", nodes=[], **arguments)
    assert not torch.equal(plain["latents"], comfyui("sample", nodes=[], **{**arguments, "kind": None})["latents"])
    assert torch.equal(comfyui("sample", nodes=OFF, **arguments)["latents"], plain["latents"])
    # Twice, with a run of another sampler, size and schedule in between.
    run = comfyui("sample", nodes=FAST, again=1, between=("heun", 10), **arguments)
    assert torch.equal(*run["runs"]) and not run["hooks"] and not run["kept"] and not run["told"]
    whole = WHOLE + (kind == "LoRA hooks")  # another strength of the LoRA is another step to begin from
    assert run["counts"] == (whole * KINDS[kind], (STEPS - whole) * KINDS[kind])
    naive = comfyui("with_whole_parts", nodes=FAST, **arguments)
    assert naive["counts"] == run["counts"] and distance(run["latents"], naive["latents"]) < 1e-5
    assert 1e-4 < distance(run["latents"], plain["latents"]) < 1.5


@pytest.mark.parametrize("part", [0.0, 0.5])
@pytest.mark.parametrize("first", [True, False], ids=["LoRA before", "LoRA after"])
def test_cached_with_little_memory_and_a_lora_equals_cached(comfyui, part, first):  # noqa: F811
    """--lowvram: weights that do not fit are cast where they are used, and a LoRA's are patched there."""
    lora = [("LoRA", {"weights": lora_weights(comfyui), "strength": 0.8})]
    nodes = [*lora, *FAST] if first else [*FAST, *lora]
    arguments = dict(model="two", steps=STEPS, scheduler="karras")
    low = comfyui("with_little_memory", part=part, nodes=nodes, **arguments)
    assert low["casts"][0] > 10 and low["counts"] == (WHOLE, STEPS - WHOLE) and not low["told"]
    assert distance(low["latents"], comfyui("sample", nodes=nodes, **arguments)["latents"]) < 1e-4
    assert distance(low["latents"], comfyui("sample", nodes=FAST, **arguments)["latents"]) > 1e-2


def lora_weights(comfyui):  # noqa: F811
    return comfyui("lora_of", model="two")


def test_base_and_refiner_are_cached_each(comfyui):  # noqa: F811
    """KSampler (Advanced) in two halves: the second half is a run of its own, of another model."""
    models, steps = ["two", "refiner"], 24
    plain, _ = comfyui("base_and_refiner", models=models, nodes=[], steps=steps, switch=12)
    latents, counts = comfyui("base_and_refiner", models=models, nodes=FAST, steps=steps, switch=12)
    again, _ = comfyui("base_and_refiner", models=models, nodes=FAST, steps=steps, switch=12)
    assert [sum(one) for one in counts] == [12, 12] and all(cached >= 4 for _, cached in counts)
    assert torch.equal(latents, again) and 1e-4 < distance(latents, plain) < 1.5


def test_two_samplers_in_one_graph_do_not_touch_each_other(comfyui):  # noqa: F811
    """One patched MODEL, two samplers that take it in turn, of other sizes, schedules and prompts."""
    first, second, first_again, alone = comfyui("two_samplers", model="two", nodes=FAST, steps=STEPS)
    assert torch.equal(first, first_again) and torch.equal(second, alone) and first.shape != second.shape
