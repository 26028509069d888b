"""Compatibility matrix, pipelines: every kind of Stable Diffusion pipeline runs patched, on tiny random weights."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from compat_matrix import Row, check_row, compat, parametrize, record_attention
from conftest import SD_BETAS, draw, make_pipeline, make_text_encoder, make_tokenizer, make_unet, make_vae
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DDPMScheduler

import agentsd
from agentsd import Phase
from agentsd.patch import get_patch

GROUP = "Pipelines"


def picture(channels: int = 3, size: int = 128) -> torch.Tensor:
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(5))


def left_half() -> torch.Tensor:
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    return mask


def make_pipe(pipeline_class, unet_options: dict | None = None, **components):
    """Any SD 1.x pipeline class around the tiny text-to-image pipeline's components."""
    parts = make_pipeline(scheduler=DDIMScheduler(**SD_BETAS), **(unet_options or {})).components
    parts.pop("image_encoder", None)
    return quiet(pipeline_class(**{**parts, **components}, requires_safety_checker=False))


def make_sdxl(pipeline_class=diffusers.StableDiffusionXLPipeline, unet_options: dict | None = None, **components):
    parts = dict(
        vae=make_vae(),
        text_encoder=make_text_encoder(),
        text_encoder_2=make_text_encoder(projection=32),
        tokenizer=make_tokenizer(),
        tokenizer_2=make_tokenizer(),
        unet=make_unet("sdxl", **(unet_options or {})),
        scheduler=DDIMScheduler(**SD_BETAS),
    )
    return quiet(pipeline_class(**{**parts, **components}))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_controlnet(unet, seed: int = 3) -> ControlNetModel:
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():  # its outputs start at zero, and would change nothing
        for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            block.weight.normal_(std=0.1)
    return controlnet


def make_sd_with_controlnets(pipeline_class=diffusers.StableDiffusionControlNetPipeline, number: int = 1):
    unet = make_unet()
    controlnets = [make_controlnet(unet, seed) for seed in range(number)]
    return make_pipe(pipeline_class, unet=unet, controlnet=controlnets if number > 1 else controlnets[0])


def make_sdxl_with_controlnet():
    unet = make_unet("sdxl")
    return make_sdxl(diffusers.StableDiffusionXLControlNetPipeline, unet=unet, controlnet=make_controlnet(unet))


def make_sd_with_t2i_adapter():
    torch.manual_seed(4)
    adapter = diffusers.T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=8).eval()
    return make_pipe(diffusers.StableDiffusionAdapterPipeline, adapter=adapter)


def make_upscaler():
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.08333,
    ).eval()
    unet = make_unet("sd2", in_channels=7, num_class_embeds=400)
    parts = dict(vae=vae, text_encoder=make_text_encoder(), tokenizer=make_tokenizer(), unet=unet)
    schedulers = dict(low_res_scheduler=DDPMScheduler(**SD_BETAS), scheduler=DDIMScheduler(**SD_BETAS))
    return quiet(diffusers.StableDiffusionUpscalePipeline(**parts, **schedulers))


def make_motion_adapter():
    torch.manual_seed(4)
    return diffusers.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=4
    ).eval()


def make_animatediff():
    adapter = make_motion_adapter()
    parts = dict(vae=make_vae(), text_encoder=make_text_encoder(), tokenizer=make_tokenizer(), unet=make_unet())
    return quiet(diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter, scheduler=DDIMScheduler(**SD_BETAS)))


