"""apps/dreambooth: training against naive references, killed and resumed, in two processes, with LoRA; its output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from child import ENVIRONMENT
from conftest import SD_BETAS, call_unet, make_pipeline, make_text_encoder, make_tokenizer, make_unet, make_vae
from dreambooth import checkpoints, latents, validation
from dreambooth import run as running
from dreambooth.data import read_image
from dreambooth.draws import element_of, generator
from dreambooth.export import export
from dreambooth.run import run
from dreambooth.settings import DreamBoothSettings, UsageError
from dreambooth.training import Trainer
from PIL import Image
from safetensors.torch import load_file

import agentsd
from agentsd.config import Phase
from agentsd.patch import get_patch

ROOT = Path(__file__).parents[1]

UNET = "unet/diffusion_pytorch_model.safetensors"
SIDE = 64


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng((seed, i)).integers(0, 256, (SIDE + 9, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with models and images; nothing writes to it."""
    folder = tmp_path_factory.mktemp("dreambooth")
    make_pipeline().save_pretrained(folder / "model")
    velocity = diffusers.DDIMScheduler(**SD_BETAS, prediction_type="v_prediction")
    make_pipeline("sd2", scheduler=velocity).save_pretrained(folder / "velocity")
    write_images(folder / "subject", 3)
    write_images(folder / "class", 4, seed=1)
    return folder


@pytest.fixture
def settings(base, tmp_path):
    """Makes settings for a tiny model, with changes."""

    def make(**changes) -> DreamBoothSettings:
        fields = dict(
            model=base / "model", instance_data_dir=base / "subject", instance_prompt="a zebra", resolution=SIDE,
            learning_rate=1e-3, max_train_steps=3, device="cpu", output_dir=tmp_path / "out",
        )  # fmt: skip
        return DreamBoothSettings(**{**fields, **changes})

    return make


