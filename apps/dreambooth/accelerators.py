"""make_accelerator: accelerate's device, processes and precision for one training."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import parse_choice_from_env, parse_flag_from_env

from .settings import DreamBoothSettings, UsageError, option

_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
"""Kinds of accelerate in which each process has all weights."""


def make_accelerator(settings: DreamBoothSettings) -> Accelerator:
    """An accelerator for these settings, whatever another training in this process has asked for.

    Raises:
        UsageError: the device is not there, the precision is not possible on it, or the weights would be divided
            among processes.
    """
    precision = settings.mixed_precision or parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    # Said outright, as accelerate connects processes without a GPU only when it is told to use CPUs.
    cpu = settings.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if is_initialized():  # accelerate keeps one state per process, and refuses a second precision or device
        other_device = PartialState().num_processes == 1 and (PartialState().device.type == "cpu") != cpu
        AcceleratorState._reset_state(reset_partial_state=other_device)
    state = PartialState(cpu=cpu)
    if settings.device is not None and state.device.type != settings.device:
        raise UsageError(
            f"--device {settings.device}: is not available here, only {state.device.type}; use that, or leave it out"
        )
    if precision == "fp16" and state.device.type == "cpu":
        raise UsageError("--mixed-precision fp16: needs a GPU, and this training runs on a CPU; use bf16, or no")
    if precision not in ("no", "fp16", "bf16"):
        raise UsageError(f"{option('mixed_precision')} {precision}: must be no, fp16 or bf16")
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    # How losses of several forward passes are added up is the training loop's own affair.
    accelerator.gradient_accumulation_steps = 1
    kind = DistributedType(accelerator.distributed_type).value
    if kind not in _PLAIN:
        raise UsageError(
            f"accelerate is set to {kind}, which divides the weights among processes; run `accelerate launch` with "
            "--multi_gpu, or without FSDP and DeepSpeed"
        )
    return accelerator
