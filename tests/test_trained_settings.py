"""agentsd.json: what a fine-tuned model was trained for is used where nothing else is given, said once, and checked."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from app_support import tiny_models
from conftest import call_unet, draw, make_pipeline
from PIL import Image
from playground.form import Form
from playground.jobs import Finished, Note, Run, Studio, methods_to_compare
from playground.script import script
from playground.settings import Limits, check

import agentsd
from agentsd import AgentConfig, cli
from agentsd.images.compare import compare_methods
from agentsd.images.generate import generate
from agentsd.images.pipelines import ModelError, load_pipeline
from agentsd.images.png import read_settings
from agentsd.images.request import Request
from agentsd.patch import get_patch
from agentsd.trained import Trained, read_trained, start_from

TRAINED = AgentConfig(early=1.0, ratio=0.3, agent_stride=(2, 4))
SAID = r"agentsd\.json: this model was trained with agents in every step; its settings \(ratio=0.3, early=1.0, agent_s"
REQUEST = Request("a zebra", steps=2, height=64, width=64)
CPU = ["--steps", "2", "--height", "64", "--width", "64", "--device", "cpu"]


def write(folder, **changes):
    fields = {"format": 1, "agents": "both", "config": dataclasses.asdict(TRAINED), "base_model": "demo", "lora": None}
    (folder / "agentsd.json").write_text(json.dumps(fields | {"instance_prompt": "a sks", "versions": {}} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mine"
    make_pipeline().save_pretrained(path)
    write(path)
    return path


@pytest.fixture
def pipe(folder):
    return load_pipeline(folder, device="cpu")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(tmp_path):
    assert read_trained(tmp_path) is None and read_trained(tmp_path / "missing") is None
    write(tmp_path, versions={"torch": "2"})
    file = tmp_path / "agentsd.json"
    assert read_trained(tmp_path) == Trained(file, "both", TRAINED, "demo", None, "a sks", {"torch": "2"})
    write(tmp_path, agents="none", config=None)
    assert read_trained(tmp_path).config is None and read_trained(tmp_path).sentence() == ""
    write(tmp_path, agents="sampling", config={"ratio": 0.4})
    assert read_trained(tmp_path).config == AgentConfig() and read_trained(tmp_path).sentence() == ""  # the defaults
    write(tmp_path, agents="sampling", config={"ratio": 0.5})
    assert "is to be sampled with agents; its settings (ratio=0.5) are used" in read_trained(tmp_path).sentence()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, "format=2: must be 1, the format that this version of agentsd reads"),
        ({"format": None}, "format=None: must be 1"),
        ({"agents": "all"}, "agents='all': must be one of none, sampling, both"),
        ({"agents": "none"}, "must be null where agents is none"),
        ({"config": None}, "config=None: must be an object of fields of AgentConfig"),
        ({"config": {"ratio": 2}}, "ratio=2: must be a number in 0 … 1"),
        ({"config": {"ratio": "much"}}, "ratio='much': must be a number"),
        ({"config": {"spread": 2}}, "unknown setting spread; the settings are ratio, early"),
        ({"config": {"preset": "fast"}}, "config: unknown setting preset; a preset has a name in apply_patch alone"),
        ({"config": {"preset": None, "ratio": 0.3}}, "config: unknown setting preset; a preset has"),
        ({"config": {"config": None}}, "config: unknown setting config; "),
        ({"agents": "sampling", "config": {"preset": "fast", "early": 1.0}}, "config: unknown setting preset"),
        ({"lora": "../lora.safetensors"}, "must be null or the name of a .safetensors file beside this one"),
        ({"lora": "lora.bin"}, "must be null or the name of a .safetensors file"),
        ({"lora": "a.safetensors", "base_model": ""}, "base_model='': must be the model that the LoRA belongs to"),
        ({"versions": 3}, "versions=3: must be an object"),
        ({"colour": 1}, "unknown field colour; the fields are format, agents"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(ValueError) as raised:
        read_trained(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'agentsd.json'}: ") and message in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_one_sentence_everywhere(tmp_path, capsys, content):
    (tmp_path / "agentsd.json").write_bytes(content)
    with pytest.raises(ValueError, match="agentsd.json: (is damaged|cannot be read)"):
        read_trained(tmp_path)
    with pytest.raises(ModelError, match="agentsd.json: "):
        load_pipeline(tmp_path, device="cpu")
    assert cli.main(["info", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"agentsd: {tmp_path / 'agentsd.json'}: ")


def test_what_wins_over_what():
    trained = Trained(None, "both", TRAINED)
    assert start_from(trained) == TRAINED
    assert start_from(trained, ratio=0.5) == dataclasses.replace(TRAINED, ratio=0.5)
    assert start_from(trained, AgentConfig()) == AgentConfig()
    assert start_from(trained, preset="paper") == AgentConfig()
    assert start_from(trained, preset="fast", early=0.2) == AgentConfig(cache_interval=3, early=0.2)
    assert start_from(None) == start_from(Trained(None, "none")) == AgentConfig()


# --- Python -----------------------------------------------------------------------------------------------------------


def test_the_patch_starts_from_the_trained_settings_and_says_so_once(pipe, tmp_path):
    assert get_patch(pipe) is None
    with pytest.warns(UserWarning, match=SAID) as caught:
        agentsd.apply_patch(pipe)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert get_patch(pipe).config == TRAINED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agentsd.apply_patch(pipe.unet, early=0.2)
        assert get_patch(pipe).config == dataclasses.replace(TRAINED, early=0.2)
        agentsd.apply_patch(pipe, preset="fast")
        assert get_patch(pipe).config == AgentConfig(cache_interval=3)
        agentsd.apply_patch(pipe, AgentConfig())
        assert get_patch(pipe).config == AgentConfig()
        with agentsd.patched(copy.deepcopy(pipe)) as other:
            assert get_patch(other).config == TRAINED
    pipe.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "agentsd.json").exists()
    agentsd.remove_patch(pipe)
    plain = load_pipeline(tmp_path / "again", device="cpu")
    plain.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, steps=1), draw(plain, steps=1))


def test_nothing_is_said_where_every_setting_is_given(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agentsd.apply_patch(pipe, early=0.4, ratio=0.4, agent_stride=4)
    assert get_patch(pipe).config == AgentConfig()


def test_images_carry_the_settings_that_were_used(pipe):
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match=SAID):
        image = generate(pipe, REQUEST)
    assert AgentConfig(**image.settings["patch"]) == TRAINED
    assert AgentConfig(**generate(pipe, REQUEST, config=AgentConfig()).settings["patch"]) == AgentConfig()
    found = compare_methods(pipe, REQUEST, methods=["agentsd"], rounds=1)
    assert AgentConfig(**found["agentsd"].settings["patch"]) == TRAINED
    found = agentsd.compare(pipe, "a", steps=1, height=64, width=64, methods=["agentsd"], rounds=1, ratio=0.5)
    assert AgentConfig(**found["agentsd"].settings["patch"]) == dataclasses.replace(TRAINED, ratio=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(load_pipeline(pipe.name_or_path, device="cpu"), REQUEST, "sd").settings["patch"] is None


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory, folder):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    path = tmp_path_factory.mktemp("lora")
    pipe = load_pipeline(folder, device="cpu")
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(path, unet_lora_layers=layers)
    write(path, base_model=str(folder), lora="pytorch_lora_weights.safetensors")
    return path, pipe


def test_a_lora_is_loaded_on_its_base_model(lora, folder):
    path, trained = lora
    pipe = load_pipeline(path, device="cpu", scheduler="ddim")
    assert pipe.name_or_path == str(path) and type(pipe.scheduler).__name__ == "DDIMScheduler"
    trained.scheduler = pipe.scheduler
    for one in (pipe, trained):
        one.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, steps=2), draw(trained, steps=2))
    base = load_pipeline(folder, device="cpu", scheduler="ddim")
    assert not torch.equal(draw(pipe, steps=2), draw(base, steps=2))
    with pytest.warns(UserWarning, match=SAID):
        agentsd.apply_patch(pipe)
    assert get_patch(pipe).config == TRAINED
    half = load_pipeline(path, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}


def test_a_lora_that_cannot_be_loaded(lora, tmp_path, folder):
    path, _ = lora
    write(tmp_path, base_model=str(folder), lora="pytorch_lora_weights.safetensors")
    with pytest.raises(ModelError, match="names the LoRA pytorch_lora_weights.safetensors, which is not beside it"):
        load_pipeline(tmp_path, device="cpu")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="pytorch_lora_weights.safetensors cannot be put on"):
        load_pipeline(tmp_path, device="cpu")
    write(tmp_path, base_model=str(tmp_path / "gone"), lora="pytorch_lora_weights.safetensors")
    with pytest.raises(ModelError, match="agentsd.json: its base_model cannot be loaded: there is no folder"):
        load_pipeline(tmp_path, device="cpu")
    write(tmp_path, base_model=str(path), lora="pytorch_lora_weights.safetensors")
    with pytest.raises(ModelError, match="is a LoRA too: give one with whole weights"):
        load_pipeline(tmp_path, device="cpu")


GONE = r"this UNet no longer has the LoRA that was trained for ratio=0.3, early=1.0"
LEFT_OVER = GONE + r".*the patch still has these settings: call agentsd.apply_patch again"


@pytest.fixture
def with_lora(lora):
    return load_pipeline(lora[0], device="cpu")


def load_style(pipe, lora):
    """The same matrices by another name, from a folder without agentsd.json's meaning."""
    pipe.load_lora_weights(lora[0], weight_name="pytorch_lora_weights.safetensors", adapter_name="style")


