"""eval/common, protocol and scenarios: prompts, seeds, grids, and that each scenario does to a UNet what it says."""

from __future__ import annotations

import pytest
import tomesd
import torch
from conftest import call_unet, draw, make_pipeline

import agentsd
from agentsd import AgentConfig
from agentsd.patch import get_patch
from eval.common import methods
from eval.common.methods import check_packages
from eval.common.protocol import (
    ABLATIONS,
    METHODS,
    METHODS_WITH_CONFIG,
    BenchError,
    Plan,
    Scenario,
    choose_classes,
    demo_classes,
    image_seed,
    imagenet_classes,
    make_scenarios,
    parse_methods,
    parse_numbers,
    rivals_of,
)
from eval.common.scenarios import use_scenario

CLASSES = ((3, "zebra"), (7, "hot dog"), (9, "lemon"))


def test_imagenet_classes_are_a_thousand_and_all_different():
    pytest.importorskip("torchvision")
    names = imagenet_classes()
    assert len(names) == 1000 and len({name.lower() for name in names}) == 1000
    assert names[0] == "tench" and names[340] == "zebra" and names[999] == "toilet tissue"
    assert "crane" not in names and names[134] == "crane bird" and names[517] == "construction crane"


def test_demo_classes_are_what_the_tokenizer_knows_as_words():
    from conftest import make_tokenizer

    names, tokenizer = demo_classes(), make_tokenizer()
    assert len(names) == 121 and names == sorted(names)
    for name in names:
        assert tokenizer.tokenize(name) == [f"{word}</w>" for word in name.split()]


def test_images_have_seeds_and_files_of_their_own():
    plan = Plan(CLASSES, copies=2)
    assert [sample.prompt for sample in plan.samples][:2] == [
        "A high quality photograph of a zebra.",
        "A high quality photograph of a hot dog.",
    ]
    assert len({sample.seed for sample in plan.samples}) == len({sample.file for sample in plan.samples}) == 6
    assert plan.samples[1].file == "0007-hot_dog-0.png"
    # A picture's seed depends on nothing but run seed, class and copy.
    fewer = Plan(CLASSES[1:], copies=5, batch_size=4, steps=9)
    seeds = {(sample.index, sample.copy): sample.seed for sample in fewer.samples}
    assert all(seeds.get((p.index, p.copy), p.seed) == p.seed for p in plan.samples)
    assert Plan(CLASSES, seed=1).samples[0].seed != plan.samples[0].seed
    assert image_seed(0, 3, 0) == 2440853828  # a change here makes old results another experiment
    assert [len(batch) for batch in fewer.batches] == [4, 4, 2]
    assert [sample for batch in fewer.batches for sample in batch] == list(fewer.samples)
    assert len({image_seed(0, i, j) for i in range(1000) for j in range(2)}) == 2000


def test_classes_are_spread_over_the_list():
    names = [str(i) for i in range(1000)]
    assert [index for index, _ in choose_classes(names, 4)] == [0, 250, 500, 750]
    assert choose_classes(names, 1000) == tuple(enumerate(names))
    for count in (0, 1001):
        with pytest.raises(BenchError, match=f"--classes {count}: must lie in 1 … 1000"):
            choose_classes(names, count)


def test_the_papers_table_as_scenarios():
    scenarios = make_scenarios(METHODS, (0.1, 0.2, 0.3, 0.4, 0.5))
    assert [scenario.name for scenario in scenarios] == [
        "sd", "sd-naive",
        *(f"tomesd-r{r}" for r in (0.1, 0.2, 0.3, 0.4, 0.5)),
        *(f"agentsd-r{r}" for r in (0.1, 0.2, 0.3, 0.4, 0.5)),
        "deepcache-3", "tgate", "fewer-steps-3", "mean-value-r0.5", "no-attention-r0.5", "limit",
    ]  # fmt: skip