def draw_frames(pipe, steps: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = dict(num_frames=3, num_inference_steps=steps, guidance_scale=5.0, output_type="latent")
    return pipe("a zebra", height=128, width=128, generator=generator, **settings).frames


def make_lcm():
    unet_options = {"time_cond_proj_dim": 8}
    return make_pipe(
        diffusers.LatentConsistencyModelPipeline, unet_options, scheduler=diffusers.LCMScheduler(**SD_BETAS)
    )


def make_modular_sdxl():
    parts = make_sdxl().components
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.register_components(**{name: part for name, part in parts.items() if name in pipe.component_names})
    return quiet(pipe)


def draw_modular(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = dict(height=128, width=128, num_inference_steps=4)
    return pipe(prompt="a zebra", generator=generator, output_type="latent", output="images", **size)


def denoise_by_hand(unet) -> torch.Tensor:
    """What people write themselves: no pipeline, every argument by keyword."""
    scheduler = DDIMScheduler(**SD_BETAS)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 7, 32, generator=generator)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            noise = unet(encoder_hidden_states=text, timestep=timestep, sample=latents, return_dict=False)[0]
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def with_image(**more):
    return lambda pipe: draw(pipe, steps=5, image=picture(), strength=0.9, **more)


ROWS = [
    Row("SD text2img", make_pipeline),
    Row("SD 2.x text2img (linear projections, upcast attention)", lambda: make_pipeline("sd2")),
    Row("SD img2img", lambda: make_pipe(diffusers.StableDiffusionImg2ImgPipeline), with_image()),
    Row(
        "SD inpaint, 4-channel UNet",
        lambda: make_pipe(diffusers.StableDiffusionInpaintPipeline),
        with_image(mask_image=left_half()),
    ),
    Row(
        "SD inpaint, 9-channel UNet",
        lambda: make_pipe(diffusers.StableDiffusionInpaintPipeline, {"in_channels": 9}),
        with_image(mask_image=left_half()),
    ),
    Row("SD x4 upscale", make_upscaler, lambda pipe: draw(pipe, image=picture(size=16))),
    Row(
        "SD InstructPix2Pix (three guidance branches)",
        lambda: make_pipe(diffusers.StableDiffusionInstructPix2PixPipeline, {"in_channels": 8}),
        lambda pipe: draw(pipe, image=picture()),
    ),
    Row("SDXL text2img", make_sdxl),
    Row("SDXL img2img", lambda: make_sdxl(diffusers.StableDiffusionXLImg2ImgPipeline), with_image()),
    Row(
        "SDXL inpaint, 4-channel UNet",
        lambda: make_sdxl(diffusers.StableDiffusionXLInpaintPipeline),
        with_image(mask_image=left_half()),
    ),
    Row(
        "SDXL inpaint, 9-channel UNet",
        lambda: make_sdxl(diffusers.StableDiffusionXLInpaintPipeline, {"in_channels": 9}),
        with_image(mask_image=left_half()),
    ),
    Row("ControlNet", make_sd_with_controlnets, lambda pipe: draw(pipe, image=picture())),
    Row(
        "ControlNet, two at once",
        lambda: make_sd_with_controlnets(number=2),
        lambda pipe: draw(pipe, image=[picture(), 1 - picture()]),
    ),
    Row(
        "ControlNet img2img",
        lambda: make_sd_with_controlnets(diffusers.StableDiffusionControlNetImg2ImgPipeline),
        with_image(control_image=1 - picture()),
    ),
    Row("ControlNet SDXL", make_sdxl_with_controlnet, lambda pipe: draw(pipe, image=picture())),
    Row("T2I-Adapter", make_sd_with_t2i_adapter, lambda pipe: draw(pipe, image=picture())),
    Row(
        "AnimateDiff",
        make_animatediff,
        draw_frames,
        note="spatial layers; the motion modules keep their own attention",
    ),
    Row("Latent consistency (LCM) pipeline", make_lcm, lambda pipe: draw(pipe, original_inference_steps=50)),
    Row("Modular SDXL (cond and uncond in separate calls)", make_modular_sdxl, draw_modular),
    Row("Bare UNet in a loop by hand, keyword arguments", make_unet, denoise_by_hand),
]


@parametrize(GROUP, ROWS)
def test_pipeline(row):
    check_row(row)


@compat(GROUP, "SDXL base + refiner (denoising_end / denoising_start)", note="the refiner starts late: merging only")
def test_base_and_refiner():
    def make():
        base = make_sdxl()
        refiner_unet = make_unet("sdxl", cross_attention_dim=32, projection_class_embeddings_input_dim=72)
        refiner = make_sdxl(
            diffusers.StableDiffusionXLImg2ImgPipeline,
            text_encoder=None,
            tokenizer=None,
            unet=refiner_unet,
            requires_aesthetics_score=True,
        )
        return SimpleNamespace(base=base, refiner=refiner)

    def run(pipes):
        latents = draw(pipes.base, steps=6, denoising_end=0.6)
        return draw(pipes.refiner, steps=6, image=latents, denoising_start=0.6)

    row = Row("base + refiner", make, run, models=lambda pipes: [pipes.base, pipes.refiner])
    check_row(row)

    pipes = make()
    agentsd.apply_patch(pipes.base)
    agentsd.apply_patch(pipes.refiner)
    latents = draw(pipes.base, steps=6, denoising_end=0.6)
    with record_attention(pipes.refiner) as record:
        draw(pipes.refiner, steps=6, image=latents, denoising_start=0.6)
    record.check(phases=frozenset({Phase.MERGE}))


def test_motion_modules_are_never_touched():
    pipe = make_animatediff()
    temporal = {name: module for name, module in pipe.unet.named_modules() if "motion_modules" in name}
    processors = {name: module.processor for name, module in temporal.items() if hasattr(module, "processor")}
    hooks = {name: len(module._forward_pre_hooks) for name, module in temporal.items()}
    agentsd.apply_patch(pipe, max_downsample=8, merge_crossattn=True, merge_mlp=True)
    assert len(get_patch(pipe).layers) == 4  # one down, one in the middle, two up
    assert all(temporal[name].processor is processor for name, processor in processors.items())
    assert {name: len(module._forward_pre_hooks) for name, module in temporal.items()} == hooks
    assert any("motion" in layer.reason for layer in get_patch(pipe).skipped)


@pytest.mark.parametrize("unet_class", ["UNet3DConditionModel", "UNetSpatioTemporalConditionModel"])
@compat(GROUP, "Video UNets that mix space and time in one block (SVD, ModelScope)", "clear error")
def test_video_unets_are_refused(unet_class):
    options = dict(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32)
    if unet_class == "UNet3DConditionModel":
        options |= dict(
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            attention_head_dim=4,
            norm_num_groups=8,
        )
    else:
        options |= dict(
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4),
        )
    unet = getattr(diffusers, unet_class)(**options)
    with pytest.raises(TypeError, match=f"{unet_class}.*agentsd patches"):
        agentsd.apply_patch(unet)
