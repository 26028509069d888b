"""timed_calls: a denoising run of UNet calls alone, on random inputs; plan_of_run: its calls of each kind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..config import DEFAULT_NUM_TRAIN_TIMESTEPS, AgentConfig, Phase
from ..patch import patched
from ..unet.layers import UNet

TEXT_TOKENS = 77
"""Tokens of a prompt, padded, as CLIP reads them."""


@dataclass(frozen=True)
class UNetCall:
    """One call of a denoising run.

    Attributes:
        timestep: its noise level.
        whole: it computed the whole network; with step caching others reuse a feature.
        seconds: of the call alone.
    """

    timestep: float
    whole: bool
    seconds: float


@dataclass(frozen=True)
class RandomInputs:
    """What a UNet is called with, at random.

    Attributes:
        latents: [B, C, H, W] of the images.
        beside: [2 · B, C', H, W] what stands beside them in further channels (inpainting: mask and masked image).
        others: keyword arguments of every call; the first half of each batch is for guidance.
        guided: a call has a batch of 2 · B, with and without the prompt; else of B.
    """

    latents: Tensor
    beside: Tensor | None
    others: dict[str, Any]
    guided: bool

    @classmethod
    def of(cls, unet: UNet, height: int, width: int, batch_size: int = 1, device: Any = None) -> RandomInputs:
        """Random inputs of the shapes that a UNet's configuration asks for, the same ones every time.

        Args:
            unet: a UNet2DConditionModel.
            height, width: of the latents, in latent pixels.
            batch_size: number of images.
            device: where the UNet computes; None takes where it is.

        Raises:
            ValueError: the UNet needs what cannot be made up here (images of an adapter, projected classes).
        """
        config = unet.config
        known = {
            "encoder_hid_dim_type": (None,),
            "class_embed_type": (None,),
            "addition_embed_type": (None, "text_time"),
        }
        for name, kinds in known.items():
            if config.get(name) not in kinds:
                raise ValueError(
                    f"this UNet has {name}={config[name]!r}, whose inputs cannot be made up here: time whole images "
                    "with agentsd.compare"
                )
        generator = torch.Generator().manual_seed(0)
        device = unet.device if device is None else device

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, unet.dtype)

        widths = config.cross_attention_dim
        text_width = widths[0] if isinstance(widths, (tuple, list)) else widths
        # A model that was distilled from guidance (LCM) takes the guidance's scale in place of a second half.
        guided = config.time_cond_proj_dim is None
        batch = batch_size * (2 if guided else 1)
        others: dict[str, Any] = {"encoder_hidden_states": random(batch, TEXT_TOKENS, text_width)}
        if not guided:
            others["timestep_cond"] = random(batch, config.time_cond_proj_dim)
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            size = [8.0 * height, 8.0 * width]
            time_ids = torch.tensor([[*size, 0.0, 0.0, *size]]).repeat(batch, 1).to(device, unet.dtype)
            others["added_cond_kwargs"] = {"text_embeds": random(batch, pooled), "time_ids": time_ids}
        if config.num_class_embeds is not None:  # the upscaler's noise level
            others["class_labels"] = torch.zeros(batch, dtype=torch.int64, device=device)
        extra = config.in_channels - config.out_channels
        beside = random(batch, extra, height, width) if extra > 0 else None
        return cls(random(batch_size, config.out_channels, height, width), beside, others, guided)


def timed_calls(
    unet: Any, scheduler: Any, timesteps: Tensor, inputs: RandomInputs, begin: int = 0
) -> Iterator[UNetCall]:
    """Denoise along some timesteps as a pipeline does, and time each UNet call, synchronised with its device.

    The latents of a next call are the scheduler's, so that a patch sees a run as in a pipeline. Ask for no more calls
    than are needed: each is run when it is asked for.

    Args:
        unet: called as `unet(sample, timestep, …)`, patched or not.
        scheduler: set to those timesteps.
        timesteps: `scheduler.timesteps`, by which a patch knows the whole run.
        inputs: random ones.
        begin: position of the first call, where the run begins in its midst, as img2img does.
    """
    latents = _noisy(scheduler, inputs.latents, timesteps[begin])
    for timestep in timesteps[begin:]:
        given = scheduler.scale_model_input(torch.cat([latents] * (2 if inputs.guided else 1)), timestep)
        if inputs.beside is not None:
            given = torch.cat([given, inputs.beside], dim=1)
        with torch.no_grad(), ran_whole(unet) as whole:
            synchronize(given.device)
            start = time.perf_counter()
            output = unet(given, timestep, return_dict=False, **inputs.others)[0]
            synchronize(given.device)
            seconds = time.perf_counter() - start
        yield UNetCall(float(timestep), whole(), seconds)
        latents = scheduler.step(output[-len(latents) :], timestep, latents, return_dict=False)[0]


def _noisy(scheduler: Any, latents: Tensor, timestep: Tensor) -> Tensor:
    """Latents of a timestep's noise level, where a run may begin in its midst."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents)
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(latents, noise, timestep.repeat(len(latents)))
    return noise * getattr(scheduler, "init_noise_sigma", 1.0)


@contextlib.contextmanager
def ran_whole(unet: Any) -> Iterator[Callable[[], bool]]:
    """Whether a UNet computed its deepest layers since the beginning of a `with` block: a cached call skips them."""
    ran: list[bool] = []
    handle = unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        yield lambda: bool(ran)
    finally:
        handle.remove()


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def set_timesteps(scheduler: Any, steps: int, device: Any = None) -> Tensor:
    """Set a scheduler to a new run of some steps and return its timesteps; on a device where it takes one."""
    takes_device = "device" in inspect.signature(scheduler.set_timesteps).parameters
    scheduler.set_timesteps(steps, **({"device": device} if takes_device else {}))
    return scheduler.timesteps


def first_of_each_phase(config: AgentConfig | None, timesteps: Sequence[Any], length: int) -> dict[Phase, int]:
    """The position of the first call of each phase that a run has; a run without a patch has the later phase alone."""
    if config is None:
        return {Phase.MERGE: 0}
    found: dict[Phase, int] = {}
    for position, timestep in enumerate(timesteps):
        found.setdefault(config.phase_at(float(timestep), length), position)
    return found


def plan_of_run(scheduler: Any, config: AgentConfig | None, steps: int) -> Counter[tuple[Phase, bool]]:
    """How many UNet calls of each phase a run has, whole (True) and cached (False): {(phase, whole): calls}.

    Counted in a run by the patch itself on a tiny UNet, as the plan depends on the timesteps and the settings alone.

    Args:
        scheduler: a diffusers scheduler; a copy of it is used.
        config: settings of the patch; None for an unpatched model.
        steps: of the run.
    """
    if config is not None:  # these depend on the UNet, and the plan does not
        config = dataclasses.replace(config, cache_depth="auto", max_downsample="auto")
    pipe = _Parts(_tiny_unet(), copy.deepcopy(scheduler))
    timesteps = set_timesteps(pipe.scheduler, steps)
    length = pipe.scheduler.config.get("num_train_timesteps") or DEFAULT_NUM_TRAIN_TIMESTEPS
    calls: Counter[tuple[Phase, bool]] = Counter()
    with warnings.catch_warnings(), patched(pipe, config) if config is not None else contextlib.nullcontext():
        warnings.simplefilter("ignore")  # they are about the real UNet's calls, where they are given too
        for call in timed_calls(pipe.unet, pipe.scheduler, timesteps, RandomInputs.of(pipe.unet, 16, 16)):
            phase = Phase.MERGE if config is None else config.phase_at(call.timestep, length)
            calls[phase, call.whole] += 1
    return calls


@dataclass(eq=False)
class _Parts:
    """What of a pipeline a patch looks at."""

    unet: Any
    scheduler: Any


def _tiny_unet() -> UNet2DConditionModel:
    """The smallest UNet with self-attention to patch and layers to skip; its few weights are set, not drawn."""
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(0.01)
    return unet.eval()