def test_ablations_and_intervals_as_scenarios():
    names = [scenario.name for scenario in make_scenarios(["agentsd"], (0.5,), ablate=["alpha", "scale", "early"])]
    assert names == [
        "sd", "agentsd-r0.5", "agentsd-r0.5-alpha0", "agentsd-r0.5-alpha0.025", "agentsd-r0.5-alpha0.15",
        "agentsd-r0.5-scale-0.5", "agentsd-r0.5-scale-0.25", "agentsd-r0.5-scale-0.05",
        "agentsd-r0.5-early0.2", "agentsd-r0.5-early0.6", "agentsd-r0.5-early0.8",
    ]  # fmt: skip
    crossed = [scenario.name for scenario in make_scenarios(["agentsd"], (0.5,), ablate=["alpha-early", "alpha"])]
    assert len(crossed) == 1 + 9 + 1 and "agentsd-r0.5-early0.8-alpha0.15" in crossed  # each once
    for ablation in ABLATIONS.values():  # each holds the default, to be compared with
        assert any(AgentConfig(**settings) == AgentConfig() for settings in ablation)
    names = [scenario.name for scenario in make_scenarios(["sd"], (0.4,), ablate=["late", "agents", "tile", "presets"])]
    assert names == [
        "sd", "agentsd-r0.4", "agentsd-r0.4-downsample", "agentsd-r0.4-downsample-stride4", "agentsd-r0.4-full",
        "agentsd-r0.4-agents256", "agentsd-r0.4-agents64", "agentsd-r0.4-agents16",
        "agentsd-r0.4-tile16", "agentsd-r0.4-tile8", "agentsd-r0.4-cache3",
        "agentsd-r0.4-downsample-agents256-keys1024-tile16-cache5", "agentsd-r0.4-downsample-agents256-keys1024-tile16",
        "agentsd-r0-early0-cache3",
    ]  # fmt: skip
    cached = make_scenarios(["agentsd", "deepcache", "tgate"], (0.2, 0.4), intervals=(2, 5))
    names = ["sd", "agentsd-r0.2", "agentsd-r0.4", "agentsd-r0.4-cache2", "agentsd-r0.4-cache5"]
    assert [scenario.name for scenario in cached] == [*names, "deepcache-2", "deepcache-5", "tgate"]
    assert [scenario.cache_interval for scenario in cached] == [1, 1, 1, 2, 5, 2, 5, 1]
    assert make_scenarios(["sd"], (0.4,)) == [Scenario("sd")]


def test_agentsd_is_compared_with_its_rivals():
    methods = ["tomesd", "agentsd", "no-attention", "deepcache"]
    scenarios = make_scenarios(methods, (0.2, 0.4), ablate=["alpha"], intervals=(3, 5))
    names = ["agentsd-r0.2", "agentsd-r0.4", *(f"agentsd-r0.4-alpha{alpha}" for alpha in ("0", "0.025", "0.15"))]
    expected = {(name, "tomesd"): "tomesd-r0.2" if "r0.2" in name else "tomesd-r0.4" for name in names}
    expected |= {(f"agentsd-r0.4-cache{n}", "deepcache"): f"deepcache-{n}" for n in (3, 5)}
    assert rivals_of(iter(scenarios)) == rivals_of(scenarios[::-1]) == expected
    without = [s for s in scenarios if s.name not in ("tomesd-r0.2", "deepcache-5")]
    gone = {(names[0], "tomesd"), ("agentsd-r0.4-cache5", "deepcache")}
    assert rivals_of(without).keys() == expected.keys() - gone


def test_the_limit_computes_the_four_projections_and_mixes_nothing(pipe):
    with agentsd.patched(pipe):
        layer = next(
            m for m in pipe.unet.modules() if type(getattr(m, "processor", None)).__name__ == "AgentAttnProcessor"
        )
    seen = {}
    hooks = [layer.register_forward_hook(lambda module, args, out: seen.update(input=args[0], output=out))]
    for name in ("to_q", "to_k"):  # their results go nowhere, but their time counts
        hooks.append(layer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.update({name: True})))
    try:
        late, early = output(pipe, "limit", 100), output(pipe, "limit", 900)
        with torch.no_grad():
            expected = layer.to_out[0](layer.to_v(seen["input"]))
        assert torch.equal(seen["output"], expected) and seen["to_q"] and seen["to_k"]
    finally:
        for hook in hooks:
            hook.remove()
    assert not torch.equal(late, output(pipe, "sd", 100)) and not torch.equal(early, output(pipe, "sd", 900))


@pytest.mark.parametrize("text", ["", "a", "0.4,", "0.4;0.5", "-0.1", "0.8", "nan", "1", "inf"])
def test_lists_of_numbers_with_nonsense(text):
    with pytest.raises(BenchError, match="--ratios .*: must be numbers in 0 … 0.75 with commas between"):
        parse_numbers("ratios", text, 0.0, 0.75)
    with pytest.raises(BenchError, match="--sizes .*: must be multiples of 8 in 64 … 8192 with commas between"):
        parse_numbers("sizes", text, 64, 8192, 8)


def test_other_nonsense():
    assert parse_numbers("ratios", "0.1, 0.2,0.1", 0.0, 0.75) == (0.1, 0.2)
    assert parse_numbers("sizes", "512,64", 64, 8192, 8) == (512, 64)
    assert parse_methods("sd, agentsd,sd") == ("sd", "agentsd")
    for call, message in [
        (lambda: parse_methods("sd,magic"), "'magic' is unknown, use sd, sd-naive"),
        (lambda: parse_numbers("sizes", "100", 64, 8192, 8), "--sizes '100'"),
        (lambda: parse_numbers("n", "1,3", 2, 20), "--n '1,3': must be integers in 2 … 20"),
        (lambda: make_scenarios(["agentsd"], (0.4,), ablate=["beta"]), "use alpha, scale, early"),
        (lambda: make_scenarios(["agentsd"], (0.4,), early=1.5), "early=1.5"),
        (lambda: Scenario("magic"), "is unknown"),
        (lambda: Plan(()), "--classes"),
        (lambda: Plan(CLASSES, steps=0), "--steps 0"),
        (lambda: Plan(CLASSES, size=100), "multiple of 8"),
        (lambda: Plan(CLASSES, guidance=-1), "--guidance"),
        (lambda: Plan(CLASSES, batch_size=0), "--batch-size 0"),
    ]:
        with pytest.raises(BenchError, match=message):
            call()


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def scenario_of(method, **settings):
    config = AgentConfig(**settings) if method in METHODS_WITH_CONFIG else None
    return Scenario(method, config, interval=3 if method in ("deepcache", "fewer-steps") else 1)