def exchange(pipe, lora):
    """Another LoRA by the name that the first one had."""
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora[0], weight_name="pytorch_lora_weights.safetensors")


def fuse_and_unload(pipe, lora):
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def switch(pipe, lora):
    load_style(pipe, lora)
    pipe.set_adapters(["style"])


REMOVALS = {
    "unload_lora_weights": lambda pipe, lora: pipe.unload_lora_weights(),
    "delete_adapters": lambda pipe, lora: pipe.delete_adapters(pipe.get_active_adapters()),
    "disable_lora": lambda pipe, lora: pipe.disable_lora(),
    "weight 0": lambda pipe, lora: pipe.set_adapters(pipe.get_active_adapters(), [0.0]),
    "another one switched to": switch,
    "another one of its name": exchange,
    "fused and unloaded": fuse_and_unload,
}


@pytest.mark.parametrize("way", REMOVALS)
def test_trained_settings_end_with_their_lora_and_it_is_told(with_lora, lora, way):
    pipe = with_lora
    with pytest.warns(UserWarning, match=SAID):
        agentsd.apply_patch(pipe)
    call_unet(pipe.unet)
    REMOVALS[way](pipe, lora)
    # The patch that is on it already keeps them, which the next call tells once.
    with pytest.warns(UserWarning, match=LEFT_OVER) as caught:
        call_unet(pipe.unet)
        call_unet(pipe.unet)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=GONE + r".*they are not used") as caught:
        agentsd.apply_patch(pipe)
        agentsd.apply_patch(pipe, alpha=0.1)
    assert len(caught) == 1 and get_patch(pipe).config == AgentConfig(alpha=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_unet(pipe.unet)


def test_a_lora_that_comes_back_brings_its_settings_back(with_lora):
    pipe = with_lora
    pipe.disable_lora()
    for _ in range(2):
        with pytest.warns(UserWarning, match=GONE + r".*they are not used"):
            agentsd.apply_patch(pipe)
        assert get_patch(pipe).config == AgentConfig()
        pipe.enable_lora()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first time they are announced
            agentsd.apply_patch(pipe)
        assert get_patch(pipe).config == TRAINED
        pipe.disable_lora()


@pytest.mark.parametrize("whole", [True, False], ids=["whole-weights", "lora"])
def test_another_lora_beside_trained_settings_is_told(pipe, with_lora, lora, whole):
    pipe = pipe if whole else with_lora
    with pytest.warns(UserWarning, match=SAID):
        agentsd.apply_patch(pipe)
    own = pipe.get_active_adapters()
    load_style(pipe, lora)
    pipe.set_adapters([*own, "style"])
    for act in (lambda: call_unet(pipe.unet), lambda: agentsd.apply_patch(pipe)):
        with pytest.warns(UserWarning, match=r"are used, and this UNet has another LoRA too \(style\)") as caught:
            act()
            act()
        assert len(caught) == 1
    assert get_patch(pipe).config == TRAINED
    pipe.set_adapters([*own, "style"], [1.0] * len(own) + [0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agentsd.apply_patch(pipe)
        call_unet(pipe.unet)


def test_a_fused_lora_and_settings_of_ones_own_are_no_reason_to_warn(with_lora, lora):
    pipe = with_lora
    with pytest.warns(UserWarning, match=SAID):
        agentsd.apply_patch(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.fuse_lora()
        call_unet(pipe.unet)
        other = copy.deepcopy(pipe)
        call_unet(other.unet)
        pipe.unfuse_lora()
        for settings in (dict(config=AgentConfig()), dict(preset="paper")):
            agentsd.apply_patch(pipe, **settings)
            pipe.unload_lora_weights()
            call_unet(pipe.unet)
        agentsd.remove_patch(pipe)
        call_unet(pipe.unet)
        agentsd.apply_patch(pipe, early=0.4, ratio=0.4, agent_stride=4)  # nothing is left of the trained ones
        call_unet(pipe.unet)
    other.unload_lora_weights()
    with pytest.warns(UserWarning, match=LEFT_OVER):
        call_unet(other.unet)


@pytest.mark.parametrize("rank", [None, 2], ids=["whole-weights", "lora"])
def test_what_the_training_writes_is_what_is_read(tmp_path, folder, rank):
    from dreambooth.run import run
    from dreambooth.settings import DreamBoothSettings, default_config

    Image.new("RGB", (64, 64), "red").save(tmp_path / "subject.png")
    settings = DreamBoothSettings(
        tmp_path, "a sks", tmp_path / "out", model=folder, resolution=64, max_train_steps=1, learning_rate=1e-2,
        lora_rank=rank, agents="both", config=default_config("both", ratio=0.3, agent_stride=(2, 4)), device="cpu",
    )  # fmt: skip
    run(settings)
    trained = read_trained(tmp_path / "out")
    assert (trained.agents, trained.config, trained.instance_prompt) == ("both", TRAINED, "a sks")
    pipe, base = (load_pipeline(path, device="cpu", scheduler="ddim") for path in (tmp_path / "out", folder))
    with pytest.warns(UserWarning, match=SAID):
        agentsd.apply_patch(pipe)
    assert get_patch(pipe).config == TRAINED
    agentsd.remove_patch(pipe)
    for one in (pipe, base):
        one.set_progress_bar_config(disable=True)
    assert (draw(pipe, steps=2) - draw(base, steps=2)).abs().max() > 0.01  # the trained weights are in it


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_uses_them_says_so_and_records_what_it_used(capsys, tmp_path, folder, lora):
    def settings(*arguments, model=folder):
        file = tmp_path / "image.png"
        command = ["generate", "a", "-o", str(file), "--overwrite", "--model", str(model)]
        assert cli.main([*command, *CPU, *arguments]) == 0
        return read_settings(file), capsys.readouterr().err

    found, said = settings()
    assert AgentConfig(**found["patch"]) == TRAINED and "trained with agents in every step" in said
    assert said.count("are used where none are given") == 1
    found, said = settings("--early", "0.2", "--patch-seed", "7")
    assert AgentConfig(**found["patch"]) == dataclasses.replace(TRAINED, early=0.2, seed=7)
    assert "(ratio=0.3, agent_stride=(2, 4))" in said
    found, said = settings("--preset", "paper")
    assert AgentConfig(**found["patch"]) == AgentConfig() and "trained with agents" not in said
    found, said = settings("--method", "sd")
    assert found["patch"] is None and "trained with agents" not in said
    found, _ = settings("--compare", "--rounds", "1")
    assert AgentConfig(**found["compare"][-1]["patch"]) == TRAINED
    found, said = settings(model=lora[0])
    assert found["model"] == str(lora[0]) and AgentConfig(**found["patch"]) == TRAINED and "trained with agents" in said


def test_info_describes_the_trained_settings(capsys, folder):
    assert cli.main(["info", "--json", "--model", str(folder), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["config"]["early"] == 1 and "trained with agents in every step" in err


# --- the app ----------------------------------------------------------------------------------------------------------


def test_the_app_uses_them_where_the_request_says_nothing(folder):
    names, limits = ("demo", str(folder)), Limits()
    assert check({"prompt": "a", "model": str(folder)}, names, limits).config == TRAINED
    assert check({"prompt": "a", "model": str(folder), "early": 0.4}, names, limits).config.early == 0.4
    assert check({"prompt": "a"}, names, limits).config == AgentConfig()
    code = script(check({"prompt": "a", "model": str(folder), "early": 0.5}, names, limits))
    assert "apply_patch(pipe, ratio=0.3, early=0.5)" in code  # the script's apply_patch knows the others
    usual = {"early": 0.4, "ratio": 0.4, "agent_stride": "4"}
    assert 'apply_patch(pipe, preset="paper")' in script(
        check({"prompt": "a", "model": str(folder), **usual}, names, limits)
    )


def test_the_form_shows_them_for_the_model_that_has_them(folder):
    import gradio as gr
    from playground.context import Context
    from playground.outputs import Outputs
    from playground.settings import PATCH_FIELDS, patch_values

    def form(*names):
        with gr.Blocks():
            return Form(Context(Studio(tiny_models(*names)), Outputs(folder), Limits()))

    own = form(str(folder))
    assert own.preset.value == "as trained" and own.controls["early"].value == 1
    assert own.controls["agent_stride"].value == "2x4"
    both = form("demo", str(folder))
    assert both.preset.value == "paper" and both.controls["early"].value == 0.4

    def chosen(**changes):
        values = {name: control.value for name, control in both.controls.items()} | changes
        return dict(zip(PATCH_FIELDS, both._choose_model(*values.values())))

    assert chosen(model=str(folder))["early"] == 1
    shown = patch_values(TRAINED)
    assert chosen(**shown)["early"] == 0.4  # back to a model without any
    assert chosen(**shown | {"ratio": 0.5})["early"] == gr.skip()  # the visitor's own settings stay
    values = {name: control.value for name, control in both.controls.items()} | shown
    assert both._derived(*(values | {"model": str(folder)}).values())[2] == "as trained"
    assert both._derived(*values.values())[2] == "own settings"
    assert both._choose_preset("as trained", str(folder)) == list(shown.values())
    assert "trained" not in str(form("demo").preset.choices)


def test_a_run_of_the_app_says_that_it_uses_them(folder):
    studio = Studio(tiny_models(str(folder)))
    values = {"prompt": "a", "steps": 1, "width": 64, "height": 64, "rounds": 1}
    for more, told in (({}, True), ({"early": 0.4}, False)):
        settings = check(values | more, (str(folder),), Limits())
        reports = list(studio.generate(Run(), settings, methods_to_compare(settings.config)[-1:]))
        assert any("was trained for" in report.text for report in reports if isinstance(report, Note)) == told
        used = next(report for report in reports if isinstance(report, Finished)).generated.settings["patch"]
        assert AgentConfig(**used) == settings.config
    studio.worker.close()