def with_prior(base: Path) -> dict:
    return dict(
        with_prior_preservation=True, class_data_dir=base / "class", class_prompt="a dog", num_class_images=4,
        prior_loss_weight=0.7,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*.safetensors")}


# --- killed and resumed -----------------------------------------------------------------------------------------------

STEPS = 12


def long_run(base: Path) -> dict:
    """Everything that has a state: agents, prior, accumulation, the text encoder, a schedule of the learning rate."""
    return dict(
        **with_prior(base), agents="both", max_train_steps=STEPS, gradient_accumulation_steps=2,
        train_text_encoder=True, lr_scheduler="cosine", lr_warmup_steps=2, checkpointing_steps=2,
        num_validation_images=1, validation_inference_steps=2, validation_steps=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(
        DreamBoothSettings(
            model=base / "model", instance_data_dir=base / "subject", instance_prompt="a zebra", resolution=SIDE,
            learning_rate=1e-3, device="cpu", output_dir=out, **long_run(base), validation_prompt="a zebra",
        )
    )  # fmt: skip
    return out


def assert_same_end(out: Path, undisturbed: Path) -> None:
    assert weights(out) == weights(undisturbed)
    records = [json.loads((folder / "training.json").read_text()) for folder in (out, undisturbed)]
    assert records[0]["losses"] == records[1]["losses"] and len(records[0]["losses"]) == STEPS
    assert len(records[0]["seconds_per_step"]) == STEPS and records[0]["finished"]
    assert not list(out.rglob("*.tmp")) and not list(out.rglob(".*"))


def test_validation_images_are_written_and_change_nothing(settings, base, undisturbed):
    assert sorted(path.name for path in (undisturbed / "validation").iterdir()) == [
        "step-10.png", "step-12.png", "step-5.png"
    ]  # fmt: skip
    run(settings(**long_run(base)))
    assert_same_end(settings().output_dir, undisturbed)


def test_resumed_after_a_kill_in_mid_write(settings, base, undisturbed, monkeypatch):
    """What was written of the checkpoint stays there, as a killed process leaves it, and is not taken for one."""
    out, rename = settings().output_dir, os.rename

    def die_at_step_6(source, target):
        if Path(target).name == "step-6":
            raise MemoryError("killed")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(os, "rename", die_at_step_6)
        patch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
        run(settings(**long_run(base), checkpoints_total_limit=None))
    assert [path.name for path in checkpoints.list_checkpoints(out)] == ["step-2", "step-4"]
    assert len(list((out / "checkpoints").glob(".step-6-*.tmp"))) == 1
    assert not (out / "model_index.json").exists() and not (out / "agentsd.json").exists()
    run(settings(**long_run(base), resume_from_checkpoint="latest"))
    assert_same_end(out, undisturbed)
    assert [path.name for path in checkpoints.list_checkpoints(out)] == ["step-12"]  # the limit is 1


def test_stopped_by_a_signal_it_keeps_the_last_step(settings, base, undisturbed, monkeypatch, capsys):
    step = Trainer.step

    def interrupted(trainer):
        if trainer.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted)
        run(settings(**long_run(base)))
    assert [path.name for path in checkpoints.list_checkpoints(settings().output_dir)] == ["step-3"]
    run(settings(**long_run(base), resume_from_checkpoint="step-3"))
    assert_same_end(settings().output_dir, undisturbed)
    run(settings(**long_run(base), resume_from_checkpoint="latest"))
    assert "is finished already, after 12 steps" in capsys.readouterr().out


def test_a_finished_model_is_not_trained_anew_from_zero(settings):
    """More steps than it was finished with, and no checkpoint to go on from."""
    run(settings(max_train_steps=2))
    before = weights(settings().output_dir)
    with pytest.raises(UsageError, match="finished after 2 steps and has no checkpoint.*another --output-dir"):
        run(settings(max_train_steps=3, resume_from_checkpoint="latest"))
    assert weights(settings().output_dir) == before


def test_the_command_killed_for_real(settings, base, undisturbed):
    out = settings().output_dir
    command = [sys.executable, str(ROOT / "apps" / "dreambooth.py"), "--learning_rate=1e-3", "--agents", "both"]
    fields = {**long_run(base), "model": base / "model", "instance_data_dir": base / "subject", "output_dir": out}
    fields |= {"instance_prompt": "a zebra", "resolution": SIDE, "device": "cpu"}
    for name, value in fields.items():
        command += [f"--{name}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not (out / "checkpoints" / "step-2").exists():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not (out / "agentsd.json").exists(), "it ended before it was killed"
    run(settings(**long_run(base), resume_from_checkpoint="latest"))
    assert_same_end(out, undisturbed)


def test_more_steps_later_are_the_same_steps(settings):
    whole, parts = settings().output_dir, settings().output_dir.with_name("parts")
    agents = dict(agents="both", config=agentsd.AgentConfig(early=0.9, agent_stride=(4, 2)))  # a pair, in JSON a list
    run(settings(max_train_steps=4, **agents))
    run(settings(output_dir=parts, max_train_steps=2, checkpointing_steps=2, **agents))
    run(settings(output_dir=parts, max_train_steps=4, resume_from_checkpoint="latest", **agents))
    assert weights(whole) == weights(parts)
    assert json.loads((parts / "training.json").read_text())["steps"] == 4


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_autoencoder(settings, base):
    trainer = Trainer(settings())
    trainer.prepare()
    vae = trainer.model.pipe.vae
    for i, path in enumerate(sorted((base / "subject").iterdir())):
        image = read_image(path, SIDE, "instance_data_dir")
        with torch.no_grad():
            posterior = vae.encode(image.pixels[None]).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(0, "posterior", "instance", i))
        expected = vae.config.scaling_factor * (posterior.mean + posterior.std * noise)
        assert torch.equal(trainer.images["instance"].latents[i], expected[0])
    assert trainer.images["instance"].latents.shape == (3, 4, SIDE // 8, SIDE // 8)


def test_latents_of_an_autoencoder_without_a_distribution():
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=1.5,
    )  # fmt: skip
    pixels = torch.rand(3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels[None]).latents[0] * 1.5
    assert torch.equal(latents.encode_image(vae, pixels, torch.Generator()), expected)


@pytest.mark.parametrize("model", ["model", "velocity"])
@pytest.mark.parametrize("encoder", [False, True], ids=["", "text-encoder"])
def test_loss_with_prior_preservation_is_the_naive_one(settings, base, model, encoder):
    """Each sample by itself, from the definition: ‖target − prediction‖², the class's weighted by 0.7."""
    chosen = settings(
        **with_prior(base), model=base / model, train_batch_size=2, gradient_accumulation_steps=2, seed=5,
        train_text_encoder=encoder,
    )  # fmt: skip
    trainer = Trainer(chosen)
    trainer.prepare()
    pipe = trainer.model.pipe
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    total = 0.0
    for name, prompt, weight in (("instance", "a zebra", 1.0), ("class", "a dog", 0.7)):
        text = pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach()
        kept = trainer.images[name].latents
        for sample in range(4):
            latent = kept[element_of(5, name, sample, len(kept))][None]
            draw = generator(5, "noise", name, sample)
            noise = torch.randn(latent.shape[1:], generator=draw)[None]
            t = int(torch.randint(1000, (1,), generator=draw))
            signal, spread = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
            with torch.no_grad():
                predicted = pipe.unet(signal * latent + spread * noise, torch.tensor([t]), text).sample
            target = noise if model == "model" else signal * noise - spread * latent
            total += weight * (predicted - target).square().mean().item() / 4
    assert trainer.step() == pytest.approx(total, rel=1e-5)


def test_every_image_comes_once_before_any_comes_again():
    orders = [[element_of(0, "instance", 5 * epoch + i, 5) for i in range(5)] for epoch in range(6)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize(
    "split", [dict(train_batch_size=4), dict(gradient_accumulation_steps=4)], ids=["batch", "accumulation"]
)
def test_batch_and_accumulation_are_the_same_samples(settings, base, split):
    def trained(**changes):
        # So large an epsilon makes AdamW's steps proportional to the gradients, which the order of sums changes little.
        rates = dict(adam_epsilon=1.0, learning_rate=0.3)
        trainer = Trainer(settings(**with_prior(base), **rates, agents="both", **changes))
        trainer.prepare()
        losses = [trainer.step() for _ in range(2)]
        return losses, trainer.model.pipe.unet.state_dict()

    losses, unet = trained(train_batch_size=2, gradient_accumulation_steps=2)
    first = load_file(base / "model" / UNET)
    assert max((unet[name] - tensor).abs().max() for name, tensor in first.items()) > 1e-2
    others, other = trained(**split)
    assert losses == pytest.approx(others, rel=1e-5)
    for name, tensor in unet.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_two_processes_are_the_same_samples(settings, base):
    """Two processes of gloo, as `accelerate launch` starts them, equal one with twice the batch."""
    out = settings().output_dir
    changes = dict(
        **with_prior(base), agents="both", train_text_encoder=True, gradient_accumulation_steps=2,
        class_inference_steps=1, checkpointing_steps=2, adam_epsilon=1.0, learning_rate=0.3,
    )  # fmt: skip
    changes |= dict(class_data_dir=out.parent / "generated", num_class_images=6)
    chosen = settings(**changes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Both are forked after the imports, which take longer than all else.
    code = f"""
import os, sys
import torch
from pathlib import PosixPath
torch.set_num_threads(1)
from dreambooth.run import run
from dreambooth.settings import DreamBoothSettings
child = os.fork()
rank = "0" if child else "1"
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
os.environ.update(ACCELERATE_USE_CPU="true")
run({chosen!r})
assert not torch.distributed.is_initialized()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the model is in") == 1
    assert len(list((out.parent / "generated").iterdir())) == 6
    record = json.loads((out / "training.json").read_text())
    assert record["settings"]["processes"] == 2

    single = settings(**{**changes, "train_batch_size": 2, "output_dir": out.with_name("single")})
    run(single)
    assert record["losses"] == pytest.approx(
        json.loads((single.output_dir / "training.json").read_text())["losses"], rel=1e-4
    )
    theirs = load_file(single.output_dir / UNET)
    for name, tensor in load_file(out / UNET).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("rank", [None, 2], ids=["weights", "lora"])
def test_gradient_checkpointing_changes_no_weight(settings, rank):
    def trained(checkpointing):
        trainer = Trainer(
            settings(agents="both", train_text_encoder=True, lora_rank=rank, gradient_checkpointing=checkpointing)
        )
        trainer.prepare()
        before = [parameter.detach().clone() for parameter in trainer.parameters]
        for _ in range(2):
            trainer.step()
        return before, trainer.parameters

    before, plain = trained(False)
    _, checkpointed = trained(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, checkpointed))
    # No weight of the text encoder is left out; LoRA's first factor moves once the second is no longer 0.
    assert not any(torch.equal(one, other) for one, other in zip(before, plain))


def test_trainers_take_turns(settings):
    """As a bench does that times their steps in turn, one of them in another precision."""

    def start(**changes):
        trainer = Trainer(settings(**changes))
        trainer.prepare()
        return trainer

    kinds = [dict(agents="both"), dict(mixed_precision="bf16"), dict(agents="none", gradient_checkpointing=True)]
    alone = [[trainer.step() for _ in range(3)] for trainer in map(lambda kind: start(**kind), kinds)]
    together = [start(**kind) for kind in kinds]
    in_turn = [[trainer.step() for trainer in together] for _ in range(3)]
    assert [list(losses) for losses in zip(*in_turn)] == alone
    assert alone[1] != alone[2] and alone[1] == pytest.approx(alone[2], rel=0.05)


# --- agents -----------------------------------------------------------------------------------------------------------


def test_agents_in_every_step(settings):
    trainer = Trainer(settings(agents="both"))
    trainer.prepare()
    patch = get_patch(trainer.model.pipe)
    assert patch.config.early == 1.0 and patch.layers
    seen = []
    for _ in range(12):
        trainer.step()
        assert patch.last_call.phase is Phase.AGENT
        assert set(patch.last_call.outcomes.values()) == {"active"}
        seen.append(patch.last_call.timestep)
    assert min(seen) < 300 and max(seen) > 700
    trainer.finish()
    assert get_patch(trainer.model.pipe) is None


@pytest.mark.parametrize(("agents", "patched"), [("none", False), ("sampling", True), ("both", True)])
def test_which_steps_have_agents(settings, monkeypatch, agents, patched):
    """Training has them with "both" alone; validation images with "sampling" too."""
    in_training, in_sampling = [], []
    step, generate = Trainer.step, validation.generate

    def noting_step(trainer):
        in_training.append(get_patch(trainer.model.pipe) is not None)
        return step(trainer)

    def noting_generate(pipe, *rest, **options):
        in_sampling.append(get_patch(pipe) and get_patch(pipe).config)
        return generate(pipe, *rest, **options)

    monkeypatch.setattr(Trainer, "step", noting_step)
    monkeypatch.setattr(validation, "generate", noting_generate)
    chosen = settings(agents=agents, validation_prompt="a zebra", validation_inference_steps=1, num_validation_images=2)
    run(chosen)
    assert in_training == [agents == "both"] * 3
    assert in_sampling == [chosen.agent_config] and (chosen.agent_config is not None) == patched
    if patched:
        assert chosen.agent_config.early == (1.0 if agents == "both" else 0.4)
    with Image.open(chosen.output_dir / "validation" / "step-3.png") as row:
        assert row.size == (2 * SIDE, SIDE)


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_exported_folder_is_an_ordinary_one(undisturbed, base):
    for path in (base / "model").rglob("*"):
        if path.suffix == ".safetensors":
            original, trained = load_file(path), load_file(undisturbed / path.relative_to(base / "model"))
            assert {k: (v.shape, v.dtype) for k, v in trained.items()} == {
                k: (v.shape, v.dtype) for k, v in original.items()
            }
            same = all(torch.equal(trained[key], original[key]) for key in original)
            assert same == (path.parent.name == "vae")  # UNet and text encoder were trained
        elif path.is_file():
            assert (undisturbed / path.relative_to(base / "model")).is_file()
    for path in undisturbed.glob("*/*.json"):
        if path.parent.name != "tokenizer" and "checkpoints" not in path.parts:
            text = path.read_text()
            assert "agentsd" not in text and "gradient_checkpointing" not in text
    pipe = diffusers.DiffusionPipeline.from_pretrained(undisturbed, safety_checker=None)
    assert get_patch(pipe) is None
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}

    told = json.loads((undisturbed / "agentsd.json").read_text())
    assert told.keys() == {"format", "agents", "config", "base_model", "lora", "instance_prompt", "versions"}
    assert told["agents"] == "both" and told["lora"] is None and told["base_model"] == str(base / "model")
    assert agentsd.AgentConfig(**told["config"]) == agentsd.AgentConfig(early=1.0)


def test_the_pipeline_in_memory_bears_no_trace(settings):
    trainer = Trainer(settings(agents="both", gradient_checkpointing=True, mixed_precision="bf16"))
    trainer.prepare()
    trainer.step()
    trainer.finish()
    unet = trainer.model.pipe.unet
    assert "forward" not in vars(unet) and not unet.is_gradient_checkpointing and not unet.training
    assert not any("agentsd" in name for module in unet.modules() for name in vars(module))
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    fresh = make_unet()
    fresh.load_state_dict(unet.state_dict())
    assert torch.equal(call_unet(unet), call_unet(fresh))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_file_gives_the_trained_model(settings, base, precision):
    chosen = settings(
        agents="both", lora_rank=2, train_text_encoder=True, gradient_checkpointing=True, mixed_precision=precision,
        learning_rate=1e-2, validation_prompt="a zebra", validation_inference_steps=1, num_validation_images=1,
    )  # fmt: skip
    trainer = Trainer(chosen)
    trainer.prepare()
    before = call_unet(make_unet())
    for _ in range(4):
        trainer.step()
    validation.write_validation(
        trainer.model.pipe, chosen, trainer.accelerator.device, chosen.output_dir / "v" / "row.png"
    )
    shutil.rmtree(chosen.output_dir / "v")
    trainer.finish()
    export(trainer.model.pipe, trainer.parts, chosen)
    assert sorted(path.name for path in chosen.output_dir.iterdir()) == [
        "agentsd.json",
        "pytorch_lora_weights.safetensors",
    ]
    assert json.loads((chosen.output_dir / "agentsd.json").read_text())["lora"] == "pytorch_lora_weights.safetensors"

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base / "model", safety_checker=None)
    names = load_file(chosen.output_dir / "pytorch_lora_weights.safetensors").keys()
    assert {name.split(".layers")[0] for name in names if name.startswith("text")} == {
        "text_encoder.text_model.encoder"
    }
    plain_text = pipe.encode_prompt("a zebra", "cpu", 1, False)[0]
    pipe.load_lora_weights(chosen.output_dir)
    trained, tolerance = (
        trainer.model.pipe,
        {"no": 1e-5, "bf16": 2e-2}[precision],
    )  # bf16: its frozen weights are halved
    for module in (trained.unet, trained.text_encoder):
        module.float()
    loaded = call_unet(pipe.unet)
    torch.testing.assert_close(loaded, call_unet(trained.unet), rtol=tolerance, atol=tolerance)
    assert (loaded - before).abs().max() > 5 * tolerance
    text = pipe.encode_prompt("a zebra", "cpu", 1, False)[0]
    torch.testing.assert_close(text, trained.encode_prompt("a zebra", "cpu", 1, False)[0], rtol=0, atol=5 * tolerance)
    assert (text - plain_text).abs().max() > 1e-3


def test_class_images_are_completed_and_kept(settings, base, tmp_path, monkeypatch):
    own = write_images(tmp_path / "class", 2)
    kept = {path: path.read_bytes() for path in own.iterdir()}
    prior = {**with_prior(base), "class_data_dir": own, "class_inference_steps": 1}

    def class_files():
        return {path.name: path.read_bytes() for path in own.iterdir()}

    trainer = Trainer(settings(**prior))
    trainer.prepare()
    whole = class_files()
    assert sorted(whole) == ["0.png", "1.png", "class-00000.png", "class-00001.png"]
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(trainer.images["class"].latents) == 4
    (own / "class-00001.png").unlink()  # as a killed run leaves the folder
    Trainer(settings(**prior)).prepare()
    assert class_files() == whole


def test_stable_diffusion_xl(settings, tmp_path):
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=make_vae(), text_encoder=make_text_encoder(), text_encoder_2=make_text_encoder(projection=32),
        tokenizer=make_tokenizer(), tokenizer_2=make_tokenizer(), unet=make_unet("sdxl"),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_BETAS), add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "xl")
    chosen = settings(model=tmp_path / "xl", agents="both", lora_rank=2, max_train_steps=1)
    trainer = Trainer(chosen)
    trainer.prepare()
    told = []
    trainer.model.pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(args + (kwargs["added_cond_kwargs"],)), with_kwargs=True
    )
    trainer.step()
    text, _, pooled, _ = pipe.encode_prompt("a zebra", device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(told[0][2], text) and torch.equal(told[0][3]["text_embeds"], pooled)
    # 73 × 64 pixels, cropped to the middle 64 rows.
    assert told[0][3]["time_ids"].tolist() == [[SIDE + 9, SIDE, 4, 0, SIDE, SIDE]]
    with pytest.raises(UsageError, match="leave it out for Stable Diffusion XL"):
        Trainer(settings(model=tmp_path / "xl", train_text_encoder=True)).prepare()
    run(chosen)
    pipe.load_lora_weights(chosen.output_dir)
    assert pipe.get_list_adapters()["unet"]


def test_a_full_disk_in_mid_training_keeps_the_last_checkpoint(settings, monkeypatch):
    save = torch.save

    def full(content, path):
        if "step-4" in str(path):
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UsageError, match="could not be written to after step 4 .*No space left.*go on with --resume"):
        running.run(settings(max_train_steps=6, checkpointing_steps=2))
    out = settings().output_dir
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    assert not (out / "model_index.json").exists()


def test_killed_while_it_exports(settings, monkeypatch):
    """The folder is no model until all parts are in it; going on completes it."""
    out, replace = settings().output_dir, os.replace

    def die_at_the_unet(source, target):
        if Path(target).name == "unet":
            raise MemoryError("killed")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(os, "replace", die_at_the_unet)
        run(settings(checkpointing_steps=2))
    assert (out / "text_encoder").exists() and not (out / "model_index.json").exists()
    assert not json.loads((out / "training.json").read_text())["finished"]
    run(settings(checkpointing_steps=2, resume_from_checkpoint="latest"))
    run(settings(output_dir=out.with_name("whole")))
    assert weights(out) == weights(out.with_name("whole")) and (out / "agentsd.json").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_on_a_gpu(gpu, settings, precision):
    """The same samples as on a CPU; autoencoder and text encoder make room for the UNet."""
    losses = {}
    for device in ("cpu", None):
        chosen = settings(agents="both", device=device, mixed_precision=precision if device is None else "no")
        trainer = Trainer(chosen)
        trainer.prepare()
        losses[device] = [trainer.step() for _ in range(3)]
    pipe = trainer.model.pipe
    assert pipe.unet.device.type == "cuda" and pipe.vae.device.type == pipe.text_encoder.device.type == "cpu"
    assert losses[None] == pytest.approx(losses["cpu"], rel=1e-3 if precision == "no" else 0.05)
    run(settings(agents="both", device=None, mixed_precision=precision, validation_prompt="a zebra"))
    assert json.loads((settings().output_dir / "training.json").read_text())["peak_bytes"] > 0
