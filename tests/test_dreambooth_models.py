"""apps/dreambooth: which models can be trained, their noise and latents, and class images in the right precision."""

from __future__ import annotations

import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import SD_BETAS, draw, make_pipeline, make_text_encoder, make_tokenizer, make_unet, make_vae
from dreambooth import models, sampling
from dreambooth.latents import encode_image
from dreambooth.settings import DreamBoothSettings, UsageError
from dreambooth.training import Trainer
from PIL import Image

from agentsd.images.latents import scale_latents, unscale_latents
from agentsd.images.noise import why_not_ddpm
from agentsd.images.pipelines import ModelError, load_pipeline, set_scheduler

SIDE = 64
STATISTICS = dict(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[1.0, 2.0, 0.5, 4.0])


def settings(**changes) -> DreamBoothSettings:
    return DreamBoothSettings("subject", "a zebra", "out", **{"resolution": SIDE, "device": "cpu", **changes})


def make_xl(**vae) -> diffusers.StableDiffusionXLPipeline:
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=make_vae(), text_encoder=make_text_encoder(), text_encoder_2=make_text_encoder(projection=32),
        tokenizer=make_tokenizer(), tokenizer_2=make_tokenizer(), unet=make_unet("sdxl"),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_BETAS), add_watermarker=False,
    )  # fmt: skip
    pipe.vae.register_to_config(**vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def load(monkeypatch):
    """load_model of a pipeline in memory."""

    def loaded(pipe, **changes):
        monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pipe)
        return models.load_model(settings(**changes))

    return loaded


# --- noise ------------------------------------------------------------------------------------------------------------

OTHER_NOISE = {
    "EDM Euler": (diffusers.EDMEulerScheduler, {}, "counts noise levels"),
    "EDM DPM": (diffusers.EDMDPMSolverMultistepScheduler, {}, "counts noise levels"),
    "continuous Euler": (diffusers.EulerDiscreteScheduler, dict(timestep_type="continuous"), "counts noise levels"),
    "continuous velocity": (
        diffusers.EulerDiscreteScheduler,
        dict(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True),
        "counts noise levels",
    ),
    "flow Euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}, "is one of flow matching"),
    "flow Heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}, "is one of flow matching"),
    "flow sigmas": (diffusers.DPMSolverMultistepScheduler, dict(use_flow_sigmas=True), "is one of flow matching"),
    "flow prediction": (
        diffusers.UniPCMultistepScheduler,
        dict(prediction_type="flow_prediction", use_flow_sigmas=True),
        "is one of flow matching",
    ),
    "trigonometric flow": (diffusers.SCMScheduler, {}, "is one of flow matching"),
    "consistency": (diffusers.CMStochasticIterativeScheduler, {}, "has no schedule of betas"),
    "its own sigmas": (diffusers.IPNDMScheduler, {}, "has no schedule of betas"),
    "shifted": (diffusers.CogVideoXDDIMScheduler, {}, "shifts its schedule of betas"),
    "the image": (diffusers.DDIMScheduler, dict(prediction_type="sample"), "prediction_type='sample'"),
}


@pytest.mark.parametrize("name", OTHER_NOISE)
def test_models_of_another_noise_are_refused_and_not_trained_as_epsilon(load, name):
    kind, options, why = OTHER_NOISE[name]
    pipe = make_pipeline()
    pipe.scheduler = kind(**options)
    with pytest.raises(UsageError, match=f"--model demo: its scheduler .*{why}.*; only models that were trained with"):
        load(pipe)


@pytest.mark.parametrize("name", [name for name in OTHER_NOISE if name != "the image"])
def test_a_model_of_another_noise_gets_no_scheduler_of_ddpms(name):
    """It would sample noise in silence, with the few settings that both have in common."""
    kind, options, why = OTHER_NOISE[name]
    pipe = types.SimpleNamespace(scheduler=kind(**options))
    with pytest.raises(ValueError, match=f"scheduler='ddim': is not for this model, as its scheduler {why}.*leave it"):
        set_scheduler(pipe, "ddim")
    assert type(pipe.scheduler) is kind


def test_the_noise_of_training_is_that_of_the_models_own_scheduler(load):
    """Also where a scheduler's defaults are not DDPM's, which a copy of its configuration would take."""
    pipe = make_pipeline()
    for name in ("PNDM", "DDIM", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "LCM",
                 "TCD", "UniPCMultistep", "DEISMultistep"):  # fmt: skip
        for options in ({}, SD_BETAS, dict(SD_BETAS, prediction_type="v_prediction", num_train_timesteps=500)):
            pipe.scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
            schedule = load(pipe).noise_scheduler
            torch.testing.assert_close(schedule.alphas_cumprod, pipe.scheduler.alphas_cumprod, rtol=0, atol=1e-6)
            assert schedule.config.prediction_type == options.get("prediction_type", "epsilon")
            assert schedule.config.num_train_timesteps == options.get("num_train_timesteps", 1000)
    terminal = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    exponential = diffusers.HeunDiscreteScheduler(beta_schedule="exp")
    for scheduler in (terminal, exponential):
        assert why_not_ddpm(scheduler) is None
        pipe.scheduler = scheduler
        assert torch.equal(load(pipe).noise_scheduler.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (dict(time_cond_proj_dim=8), "its UNet takes the guidance scale as an input, as distilled for few steps"),
        (dict(out_channels=8), "its UNet predicts 8 channels and not the 4 of the noise"),
    ],
)
def test_unets_that_are_trained_in_another_way_are_refused(load, unet, message):
    with pytest.raises(UsageError, match=message):
        load(make_pipeline(**unet))


