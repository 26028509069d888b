"""Tiny models of real diffusers classes with random weights, shared by all tests; no network."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

# Tiny models gain nothing from threads, and waiting for one another costs them dearly when the machine is busy.
torch.set_num_threads(1)
# A search for garbage among a million imported objects takes a fifth of a second, and finds little.
gc.set_threshold(100_000, 20, 100)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


CORE = (
    "config",
    "merging",
    "attention",
    "layer_plan",
    "step_cache",
    "patch",
    "right_or_told",
    "processor",
    "architecture",
)
"""Files test_NAME.py of the method itself."""

NOT_CORE = ("test_share_of_whole_calls_under_any_scheduler", "test_caches_together_with")
"""Tests of these files that take long, as those do that compile (by the fixture fresh_dynamo)."""


def pytest_configure(config):
    config.addinivalue_line("markers", "compat(group, name, status, note): proof of one row of the compatibility table")


def pytest_collection_modifyitems(items):
    for item in items:
        slow = "fresh_dynamo" in item.fixturenames or item.originalname in NOT_CORE
        if item.path.stem.removeprefix("test_") in CORE and not slow:
            item.add_marker("core")


SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def make_unet(kind: str = "sd15", **overrides) -> UNet2DConditionModel:
    """A UNet shaped like SD 1.5's, SD 2's or SDXL's, with a few thousand weights; the same ones every time."""
    common = dict(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        cross_attention_dim=32,
    )
    shapes = {
        "sd15": dict(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
        ),
        "sd15-deep": dict(
            block_out_channels=(32, 32, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
        ),
        "sd2": dict(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            upcast_attention=True,
        ),
        "sdxl": dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
        ),
    }
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**common, **shapes[kind], **overrides}).eval()
    # Freshly initialised attention is nearly uniform and its output tiny: too weak to show a wrong result.
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn1.to_" in name:
                parameter.mul_(3)
    return unet


def call_unet(unet, sample=None, timestep=900, seed=0, batch=2, size=(16, 16)):
    """One UNet call with made-up text (and SDXL's extra) inputs; returns the predicted noise."""
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    parameter = next(unet.parameters())
    if sample is None:
        sample = torch.randn(batch, config.in_channels, *size, generator=generator)
    text = torch.randn(sample.shape[0], 7, config.cross_attention_dim, generator=generator)
    extra = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra["added_cond_kwargs"] = {
            "text_embeds": torch.randn(sample.shape[0], pooled, generator=generator).to(parameter),
            "time_ids": torch.zeros(sample.shape[0], 6).to(parameter),
        }
    with torch.no_grad():
        return unet(sample.to(parameter), timestep, text.to(parameter), **extra).sample


def make_text_encoder(hidden_size: int = 32, projection: int | None = None):
    """A CLIP text encoder; with a projection the kind that SDXL's pooled embedding comes from."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=1290,
        hidden_size=hidden_size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=1288,
        eos_token_id=1289,
        pad_token_id=1289,
        projection_dim=projection or 512,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def make_tokenizer():
    """The built-in demo model's tokenizer: a real CLIPTokenizer that needs no download."""
    from transformers import CLIPTokenizer

    from agentsd.images.pipelines import DEMO_MODEL

    return CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer")


def make_vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def make_pipeline(kind: str = "sd15", scheduler=None, **unet_overrides) -> StableDiffusionPipeline:
    """A whole text-to-image pipeline, 128 × 128 px, with random weights."""
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(),
        tokenizer=make_tokenizer(),
        unet=make_unet(kind, **unet_overrides),
        scheduler=scheduler or PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps: int = 4, seed: int = 0, **arguments):
    """Run a pipeline on a fixed seed; returns latents unless told otherwise."""
    arguments = {"prompt": "a zebra", "output_type": "latent", "guidance_scale": 5.0, **arguments}
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, generator=generator, **arguments).images


@pytest.fixture
def fresh_dynamo():
    """Compiled graphs of other tests do not count against torch's limits."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
