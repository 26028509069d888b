"""images/tune.py, tuning.py, unet_calls.py: what is timed and recommended, on tiny models; no time is asserted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from conftest import SD_BETAS, make_pipeline, make_unet
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import agentsd
from agentsd import cli
from agentsd.config import PRESETS, AgentConfig, Phase
from agentsd.images.tune import BESIDE_PRESETS
from agentsd.images.tuning import LEAVE, Candidate, Tuning
from agentsd.images.unet_calls import RandomInputs, plan_of_run, ran_whole, set_timesteps, timed_calls
from agentsd.patch import get_patch

SCHEDULERS = (
    DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler, LCMScheduler,
)  # fmt: skip


def tiny_tuning(**arguments):
    pipe = make_pipeline()
    return pipe, agentsd.tune(pipe, 128, 128, rounds=1, **arguments)


def test_every_preset_and_phase_is_timed_and_said():
    pipe, tuning = tiny_tuning(steps=12)
    names = [one.name for one in tuning.candidates]
    assert names[: len(PRESETS)] == list(PRESETS) and set(BESIDE_PRESETS) < set(names)
    for one in tuning.candidates:
        assert set(one.plan) == set(one.calls) and all(seconds > 0 for seconds in one.calls.values())
        assert one.name in str(tuning)
    fast = tuning.candidates[list(PRESETS).index("fast")]
    assert set(fast.plan) == {"whole, agent", "cached, agent", "whole, merge", "cached, merge"}
    assert tuning.unpatched.plan == {"whole": 13}  # PLMS takes a call more


def test_it_changes_nothing():
    pipe = make_pipeline()
    scheduler, processors = pipe.scheduler, dict(pipe.unet.attn_processors)
    timesteps, config = scheduler.timesteps, dict(pipe.config)
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    agentsd.tune(pipe, 64, 128, steps=4, rounds=1)
    assert torch.equal(torch.randn(3), expected)
    assert pipe.scheduler is scheduler and scheduler.timesteps is timesteps and dict(pipe.config) == config
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert get_patch(pipe) is None and not pipe.unet.mid_block.resnets[0]._forward_pre_hooks


def test_everything_is_restored_where_it_is_stopped():
    pipe = make_pipeline()
    scheduler = pipe.scheduler

    def stop(name, number):
        if name == "fast":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        agentsd.tune(pipe, 64, 64, steps=4, on_round=stop)
    assert pipe.scheduler is scheduler and get_patch(pipe) is None


def test_a_patched_or_compiled_pipeline_and_wrong_arguments_are_refused():
    pipe = make_pipeline()
    with agentsd.patched(pipe), pytest.raises(ValueError, match="already patched"):
        agentsd.tune(pipe)
    for arguments, error in (
        (dict(rounds=0), ValueError),
        (dict(rounds=1.5), TypeError),
        (dict(batch_size=0), ValueError),
        (dict(steps=0), ValueError),
        (dict(height=60), ValueError),
    ):
        with pytest.raises(error, match=next(iter(arguments))):
            agentsd.tune(pipe, **arguments)
    with pytest.raises(TypeError, match="agentsd.compare"):
        agentsd.tune(pipe.unet)
    pipe.unet.compile()
    with pytest.raises(ValueError, match="compiled"):
        agentsd.tune(pipe)


def test_a_preset_that_cannot_be_used_is_said_and_the_others_are_timed(monkeypatch):
    monkeypatch.setitem(PRESETS, "deep", {"cache_interval": 2, "cache_depth": 9})
    _, tuning = tiny_tuning(steps=4)
    assert "cache_depth=9" in tuning.failed["deep"] and f"deep: not timed, {tuning.failed['deep']}" in str(tuning)
    assert [one.name for one in tuning.candidates][: len(PRESETS) - 1] == [name for name in PRESETS if name != "deep"]


def test_the_dictionary_is_json():
    _, tuning = tiny_tuning(steps=4)
    data = json.loads(json.dumps(tuning.to_dict()))
    assert data["steps"] == 4 and data["unpatched"]["speed_up"] == 1 and len(data["candidates"][0]["rounds"]) == 1
    assert tuning.share().count("|") == 8 and "128×128" in tuning.share()


def tuning_of(unpatched, **candidates):
    found = [
        Candidate(name, {"preset": name}, rounds, plan={"cached, merge" if "fast" in name else "whole, merge": 1})
        for name, rounds in candidates.items()
    ]
    machine = {"device": "GPU | 1", "model": "P", "dtype": "float16", "torch": "torch 2"}
    return Tuning(machine, 64, 64, 25, "S", 1, Candidate("unpatched", None, unpatched, plan={"whole": 1}), tuple(found))


@pytest.mark.parametrize(
    ("paper", "fast", "best", "without"),
    [
        ((0.9, 0.9), (0.5, 0.5), "fast", "paper"),
        ((1.0, 1.0), (0.5, 0.5), "fast", "unpatched"),
        ((0.99, 0.99), (1.2, 1.2), "unpatched", "unpatched"),  # 2 % is noise
        ((0.5, 1.1), (1.3, 1.4), "unpatched", "unpatched"),  # faster by the median, but not in every round
        ((0.6, 0.7), (0.65, 0.66), "paper", "paper"),
    ],
)
def test_nothing_is_recommended_that_may_be_slower_than_the_unpatched_model(paper, fast, best, without):
    tuning = tuning_of((1.0, 1.02), paper=paper, fast=fast)
    assert ("how near the image stays" in str(tuning)) is (best != "unpatched")
    assert (tuning.best.name, tuning.best_without_caching.name) == (best, without)
    if best == "unpatched":
        assert tuning.recommended is None and LEAVE in str(tuning) and tuning.to_dict()["code"] == LEAVE
    else:
        assert tuning.recommended == {"preset": best}
        assert f'agentsd.apply_patch(pipe, preset="{best}")' in str(tuning)


def test_no_speed_up_is_said_from_unstable_timings():
    steady, unsteady = tuning_of((1.0, 1.0), fast=(0.5, 0.55)), tuning_of((1.0, 1.3), fast=(0.5, 0.5))
    assert "×" in steady.share().split("|")[-2] and "Unstable" not in str(steady)
    assert "unstable" in unsteady.share() and "Unstable: rounds" in str(unsteady) and "2.00×" not in str(unsteady)
    assert "one round" in str(tuning_of((1.0,), fast=(0.5,))).lower()
    assert "GPU / 1" in steady.share()  # no cell of the table is cut in two


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_random_inputs_fit_the_unet(kind, batch_size):
    unet = make_unet(kind)
    inputs = RandomInputs.of(unet, 16, 24, batch_size)
    scheduler = DDIMScheduler(**SD_BETAS)
    timesteps = set_timesteps(scheduler, 10)
    assert next(timed_calls(unet, scheduler, timesteps, inputs)).whole
    assert inputs.latents.shape == (batch_size, 4, 16, 24)


def command(capsys, *arguments):
    try:
        code = cli.main(["tune", *map(str, arguments)])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


QUICK = ("--size", "64x128", "--steps", 3, "--rounds", 1)


def test_the_command_prints_the_table_and_writes_json(capsys, tmp_path):
    file = tmp_path / "tuning.json"
    code, out, err = command(capsys, *QUICK, "--json", file, "--share")
    assert code == 0, err
    data = json.loads(file.read_text(encoding="utf-8"))
    assert (data["height"], data["width"], data["steps"]) == (64, 128, 3)
    assert data["code"] in out and out.rstrip().splitlines()[-1].startswith("| ") and str(file) in out
    assert err.splitlines()[-2:] == ["warm-up …", "round 1 …"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "64x64x64"), "64x64x64"),
        (("--size", "large"), "large"),
        (("--size", 60), "height=60"),
        (("--rounds", 0), "rounds=0"),
        (("--json", "no/such/folder/x.json"), "json="),
        (("--preset", "fast"), "unrecognized"),
        (("--model", "no-such-folder/x/y"), "no folder"),
    ],
)
def test_wrong_input_of_the_command_is_one_sentence(capsys, arguments, message):
    code, out, err = command(capsys, *arguments)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) <= 2 and "Traceback" not in err


def test_random_inputs_of_inpainting_upscaling_and_distilled_models():
    for overrides in (dict(in_channels=9), dict(in_channels=7, num_class_embeds=10), dict(time_cond_proj_dim=12)):
        unet = make_unet(**overrides)
        inputs = RandomInputs.of(unet, 16, 16)
        scheduler = DDIMScheduler(**SD_BETAS)
        assert next(timed_calls(unet, scheduler, set_timesteps(scheduler, 10), inputs)).whole
        assert inputs.guided == ("time_cond_proj_dim" not in overrides)


def test_a_unet_whose_inputs_cannot_be_made_up_is_refused():
    for overrides, said in (
        (dict(class_embed_type="projection", projection_class_embeddings_input_dim=8), "class_embed_type='projection'"),
        (dict(addition_embed_type="text"), "addition_embed_type='text'"),
    ):
        with pytest.raises(ValueError, match=f"{said}.*agentsd.compare"):
            RandomInputs.of(make_unet(**overrides), 16, 16)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("begin", [0, 5])
def test_a_run_may_begin_anywhere_with_every_scheduler(scheduler, begin):
    unet, scheduler = make_unet(), scheduler(**SD_BETAS)
    timesteps = set_timesteps(scheduler, 12)
    inputs = RandomInputs.of(unet, 8, 8)
    calls = list(timed_calls(unet, scheduler, timesteps, inputs, begin))
    assert [call.timestep for call in calls] == [float(t) for t in timesteps[begin:]]
    assert all(call.whole and call.seconds > 0 for call in calls)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_the_plan_is_what_a_run_of_the_pipeline_does(scheduler):
    """Phases and whole calls, counted on a tiny UNet, are those of the patched pipeline itself."""
    pipe = make_pipeline(scheduler=scheduler(**SD_BETAS))
    config = AgentConfig(cache_interval=3)
    counted: Counter = Counter()
    agentsd.apply_patch(pipe, config)

    def count(unet, args, kwargs):
        timestep = float(kwargs["timestep"] if "timestep" in kwargs else args[1])
        found.append([config.phase_at(timestep), False])

    found: list = []
    pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    pipe.unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: found[-1].__setitem__(1, True))
    pipe("a zebra", height=64, width=64, num_inference_steps=20, output_type="latent")
    counted.update(tuple(one) for one in found)
    assert plan_of_run(pipe.scheduler, config, 20) == counted
    assert plan_of_run(pipe.scheduler, None, 20) == Counter({(Phase.MERGE, True): counted.total()})


def test_whether_a_call_was_whole_is_seen_on_the_network_itself():
    unet = make_unet()
    with ran_whole(unet) as whole:
        assert not whole()
        unet(torch.zeros(1, 4, 16, 16), 10, torch.zeros(1, 7, 32))
        assert whole()
    assert not unet.mid_block.resnets[0]._forward_pre_hooks