# --- latents ----------------------------------------------------------------------------------------------------------


def test_mean_and_deviation_of_latents_are_those_of_the_pipelines():
    pipe = make_xl(**STATISTICS)
    pixels = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mode = pipe.vae.encode(pixels[None]).latent_dist.mode()
    scaled = scale_latents(pipe.vae, mode)
    for channel, (mean, std) in enumerate(zip(*STATISTICS.values())):
        expected = (mode[:, channel] - mean) / std * pipe.vae.config.scaling_factor
        torch.testing.assert_close(scaled[:, channel], expected)
    torch.testing.assert_close(unscale_latents(pipe.vae, scaled), mode)
    img2img = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components)
    pipe.vae.encode = lambda _: _Fixed(mode)
    theirs = img2img.prepare_latents(pixels[None], None, 1, 1, torch.float32, "cpu", add_noise=False)
    torch.testing.assert_close(theirs, scaled)


class _Fixed:
    """What an autoencoder without a distribution returns."""

    def __init__(self, latents):
        self.latents = latents


def test_training_uses_the_mean_and_deviation_of_latents(load):
    pipe, pixels = make_xl(**STATISTICS), torch.rand(3, SIDE, SIDE) * 2 - 1
    found = encode_image(load(pipe).pipe.vae, pixels, torch.Generator().manual_seed(0))
    pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    plain = encode_image(pipe.vae, pixels, torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(4, 1, 1) for values in STATISTICS.values())
    torch.testing.assert_close(found, (plain - mean * pipe.vae.config.scaling_factor) / std)


def test_a_pipeline_that_leaves_the_mean_of_latents_out_is_refused(load):
    pipe = make_pipeline()
    pipe.vae.register_to_config(**STATISTICS)
    with pytest.raises(UsageError, match="latents_mean and latents_std, which a StableDiffusionPipeline leaves out"):
        load(pipe)


# --- class images -----------------------------------------------------------------------------------------------------


def prior(folder: Path, **changes) -> DreamBoothSettings:
    (folder / "subject").mkdir(exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), "red").save(folder / "subject" / "0.png")
    return DreamBoothSettings(
        folder / "subject", "a zebra", folder / "out", with_prior_preservation=True, class_data_dir=folder / "class",
        class_prompt="a dog", num_class_images=1, class_inference_steps=1, resolution=SIDE, device="cpu", **changes,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("upcast", [True, False], ids=["force_upcast", "half"])
def test_class_images_are_decoded_in_the_dtype_that_force_upcast_asks_for(tmp_path, monkeypatch, kind, upcast):
    pipe = make_pipeline() if kind == "sd" else make_xl(**STATISTICS)
    pipe.vae.register_to_config(force_upcast=upcast)
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pipe)
    trainer = Trainer(prior(tmp_path, mixed_precision="bf16"))
    trainer.check()
    trainer.load()
    dtypes = {"unet": [], "vae": []}
    pipe.unet.conv_in.register_forward_hook(lambda *call: dtypes["unet"].append(call[-1].dtype))
    pipe.vae.decoder.conv_in.register_forward_hook(lambda *call: dtypes["vae"].append(call[-1].dtype))
    trainer.encode()
    assert set(dtypes["unet"]) == {torch.bfloat16}
    assert set(dtypes["vae"]) == {torch.float32 if upcast else torch.bfloat16}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_class_image_is_the_one_that_the_pipeline_generates(kind):
    pipe = make_pipeline() if kind == "sd" else make_xl(**STATISTICS)
    options = dict(height=SIDE, width=SIDE, guidance_scale=5.0)
    expected = draw(pipe, steps=2, seed=3, output_type="pil", **options)[0]
    found = list(sampling.generate(pipe, "a zebra", [3], resolution=SIDE, steps=2, guidance=5.0))
    assert np.array_equal(np.asarray(found[0]), np.asarray(expected))


# --- weights of a variant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["all", "sharded", "one part", "beside the usual ones"])
def test_a_folder_with_the_weights_of_a_variant_alone_is_loaded(tmp_path, way):
    pipe, other = make_pipeline(), make_pipeline()
    with torch.no_grad():
        other.unet.conv_in.weight.add_(1)
    if way in ("all", "sharded"):
        pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB" if way == "sharded" else "10GB")
    else:
        pipe.save_pretrained(tmp_path)
        file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        if way == "one part":
            file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
        else:
            other.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    loaded = models.load_model(settings(model=tmp_path)).pipe
    for name in ("unet", "vae", "text_encoder"):
        theirs = getattr(pipe, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(loaded, name).state_dict().items()), name


def test_of_several_variants_that_of_the_dtype_is_loaded_and_one_that_is_asked_for_wins(tmp_path):
    for value, variant in enumerate(("bf16", "fp16", "mine")):
        pipe = make_pipeline()
        with torch.no_grad():
            pipe.unet.conv_in.bias.fill_(value)
        pipe.save_pretrained(tmp_path, variant=variant)

    def first(**options):
        return load_pipeline(tmp_path, device="cpu", **options).unet.conv_in.bias[0].item()

    assert [first(dtype=dtype) for dtype in ("bfloat16", "float16", "float32")] == [0, 1, 0]
    assert first(dtype="float16", variant="mine") == 2
    (tmp_path / "unet" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded .*: download or save it again"):
        first(dtype="bfloat16")
