"""eval/denoising: the loss of real networks is the textbook one, paired, in any order, resumed; bad input is told."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import make_text_encoder, make_tokenizer, make_unet, make_vae
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

import agentsd
from agentsd import AgentConfig
from eval.common.protocol import SD, BenchError, Scenario
from eval.denoising import run as command
from eval.denoising.costs import Cost, costs_of, measure_times
from eval.denoising.inputs import Inputs, captioned_files, load_inputs
from eval.denoising.judged import judge, load_judged
from eval.denoising.losses import losses_at, noise_of
from eval.denoising.pairs import make_pairs, unbeaten
from eval.denoising.patterns import pattern_images
from eval.denoising.report import make_rows, make_runs
from eval.denoising.settings import ABLATIONS, make_scenarios, name_of
from eval.denoising.statistics import rise_of

ROOT = Path(__file__).parents[1]

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
AGENTS = Scenario("agentsd", AgentConfig(ratio=0.4, early=1.0))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a probe of two levels, random weights and 8 × 8 pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), mid_block_type=None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8, cross_attention_dim=8,
        attention_head_dim=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("toy")
    DDPMPipeline(unet, DDPMScheduler(**BETAS)).save_pretrained(folder)
    return folder


@pytest.fixture
def judged(toy):
    return load_judged(str(toy), device="cpu")


@pytest.fixture
def inputs(judged):
    return load_inputs(judged, None, None, 6, seed=0)


def stable_diffusion(prediction_type="epsilon", **unet):
    return StableDiffusionPipeline(
        vae=make_vae(), text_encoder=make_text_encoder(), tokenizer=make_tokenizer(), unet=make_unet(**unet),
        scheduler=DDIMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def options(toy, out, **changed):
    values = dict(
        model=str(toy), revision=None, images=None, captions=None, methods="sd,tomesd,agentsd", ratios="0.4", ablate="",
        timesteps="100,800", steps=50, samples=6, batch_size=4, rounds=0, seed=0, device="cpu", dtype=None,
        out=str(out),
    )  # fmt: skip
    return type("Options", (), values | changed)()


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_noise(prediction_type, tmp_path):
    (tmp_path / "a cat").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a cat" / f"{number}.png")
    pipe = stable_diffusion(prediction_type)
    judged = judge("tiny", pipe)
    inputs = load_inputs(judged, tmp_path, None, 10, seed=0)
    losses = losses_at(judged, inputs, SD, 700, seed=3)

    scheduler = pipe.scheduler
    noise = torch.stack([noise_of(inputs.latents.shape[1:], 3, key, 700) for key in inputs.keys])
    moment = torch.tensor([700])
    noisy = scheduler.add_noise(inputs.latents, noise, moment)
    text = pipe.encode_prompt(["A high quality photograph of a a cat."] * 2, "cpu", 1, False)[0]
    with torch.no_grad():
        out = pipe.unet(noisy, 700, text).sample
    if prediction_type == "v_prediction":
        # The loss of v is that of the noise divided by the share of signal: the model's own scheduler gives v.
        wanted = scheduler.get_velocity(inputs.latents, noise, moment)
        expected = scheduler.alphas_cumprod[700] * (out - wanted).square().mean(dim=(1, 2, 3))
    else:
        expected = (out - noise).square().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("kind", [StableDiffusionXLPipeline, StableDiffusionXLInpaintPipeline])
def test_sdxl_and_inpainting_get_what_their_pipelines_give_them(kind, tmp_path, monkeypatch):
    """The pipeline itself, on the same latents, noise and mask, gives the UNet the same input at its first step."""
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "captions.csv").write_text("a.png,a zebra\nb.png,a fox\n")
    inpainting = kind is StableDiffusionXLInpaintPipeline
    pipe = kind(
        vae=make_vae(), text_encoder=make_text_encoder(), text_encoder_2=make_text_encoder(projection=32),
        tokenizer=make_tokenizer(), tokenizer_2=make_tokenizer(),
        unet=make_unet("sdxl", **({"in_channels": 9} if inpainting else {})),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False), add_watermarker=False,
    )  # fmt: skip
    judged = judge("tiny", pipe)
    inputs = load_inputs(judged, tmp_path, tmp_path / "captions.csv", 2, seed=0)
    assert inputs.take([1]).added["text_embeds"].shape == (1, 32)
    assert np.isfinite(losses_at(judged, inputs, AGENTS, 500)).all()

    seen = []
    monkeypatch.setattr(
        pipe.unet, "forward", lambda *args, **kwargs: seen.append((args, kwargs)) or (args[0][:, :4],), raising=True
    )
    options = dict(num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    if inpainting:
        mask = np.zeros((128, 128), dtype=np.uint8)
        mask[32:96, 32:96] = 255
        options |= {"image": [Image.fromarray(pixels)] * 2, "mask_image": [Image.fromarray(mask)] * 2, "strength": 1.0}
        mode = type(pipe.vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist)
        monkeypatch.setattr(mode, "sample", lambda self, *_: self.mode())
    pipe(["a zebra", "a fox"], **options)
    args, kwargs = seen[0]
    added = kwargs["added_cond_kwargs"]
    torch.testing.assert_close(kwargs["encoder_hidden_states"], inputs.text)
    torch.testing.assert_close(added["text_embeds"], inputs.added["text_embeds"])
    torch.testing.assert_close(added["time_ids"].float(), inputs.added["time_ids"])
    if inpainting:
        torch.testing.assert_close(args[0][:, 4:], inputs.beside, rtol=1e-4, atol=1e-5)
    else:
        assert inputs.beside is None


def test_latents_are_the_autoencoders_mean_of_a_centred_square(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (128, 160, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "captions.csv").write_text("a.png,a zebra\nb.png,a fox\n")
    pipe = stable_diffusion()
    inputs = load_inputs(judge("tiny", pipe), tmp_path, tmp_path / "captions.csv", 2, seed=0)
    middle = torch.from_numpy(pixels[:, 16:144]).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(middle).latent_dist.mean * pipe.vae.config.scaling_factor
        text = pipe.encode_prompt(["a zebra", "a fox"], "cpu", 1, False)[0]
    torch.testing.assert_close(inputs.latents[:1], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs.text, text)


def test_the_demo_model_is_judged_on_images_of_a_folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), "orange").save(tmp_path / name)
    (tmp_path / "captions.json").write_text('{"a.png": "a zebra", "b.png": "a fox"}')
    judged = load_judged("demo", device="cpu", dtype="bfloat16")
    inputs = load_inputs(judged, tmp_path, tmp_path / "captions.json", 2, seed=0)
    assert inputs.latents.shape == (2, 4, 64, 64) and inputs.latents.isfinite().all()
    with pytest.raises(BenchError, match="--model demo needs --images DIR"):
        load_inputs(judged, None, None, 2, seed=0)


def test_noise_depends_on_the_image_the_timestep_and_the_seed_alone():
    shape = torch.Size((3, 8, 8))
    one = noise_of(shape, 0, "a", 100)
    assert torch.equal(one, noise_of(shape, 0, "a", 100))
    for other in (noise_of(shape, 1, "a", 100), noise_of(shape, 0, "b", 100), noise_of(shape, 0, "a", 101)):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("scenario", [SD, AGENTS, Scenario("tomesd", AgentConfig(ratio=0.4, early=0.0))], ids=name_of)
def test_batch_size_and_order_change_nothing(judged, inputs, scenario):
    all_at_once = losses_at(judged, inputs, scenario, 500, batch_size=6)
    np.testing.assert_allclose(losses_at(judged, inputs, scenario, 500, batch_size=1), all_at_once, rtol=1e-4)
    order = [3, 0, 5, 1, 4, 2]
    np.testing.assert_allclose(losses_at(judged, inputs.take(order), scenario, 500), all_at_once[order], rtol=1e-4)


def test_the_rise_of_what_changes_nothing_is_exactly_zero(judged, inputs):
    unpatched = losses_at(judged, inputs, SD, 500)
    nothing = Scenario("agentsd", AgentConfig(ratio=0.0, early=0.0))
    assert np.array_equal(losses_at(judged, inputs, nothing, 500), unpatched)
    assert not np.array_equal(losses_at(judged, inputs, AGENTS, 500), unpatched)
    assert np.array_equal(losses_at(judged, inputs, SD, 500), unpatched)  # and the patch is gone
    row = make_rows([SD], [500], {("sd", 500): unpatched})[0]
    assert (row["rise"], row["standard_error"]) == (0.0, 0.0)


def test_standard_errors_of_the_shipped_probe_are_honest():
    judged = load_judged("probe", device="cpu")
    inputs = load_inputs(judged, None, None, 256, seed=9)
    unpatched = losses_at(judged, inputs, SD, 720, batch_size=32)
    losses = losses_at(judged, inputs, AGENTS, 720, batch_size=32)
    truth = rise_of(losses, unpatched).value
    assert truth > 0.05  # of all 256; what follows are runs of 24 of them
    random, covered = np.random.default_rng(0), []
    for _ in range(1000):
        some = random.choice(256, 24, replace=False)
        rise = rise_of(losses[some], unpatched[some])
        covered.append(abs(rise.value - truth) < 1.96 * rise.standard_error)
    assert 0.9 < np.mean(covered) < 0.98


# --- scenarios and rows -----------------------------------------------------------------------------------------------


def test_scenarios_are_all_different_and_none_is_unpatched_in_disguise():
    scenarios = make_scenarios(["sd", "tomesd", "agentsd"], (0.4, 0.0), list(ABLATIONS))
    names = [name_of(scenario) for scenario in scenarios]
    assert len(set(names)) == len(names) and names[0] == "sd"
    assert names[-2:] == ["mean-value-r0.4-early1", "no-attention-r0.4-early1"]
    assert "tomesd-r0" not in names and "agentsd-r0-early0" not in names
    for settings in ("early1-alpha0.15", "early1-agent-stride2", "early0-downsample"):
        assert f"agentsd-r0-{settings}" in names


def test_a_run_with_early_agents_has_the_losses_of_both_phases():
    agents = Scenario("agentsd", AgentConfig(ratio=0.4, early=1.0))
    merging = Scenario("agentsd", AgentConfig(ratio=0.4, early=0.0))
    alone = Scenario("agentsd", AgentConfig(ratio=0.0, early=1.0))
    cells = {}
    for timestep in (100, 900):
        cells["sd", timestep] = np.array([1.0, 1.0])
        cells[name_of(merging), timestep] = np.array([1.1, 1.1])
        cells[name_of(agents), timestep] = np.array([1.5, 1.5])
        cells[name_of(alone), timestep] = np.array([1.3, 1.3])
    runs = make_runs([SD, merging, agents, alone], (100, 900), cells, [100, 120, 140, 900])
    found = {(run["scenario"], run["early"]): run["rise"] for run in runs}
    assert found[name_of(agents), 0.4] == pytest.approx((3 * 0.1 + 0.5) / 4)
    assert found[name_of(agents), 0.0] == pytest.approx(0.1) == found[name_of(merging), 0.0]
    assert found[name_of(agents), 1.0] == pytest.approx(0.5)
    assert found[name_of(alone), 0.4] == pytest.approx(0.3 / 4)  # at ratio 0 the later phase is unpatched


def test_ablations_are_crossed():
    scenarios = make_scenarios(["sd"], (0.0,), ["alpha×agent-stride", "merge-ratio"])
    configs = [one.config for one in scenarios if one.method == "agentsd"]
    crossed = {(config.alpha, config.agent_stride) for config in configs if config.early == 1}
    assert crossed == {(alpha, stride) for alpha in (0.0, 0.025, 0.075, 0.15) for stride in (2, 3, 4, 6)}
    assert [config.ratio for config in configs if config.early == 0] == [0.2, 0.4, 0.6]
    assert len({name_of(one) for one in scenarios}) == len(scenarios) == 1 + 16 + 3 + 2
    assert make_scenarios(["sd"], (0.0,), ["alphaxagent-stride", "merge-ratio"]) == scenarios
    with pytest.raises(BenchError, match="'late×alpha': late is of the later phase; give both with a comma"):
        make_scenarios(["sd"], (0.0,), ["late×alpha"])


def test_runs_of_two_settings_have_the_losses_and_the_costs_of_both():
    agents = Scenario("agentsd", AgentConfig(ratio=0.0, early=1.0))
    merging = Scenario("agentsd", AgentConfig(ratio=0.4, early=0.0))
    cells = {("sd", t): np.array([1.0, 1.0]) for t in (100, 900)}
    cells |= {(name_of(agents), t): np.array([1.5, 1.5]) for t in (100, 900)}
    cells |= {(name_of(merging), t): np.array([1.1, 1.1]) for t in (100, 900)}
    costs = {"sd": Cost(1.0, 0.0, 9, 1.0), name_of(agents): Cost(0.4, 0.1, 1, 0.5)}
    costs |= {name_of(merging): Cost(None, None, 3, 0.7)}
    pairs = make_pairs([SD, agents, merging], (100, 900), cells, [100, 120, 140, 900], 1000, costs)
    found = {(row["agents"], row["later"], row["early"]): row for row in pairs}
    both = found[name_of(agents), name_of(merging), 0.4]
    assert both["rise"] == pytest.approx((3 * 0.1 + 0.5) / 4)
    assert both["unet"] == pytest.approx((3 * 0.7 + 0.5) / 4) and both["time"] is None  # merging was not timed
    alone = found[name_of(agents), "sd", 0.4]
    assert (alone["rise"], alone["time"]) == (pytest.approx(0.5 / 4), pytest.approx((3 + 0.4) / 4))
    assert found[None, "sd", 0.0]["rise"] == 0 and found[name_of(agents), None, 1.0]["unet"] == 0.5
    front = unbeaten(pairs)
    assert [row["rise"] for row in front] == sorted((row["rise"] for row in front), reverse=True)
    assert front[-1]["rise"] == 0 and front[0]["unet"] == min(row["unet"] for row in pairs)


def test_costs_are_those_of_describe_and_a_phase(judged, inputs, tmp_path, monkeypatch):
    from eval.denoising import costs

    monkeypatch.setitem(costs.ARCHITECTURES, "sd15", {"unet": dict(make_unet().config) | {"sample_size": 64}})
    costs._described.cache_clear()
    merging = Scenario("agentsd", AgentConfig(ratio=0.4, early=0.0))
    scenarios = [SD, Scenario("tomesd", merging.config), merging, AGENTS, Scenario("no-attention", AGENTS.config)]
    found = costs_of(scenarios, {name_of(AGENTS): [0.5, 0.4, 0.8]})
    costs._described.cache_clear()
    with agentsd.patched(make_unet(), AgentConfig(ratio=0.4, early=0.4)) as unet:
        report = agentsd.describe(unet, 512, 512)
    assert found["sd"].multiply_adds == report.self_attention_multiply_adds() and found["sd"].unet == 1
    assert found[name_of(AGENTS)] == Cost(
        0.5,
        pytest.approx(0.1),
        report.self_attention_multiply_adds(agentsd.Phase.AGENT),
        report.unet_fraction(agentsd.Phase.AGENT),
    )
    assert found[name_of(merging)].unet == report.unet_fraction(agentsd.Phase.MERGE) == found["tomesd-r0.4"].unet
    assert found["no-attention-r0.4-early1"] == Cost()
    single = costs_of([SD, AGENTS], {"sd": [1.0], name_of(AGENTS): [0.5]})
    assert single[name_of(AGENTS)].time is None and single["sd"].time == 1  # of a single round no speed-up

    calls = []
    monkeypatch.setattr(costs, "_seconds", lambda j, batch, one, t: calls.append(one) or (1.0 if one == SD else 0.5))
    times = measure_times(judged, inputs, [SD, merging, AGENTS], 800, 2, tmp_path, lambda one: "code")
    assert times == {"sd": [1.0], name_of(merging): [0.5] * 2, name_of(AGENTS): [0.5] * 2}
    assert calls == [SD, merging, SD, AGENTS, SD, AGENTS, SD, merging, SD, merging, SD, AGENTS]  # in turn
    calls.clear()
    assert measure_times(judged, inputs, [SD, AGENTS], 800, 2, tmp_path, lambda one: "code") == {
        "sd": [1.0], name_of(AGENTS): [0.5] * 2
    }  # fmt: skip
    assert not calls  # kept
    assert measure_times(judged, inputs, [SD, AGENTS], 800, 0, tmp_path / "none", str) == {"sd": [1.0]}


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_report_and_is_resumed(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        command, "costs_of", lambda scenarios, _: {name_of(one): Cost(None, None, 1, 1.0) for one in scenarios}
    )
    assert command.run(options(toy, tmp_path), "the command") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 6 * 2
    row = next(row for row in results["rows"] if row["scenario"] == "agentsd-r0.4-early1" and row["timestep"] == 800)
    unpatched = next(row for row in results["rows"] if row["method"] == "sd" and row["timestep"] == 800)
    assert row["rise"] == pytest.approx(row["loss"] / unpatched["loss"] - 1)
    assert (row["ratio"], row["early"], row["alpha"], row["broadcast_exponent"]) == (0.4, 1.0, 0.075, -0.15)
    assert row["images"] == 6 and row["standard_error"] > 0 == unpatched["rise"]
    text = (tmp_path / "results.md").read_text()
    assert "`the command`" in text and text in capsys.readouterr().out
    assert "do not cover a run" in text  # two timesteps, 100 and 800
    assert max(line.count("|") for line in text.splitlines()) <= 11
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 13

    # One cell was lost, one holds losses that no run would have: only the first is computed again.
    (tmp_path / "losses" / "sd" / "t0100.json").unlink()
    other = tmp_path / "losses" / "agentsd-r0.4-early1" / "t0800.json"
    kept = json.loads(other.read_text())
    other.write_text(json.dumps(kept | {"losses": [9.0] * 6}))
    computed = []
    monkeypatch.setattr(command, "losses_at", lambda *args: computed.append(args[2:4]) or losses_at(*args))
    command.run(options(toy, tmp_path), "the command")
    assert computed == [(SD, 100)]
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["loss"] for row in again if row["loss"] != 9.0} == {
        other["loss"] for other in results["rows"] if other != row
    }


def test_processes_share_the_cells(judged, inputs, tmp_path):
    scenarios, timesteps = [SD, AGENTS], (100, 500, 900)
    alone = command.measure(judged, inputs, scenarios, timesteps, tmp_path / "alone")
    parts = [command.measure(judged, inputs, scenarios, timesteps, tmp_path / "two", rank=r, count=2) for r in (0, 1)]
    assert not set(parts[0]) & set(parts[1])
    together = parts[0] | parts[1]
    assert set(together) == set(alone) and all(np.array_equal(together[cell], alone[cell]) for cell in alone)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": 1}, "--samples 1: must be at least 2"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": -1}, "--seed -1"),
        ({"timesteps": "100,1000"}, "--timesteps '100,1000': must be integers in 0 … 999"),
        ({"timesteps": "noisy"}, "--timesteps 'noisy'"),
        ({"methods": "sd,deepcache"}, "'deepcache' is unknown, use sd, tomesd, agentsd, mean-value, no-attention"),
        ({"ablate": "beta"}, "--ablate 'beta': 'beta' is unknown, use alpha, scale"),
        ({"ratios": "0.8"}, "ratio=0.8: at most 0.75 of the tokens can be merged"),
        ({"model": "/missing"}, "/missing"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"images": Path(".")}, "the probe takes patterns that it generates"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(toy, tmp_path, changed, message):
    with pytest.raises(BenchError) as error:
        command.run(options(toy, tmp_path / "out", **changed), "")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_another_run_is_refused(toy, tmp_path):
    command.claim(tmp_path, {"seed": 0, "images": 6})
    command.claim(tmp_path, {"seed": 0, "images": 6})
    with pytest.raises(BenchError, match="was made with images 6, not 12"):
        command.claim(tmp_path, {"seed": 0, "images": 12})


def test_a_loss_that_is_not_finite_is_told(judged, inputs):
    with torch.no_grad():
        judged.pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(BenchError, match="the loss of sd at timestep 500 is not finite for pattern 0: try --dtype"):
        losses_at(judged, inputs, SD, 500)


def test_a_loss_of_zero_is_told(judged, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "losses_at", lambda *_: np.zeros(6))
    with pytest.raises(BenchError, match="the unpatched loss at timestep 500 is 0"):
        command.measure(judged, inputs, [SD], [500], tmp_path)


def test_models_whose_loss_is_another_are_refused():
    with pytest.raises(BenchError, match="prediction_type='sample', not 'epsilon' and 'v_prediction'"):
        judge("m", stable_diffusion("sample"))
    with pytest.raises(BenchError, match="takes 9 channels, which is not what a StableDiffusionPipeline"):
        judge("m", stable_diffusion(in_channels=9))
    other = StableDiffusionImg2ImgPipeline(**stable_diffusion().components, requires_safety_checker=False)
    with pytest.raises(BenchError, match="is a StableDiffusionImg2ImgPipeline, but only StableDiffusionPipeline, "):
        judge("m", other)
    pipe = stable_diffusion()
    agentsd.apply_patch(pipe)
    with pytest.raises(BenchError, match="already patched"):
        losses_at(judge("m", pipe), Inputs(("a", "b"), torch.zeros(2, 4, 16, 16), torch.zeros(2, 7, 32)), SD, 500)


@pytest.mark.parametrize(
    ("scheduler", "options", "why"),
    [
        ("EDMEuler", {}, "counts noise levels"),
        ("EDMDPMSolverMultistep", {}, "counts noise levels"),
        ("EulerDiscrete", dict(timestep_type="continuous", prediction_type="v_prediction"), "counts noise levels"),
        ("FlowMatchEulerDiscrete", {}, "is one of flow matching"),
        ("DPMSolverMultistep", dict(use_flow_sigmas=True), "is one of flow matching"),
        ("CMStochasticIterative", {}, "has no schedule of betas"),
    ],
)
def test_models_of_another_noise_are_refused_by_their_own_scheduler(tmp_path, scheduler, options, why):
    """From a folder too, where another scheduler replaces the model's own before it is measured."""
    pipe = stable_diffusion()
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler")(**options)
    with pytest.raises(BenchError, match=f"m: its scheduler {why}"):
        judge("m", pipe)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(BenchError, match=f"its scheduler {why}"):
        load_judged(str(tmp_path), device="cpu")