def output(pipe, method, timestep, **settings):
    with use_scenario(pipe, scenario_of(method, **settings)):
        return call_unet(pipe.unet, timestep=timestep)


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method not in ("deepcache", "tgate", "fewer-steps")]
)
def test_every_scenario_leaves_the_model_as_it_was(pipe, method):
    plain, processors = call_unet(pipe.unet), pipe.unet.attn_processors
    changed = output(pipe, method, 900)
    assert torch.equal(call_unet(pipe.unet), plain) and pipe.unet.attn_processors == processors
    assert get_patch(pipe) is None
    difference = (changed - plain).abs().max()
    assert difference < 1e-4 if method.startswith("sd") else difference > 1e-4


@pytest.mark.parametrize("patch", [agentsd, tomesd])
def test_a_patched_pipeline_is_refused_for_every_method(pipe, patch):
    patch.apply_patch(pipe)
    try:
        for method in METHODS:
            with pytest.raises(BenchError, match="(?i)already patched by " + patch.__name__ + ".*remove_patch"):
                output(pipe, method, 900)
    except Exception:
        patch.remove_patch(pipe)
        raise
    patch.remove_patch(pipe)
    vars(pipe.unet).pop("_tome_info", None)


def test_controls_are_agentsd_but_for_the_agent_phase(pipe, recwarn):
    late = output(pipe, "agentsd", 100)
    early = {method: output(pipe, method, 900) for method in ("agentsd", "mean-value", "no-attention")}
    assert not torch.equal(early["agentsd"], early["mean-value"])
    assert not torch.equal(early["no-attention"], early["mean-value"])
    for method in ("mean-value", "no-attention"):
        assert torch.equal(output(pipe, method, 100), late)
    assert not [warning for warning in recwarn if "agentsd" in str(warning.message)]


def test_what_the_controls_put_in_place_of_attention(pipe):
    seen = {}
    with agentsd.patched(pipe):
        layer = next(
            m for m in pipe.unet.modules() if type(getattr(m, "processor", None)).__name__ == "AgentAttnProcessor"
        )
    hook = layer.register_forward_hook(lambda module, args, out: seen.update(input=args[0], output=out))
    try:
        output(pipe, "no-attention", 900)
        assert seen["output"].shape == seen["input"].shape and not seen["output"].any()
        output(pipe, "mean-value", 900)
        with torch.no_grad():
            value = layer.to_out[0](layer.to_v(seen["input"]).mean(1, keepdim=True))
        assert torch.allclose(seen["output"], value.expand_as(seen["input"]), atol=1e-6)
    finally:
        hook.remove()


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_those_before_it(pipe, method):
    scenario = scenario_of(method)

    def one(seed):
        generator = torch.Generator().manual_seed(seed)
        with use_scenario(pipe, scenario) as call:
            return call("a zebra", num_inference_steps=4, generator=generator, output_type="latent").images

    first = one(1)
    one(2)
    torch.manual_seed(5)
    assert torch.equal(one(1), first)


@pytest.mark.parametrize("method, whole", [("deepcache", 2), ("tgate", 6), ("fewer-steps", 3)])
def test_methods_that_change_whole_runs_leave_nothing(pipe, method, whole):
    plain = draw(pipe, steps=5)
    calls = []
    hook = pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    options = dict(num_inference_steps=5, guidance_scale=5.0, output_type="latent")
    with use_scenario(pipe, scenario_of(method)) as call:
        cached = call("a zebra", generator=torch.Generator().manual_seed(0), **options).images
    hook.remove()
    assert len(calls) == whole and not torch.equal(cached, plain)  # of 6 UNet calls, which PLMS makes in 5 steps
    assert torch.equal(draw(pipe, steps=5), plain) and not hasattr(pipe, "tgate")
    assert not any({"forward", "cache"} & vars(module).keys() for module in pipe.unet.modules())


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    check_packages(["sd"])
    for method, package in (("deepcache", "DeepCache"), ("tgate", "tgate")):
        with pytest.raises(BenchError, match=f"{package} is not installed: pip install {package}, or leave {method}"):
            check_packages([method])
