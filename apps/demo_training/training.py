"""The training loop that autoencoder and UNet share: schedule, averages, checkpoints and finished weights."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from agentsd.files import write_atomically

from .run import Run, UsageError, write_png


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Fraction of the peak learning rate: a linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_checkpoint(path: Path, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Write modules, optimiser state and the number of steps done as one safetensors file."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    write_atomically(path, save(contiguous, metadata={"step": str(step)}))


def load_checkpoint(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Fill modules and optimiser from `save_checkpoint`'s file; returns the number of steps done."""
    tensors = load_file(path)
    for name, module in modules.items():
        module.load_state_dict(part_of(tensors, name))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part_of(tensors, "optimizer").items():
        number, _, entry = key.partition(".")
        state.setdefault(int(number), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(read_metadata(path)["step"])


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose key starts with "name.", by the rest of it."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Yield a list that gets the signal number of a Ctrl-C or SIGTERM, so that a step is finished before stopping."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    run: Run,
    stage: str,
    trained: dict[str, nn.Module],
    averages: dict[str, nn.Module],
    phase_steps: Sequence[int],
    peak_lrs: Sequence[float],
    loss_of: Callable[[int, torch.Generator], Tensor],
    sample_grid: Callable[[], Image.Image],
    prepare: Callable[[int, int], None] = lambda phase, local: None,
    decay_steps: Sequence[int] | None = None,
) -> None:
    """Train modules in place, from the stage's checkpoint if there is one.

    AdamW with betas 0.9 and 0.99, gradients clipped to norm 1. Each phase has its own warm-up and cosine; a phase
    after the first starts from the averaged weights with a fresh optimiser.

    Args:
        stage: names the folder of checkpoint and grids, and the progress bar.
        trained: the modules to train, on the run's device.
        averages: for some of them, a copy that follows their weights as an exponential moving average.
        phase_steps: optimiser steps of each phase.
        peak_lrs: peak learning rate of each phase.
        loss_of: (phase, generator) to a scalar loss; the generator is the step's own.
        sample_grid: an image of the present state, written to the stage's grids folder now and then.
        prepare: called before each step with the phase and the step's number within it.
        decay_steps: steps that each phase's cosine is stretched over; None: as many as the phase has.
    """
    preset, folder = run.preset, run.out / stage
    grids, checkpoint = folder / "grids", folder / "checkpoint.safetensors"
    grids.mkdir(exist_ok=True)
    parameters = [parameter for module in trained.values() for parameter in module.parameters()]

    def fresh_optimizer() -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=peak_lrs[0], betas=(0.9, 0.99))

    modules = trained | {f"average_{name}": module for name, module in averages.items()}
    optimizer, done = fresh_optimizer(), 0
    if checkpoint.exists():
        done = load_checkpoint(checkpoint, modules, optimizer)
    starts = [0, *itertools.accumulate(phase_steps)]
    total = starts[-1]
    saved_at, losses = time.monotonic(), []

    with noting_interrupts() as interrupts, tqdm(total=total, initial=done, desc=stage, unit="step") as bar:
        for step in range(done, total):
            phase = next(number for number in range(len(phase_steps)) if step < starts[number + 1])
            local = step - starts[phase]
            if local == 0 and phase > 0:
                for name, average in averages.items():
                    trained[name].load_state_dict(average.state_dict())
                optimizer = fresh_optimizer()
            prepare(phase, local)

            decay = (decay_steps or phase_steps)[phase]
            lr = peak_lrs[phase] * learning_rate(local, decay, preset.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = loss_of(phase, run.generator(stage, "step", step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            # A young average forgets its start quickly: random weights would linger for 1 / (1 - decay) steps.
            kept = min(preset.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, average in averages.items():
                    for slow, fast in zip(average.parameters(), trained[name].parameters(), strict=True):
                        slow.lerp_(fast, 1 - kept)

            losses.append(loss.detach())
            bar.update()
            due = time.monotonic() - saved_at >= run.checkpoint_seconds
            grid_due = (step + 1) % preset.grid_steps == 0 or step + 1 == total
            if len(losses) == 50 or due or interrupts or grid_due:
                # Reading a loss waits for the device, so it is not done in every step.
                mean, losses = torch.stack(losses).mean().item(), []
                bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.1e}")
                if not math.isfinite(mean):
                    raise UsageError(
                        f"{stage}: the loss is {mean} at step {step + 1}; the same command with --precision fp32 and "
                        "another --out may get past it"
                    )
            if due or interrupts or step + 1 == total:
                save_checkpoint(checkpoint, step + 1, modules, optimizer)
                saved_at = time.monotonic()
            if grid_due:
                write_png(grids / f"step_{step + 1:06d}.png", sample_grid())
            if interrupts and step + 1 < total:
                raise KeyboardInterrupt


def finish(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a stage's weights.safetensors, which says that it is finished, then drops its checkpoint."""
    contiguous = {key: value.cpu().contiguous() for key, value in tensors.items()}
    write_atomically(folder / "weights.safetensors", save(contiguous, metadata=metadata))
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
