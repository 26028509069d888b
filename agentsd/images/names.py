"""The names that a command takes for a scheduler, a type and a device, checked before torch is imported."""

from __future__ import annotations

import re
from typing import Any

from ..messages import did_you_mean

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Scheduler names of the command line: diffusers class and what to change in the model's own scheduler settings."""

DTYPES = {
    "float32": "float32", "float16": "float16", "bfloat16": "bfloat16",
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
}  # fmt: skip
"""Names of a type of weights: torch's name."""

# Every type of device that torch knows by itself, and those that vendors' packages add to it.
_DEVICES = (
    "cuda cpu mps xpu npu hpu mlu musa privateuseone xla meta ipu mkldnn opengl opencl ideep hip ve fpga maia lazy "
    "vulkan mtia sdaa gcu"
).split()


def check_scheduler(name: str) -> tuple[str, dict[str, Any]]:
    """The row of SCHEDULERS. Raises ValueError for an unknown name."""
    if name not in SCHEDULERS:
        # "DPM++ 2M Karras" and "dpmpp_2m", as others write them.
        plain = re.sub(r"[\s_-]", "", str(name).lower()).replace("pp", "++").replace("karras", "-karras")
        meant = did_you_mean(plain, SCHEDULERS) or did_you_mean(str(name), SCHEDULERS)
        raise ValueError(f"scheduler={name!r}: must be one of {', '.join(SCHEDULERS)}{meant}")
    return SCHEDULERS[name]


def scheduler_name(scheduler: Any) -> str | None:
    """The name in SCHEDULERS of a scheduler of that class; None where there is none."""
    kind = type(scheduler).__name__
    return next((name for name, (listed, _) in SCHEDULERS.items() if listed == kind), None)


def check_dtype(name: str) -> str:
    """Torch's name of a type. Raises ValueError for any but float32, float16 and bfloat16, and their short names."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be float32, float16 or bfloat16{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def check_device(name: str) -> str:
    """The name of a device, as in "cuda:1". Raises ValueError where torch can have none of that name."""
    kind, *number = name.split(":")
    if kind not in _DEVICES or len(number) > 1 or (number and not re.fullmatch(r"\d+", number[0])):
        raise ValueError(f"device={name!r}: unknown to torch, use cuda, mps or cpu{did_you_mean(kind, _DEVICES[:3])}")
    return name