def test_the_noise_of_a_model_is_that_of_its_own_scheduler(tmp_path):
    pipe = stable_diffusion()
    pipe.scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.001, beta_end=0.01, num_train_timesteps=500)
    pipe.save_pretrained(tmp_path)
    judged = load_judged(str(tmp_path), device="cpu")
    assert torch.equal(judged.signal, pipe.scheduler.alphas_cumprod)
    assert type(judged.pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (dict(time_cond_proj_dim=8), "takes the guidance scale as an input"),
        (dict(out_channels=8), "predicts 8 channels"),
    ],
)
def test_unets_that_predict_something_else_are_refused(unet, message):
    with pytest.raises(BenchError, match=message):
        judge("m", stable_diffusion(**unet))


def test_latents_have_the_mean_and_deviation_that_the_autoencoder_says(tmp_path):
    (tmp_path / "a cat").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a cat" / f"{number}.png")
    pipe = stable_diffusion()
    plain = load_inputs(judge("tiny", pipe), tmp_path, None, 2, seed=0).latents / pipe.vae.config.scaling_factor
    mean, std = [0.5, -1.0, 2.0, 0.0], [1.0, 2.0, 0.5, 4.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    found = load_inputs(judge("tiny", pipe), tmp_path, None, 2, seed=0).latents
    for channel in range(4):
        expected = (plain[:, channel] - mean[channel]) / std[channel] * pipe.vae.config.scaling_factor
        torch.testing.assert_close(found[:, channel], expected)


def test_images_and_captions_that_do_not_match_are_told(tmp_path):
    def refused(message, folder=tmp_path / "images", captions=None):
        with pytest.raises(BenchError, match=message):
            captioned_files(folder, captions)

    refused("there is no such folder")
    (tmp_path / "images").mkdir()
    refused("has no images in it")
    for name in ("b.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    refused("a.png has no caption: put the images into one folder per class, or give --captions")
    captions = tmp_path / "captions.json"
    captions.write_text('{"a.png": "a zebra"}')
    refused("has no caption for b.png", captions=captions)
    captions.write_text('{"a.png": "a zebra", "b.png": "a fox", "c.png": "an owl"}')
    refused("names c.png, which is not in", captions=captions)
    captions.write_text("[1]")
    refused("must be a JSON object or a CSV", captions=captions)
    captions.write_text('{"a.png": "a zebra", "b.png": "a fox"}')
    assert captioned_files(tmp_path / "images", captions) == [("a.png", "a zebra"), ("b.png", "a fox")]


def test_classes_take_turns(tmp_path):
    for name in ("fire_truck", "owl"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    found = captioned_files(tmp_path, None)
    captions = {
        "fire_truck": "A high quality photograph of a fire truck.",
        "owl": "A high quality photograph of a owl.",
    }
    assert all(caption == captions[file.split("/")[0]] for file, caption in found)
    assert {file for file, _ in found[:2]} == {"fire_truck/0.png", "owl/0.png"}  # the first of each, then the second
    assert len(set(found)) == 4 and found == captioned_files(tmp_path, None)


def test_imagenets_folders_have_the_protocols_names(tmp_path):
    for number in range(3):
        (tmp_path / f"n{number:08d}").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "n00000001" / "a.png")
    with pytest.raises(BenchError, match="its 3 folders have ImageNet's numbers, whose names are known only where all"):
        captioned_files(tmp_path, None)
    for number in range(3, 1000):
        (tmp_path / f"n{number:08d}").mkdir()
    assert captioned_files(tmp_path, None) == [("n00000001/a.png", "A high quality photograph of a goldfish.")]


def test_the_command_line_tells_in_one_sentence(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))  # the script replaces the first entry
    from eval import denoising_loss

    arguments = ["--model", str(toy), "--out", str(tmp_path / "out"), "--timesteps", "5000"]
    assert denoising_loss.main(arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1] == "denoising_loss: --timesteps '5000': must be integers in 0 … 999 with commas between"


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_patterns_repeat_and_depend_on_their_number_alone():
    images = pattern_images(0, range(40))
    assert images.shape == (40, 3, 24, 24) and images.isfinite().all()
    assert torch.equal(pattern_images(0, [7])[0], images[7])
    assert not torch.equal(pattern_images(1, [7])[0], images[7])
    assert abs(images.mean()) < 0.1 and 0.9 < images.std() < 1.1
    repeated = 0
    for image in images:
        periods = [p for p in range(4, 13) if torch.equal(image[:, p:], image[:, :-p])]
        across = [p for p in range(4, 13) if torch.equal(image[:, :, p:], image[:, :, :-p])]
        repeated += bool(periods and across)
    assert 25 < repeated < 40  # all kinds but the scattered tiles have a period


def test_patterns_at_twice_the_scale_are_twice_as_smooth():
    images = {scale: pattern_images(0, range(12), 48, scale) for scale in (1.0, 2.0)}
    rough = {scale: (some[..., 1:] - some[..., :-1]).square().mean().sqrt() for scale, some in images.items()}
    assert rough[1.0] / rough[2.0] == pytest.approx(2, rel=0.3)
    assert 0.9 < images[2.0].std() < 1.1
