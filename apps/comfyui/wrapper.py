"""AgentWrapper: what stands around the runs, steps and model calls of a patched ComfyUI model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.config import AgentConfig, Phase
from agentsd.step_cache import FEWEST_STEPS

from .layers import find_layers
from .run import Network, Run, Step
from .skipping import SkippedParts, keeper_of, stopped_controlnets
from .step_caching import ADAPTIVE, Batch, StepCaching, active_controls, calls_once_a_step, is_active, sampler_name
from .unet_call import NOT_REACHED, WARNED, UNetCall

KIND, KEY = "apply_model", "agentsd"
"""Kind and key of the wrapper around model calls in ComfyUI's ModelPatcher."""
OTHER_KINDS = ("outer_sample", "predict_noise", "calc_cond_batch")
"""Kinds of the wrappers around runs, steps and all conditionings of a step; each is the method of that name."""

_COMPILED = (
    "this model is compiled (TorchCompileModel, or single blocks of it), and agentsd chooses its phase outside "
    "compiled graphs: nothing is merged and there are no agents. Steps are cached if cache_interval is above 1 (with "
    "PyTorch 2.6 or newer)"
)
_COMPILING = "torch.compile"
"""Key of ComfyUI's own wrapper that puts compiled parts in for the length of a call."""
_MIXED = "this batch has samples of both phases, which run unpatched; sample them apart"
_PASSED_BY = (
    "another node's model_function_wrapper runs the model itself and never calls apply_model (DeepCache nodes do), "
    "which leaves AgentSD out; remove that node, or AgentSD"
)
_ADAPTIVE = (
    f"{ADAPTIVE} chooses its steps by how well two answers of the model agree, and takes about twice as many with "
    "agents: this run is unpatched. Use another sampler"
)
_SAG = "step caching is off: self-attention guidance (SAG) reads the attention of every call. Remove that node to cache"


class AgentWrapper:
    """Wraps ComfyUI's model calls: patches the layers, runs the call, and undoes everything.

    Args:
        config: the settings.
        percents: (start, end) of the run between which calls are cached.

    Attributes:
        run: the last sampling run, or None.
    """

    def __init__(self, config: AgentConfig, percents: tuple[float, float] = (0.0, 1.0)):
        self.config = config
        self.percents = percents
        self.run: Run | None = None
        self._active: Run | None = None  # the run in progress, begun by `outer_sample`
        self._batch: Batch | None = None
        self._boundary: tuple[Any, Any, float] | None = None

    def outer_sample(
        self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run one sampling run with a state of its own, which is freed however the run ends."""
        guider = executor.class_obj
        if (other := other_cache(guider.model_options)) is not None and self.config.cache_interval > 1:
            raise ValueError(both_caches(other))
        levels = [float(sigma) for sigma in sigmas.tolist()]
        run = Run(expected=len(levels) - 1 if calls_once_a_step(sampler) else 0)
        sampling = guider.model_patcher.get_model_object("model_sampling")
        if ADAPTIVE in sampler_name(sampler):
            run.unpatched = True
            run.warn(_ADAPTIVE)
        elif self.config.cache_interval > 1:
            run.caching = StepCaching(self.config, sampler, levels, sampling, self.percents)
            run.short = len(levels) - 1 < FEWEST_STEPS
        outer = self._active, self._batch  # of a run that samples within a step
        self.run = self._active = run
        self._batch = None
        completed = False
        try:
            out = executor(noise, latent, sampler, sigmas, *args, **kwargs)
            completed = True
            return out
        finally:
            self._active, self._batch = outer
            self.run = run
            run.end(completed)

    def predict_noise(self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Begin a step."""
        run = self._active
        if run is not None:
            sampling = executor.class_obj.inner_model.model_sampling
            run.step = Step(timestep, *_read(timestep, sampling))
            run.begun += 1
            if run.caching is not None:
                run.caching.begin_step(run.step.sigmas[0])
        return executor(x, timestep, *args, **kwargs)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> Any:
        """Decide about all conditionings of a step; ControlNets of a cached one stop after their first layers."""
        run = self._active
        if run is None or run.step is None:
            return executor(model, conds, x, timestep, model_options)
        options = model_options.get("transformer_options", {})
        if self._batch is None:
            run.stepped += 1
        known = timestep is run.step.tensor and len(set(run.step.sigmas)) == 1
        caching = run.caching if known else None
        batch = Batch(0)
        if caching is not None:
            batch = caching.begin_batch(conds, x, options, self._is_whole(run, options))
        outer, self._batch = self._batch, batch
        completed = False
        try:
            controls: list[Any] = []
            if batch.features is not None:
                sigma = run.step.sigmas[0]
                used = [cond for group in conds for cond in group or () if is_active(cond, sigma)]
                controls = [cond["control"] for cond in used if active_controls(cond, sigma)]
            with stopped_controlnets(controls, self._depth()):
                out = executor(model, conds, x, timestep, model_options)
            completed = True
            return out
        finally:
            self._batch = outer
            if caching is not None:
                caching.end_batch(batch, completed)
            if completed and not batch.calls:
                run.passed_by += 1
                if "model_function_wrapper" in model_options:
                    run.warn(_PASSED_BY)

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run one model call with agents, or a cached one.

        Args:
            executor: the next wrapper or the model's own call.
            x: [B, C, H, W] noisy latent.
            t: [B] noise levels, sigma.
            c_concat, c_crossattn, control, transformer_options, **kwargs: passed on.

        Returns:
            [B, C, H, W] the denoised latent.
        """
        options = transformer_options or {}
        model, batch = executor.class_obj, self._batch
        run, sigmas, timesteps = self._read(options, t, model.model_sampling)
        if batch is not None:
            batch.calls += 1

        network = self._network(run, model.diffusion_model)
        if network.compiled or _COMPILING in options.get("wrappers", {}).get(KIND, {}):
            if not run.unpatched:
                run.warn(_COMPILED)
            return self._compiled(run, network, executor, x, t, c_concat, c_crossattn, control, options, **kwargs)
        if run.unpatched:
            run.calls[Phase.MERGE] += 1
            run.whole += 1
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        boundary = self._first_agent_sigma(model.model_sampling)
        phases = {Phase.AGENT if self.config.early > 0 and s >= boundary else Phase.MERGE for s in sigmas}
        if len(phases) > 1:
            run.warn(_MIXED)
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

        timestep = timesteps[0] if len(set(timesteps)) == 1 else tuple(timesteps)
        height, width = int(x.shape[-2]), int(x.shape[-1])
        call = UNetCall(self.config, phases.pop(), timestep, (height, width), network.layers)
        options = call.transformer_options(options)
        ran: list[bool] = []
        handle = model.diffusion_model.time_embed.register_forward_pre_hook(lambda *args: ran.append(True))
        feature = None
        with contextlib.ExitStack() as stack:
            stack.callback(handle.remove)
            stack.enter_context(call.hooked())
            if batch is not None and (parts := network.parts) is not None:
                keys = batch.keys(options.get("uuids", []), x.shape[0])
                feature = batch.feature(keys, x.shape[0])
                if feature is not None:
                    stack.enter_context(parts.skipped(feature))
                    options, control = parts.transformer_options(options), parts.control(control)
                elif batch.features is None:
                    stack.enter_context(_kept(parts, batch, keys))
            out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if ran:
            self._note(run, call, network.skipped, feature is not None)
        else:
            run.others += 1
        return out

    def _compiled(
        self,
        run: Run,
        network: Network,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any,
        c_crossattn: Any,
        control: Any,
        options: dict[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        """Run one call of a compiled model: a whole one in its graph, a cached one without."""
        batch, parts = self._batch, network.parts if hasattr(torch.compiler, "set_stance") else None
        keys = [] if batch is None else batch.keys(options.get("uuids", []), x.shape[0])
        feature = None if batch is None or parts is None else batch.feature(keys, x.shape[0])
        run.calls[Phase.MERGE] += 1
        if parts is not None and feature is not None:
            run.cached += 1
            options, control = parts.transformer_options(options), parts.control(control)
            with parts.skipped(feature), torch.compiler.set_stance("force_eager"):
                return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        run.whole += 1
        if batch is None or parts is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        keeper = keeper_of(executor.class_obj.diffusion_model, self._depth())
        keeper.feature = None
        patches = options.get("patches", {})
        patches = {**patches, "output_block_patch": [keeper, *patches.get("output_block_patch", ())]}
        out = executor(x, t, c_concat, c_crossattn, control, {**options, "patches": patches}, **kwargs)
        if keeper.feature is not None and batch.features is None:
            batch.kept.update(zip(keys, keeper.feature.clone().chunk(len(keys))))
        keeper.feature = None
        return out

    def _depth(self) -> int:
        depth = self.config.cache_depth
        return 1 if isinstance(depth, str) else depth

    def _network(self, run: Run, unet: nn.Module) -> Network:
        network = run.network
        if network is None:
            compiled = _is_compiled(unet)
            layers, skipped = find_layers(unet, self.config.max_downsample)
            parts = None if run.caching is None else SkippedParts(unet, self._depth())
            network = Network(layers, skipped, parts, compiled)
            if run is self._active:  # otherwise other calls may come with another UNet
                run.network = network
        return network

    def _is_whole(self, run: Run, options: dict[str, Any]) -> bool:
        """Whether nothing can be cached in a step, which is told."""
        replaced = options.get("patches_replace", {}).get("attn1", {}).values()
        if any("attn_and_record" in getattr(patch, "__name__", "") for patch in replaced):
            run.warn(_SAG)
            return True
        return torch.is_grad_enabled()

    def _read(self, options: dict[str, Any], t: Tensor, sampling: Any) -> tuple[Run, list[float], list[float]]:
        """The run of a call, and noise levels and timesteps of its samples."""
        run = self._active
        if run is None:
            sigmas, timesteps = _read(t, sampling)
            return self._run_of(options.get("sample_sigmas"), max(sigmas)), sigmas, timesteps
        step = run.step
        if step is None or options.get("sigmas") is not step.tensor or t.shape[0] % len(step.sigmas):
            return run, *_read(t, sampling)
        times = t.shape[0] // len(step.sigmas)
        return run, step.sigmas * times, step.timesteps * times

    def _run_of(self, schedule: Any, sigma: float) -> Run:
        """The run of a call outside ComfyUI's samplers; a new one where the schedule is another tensor, or the noise
        rises without one."""
        run = self.run
        if run is None or run.schedule is not schedule or (schedule is None and sigma > run.sigma):
            run = self.run = Run(schedule)
        run.sigma = sigma
        return run

    def _first_agent_sigma(self, sampling: Any) -> float:
        """The least noise of the agent phase. Computed once for a schedule, as ComfyUI reads it from the device."""
        sigmas = getattr(sampling, "sigmas", None)
        if self._boundary is None or self._boundary[0] is not sampling or self._boundary[1] is not sigmas:
            self._boundary = (sampling, sigmas, float(sampling.percent_to_sigma(self.config.early)))
        return self._boundary[2]

    def _note(self, run: Run, call: UNetCall, skipped: dict[str, str], cached: bool) -> None:
        run.calls[call.phase] += 1
        run.sizes[call.size] += 1
        if cached:
            run.cached += 1
        else:
            run.whole += 1
        run.reasons.update(skipped)
        for name, plan in call.plans.items():
            run.plans.setdefault(name, set()).add((call.phase, plan))
        for name, reason in call.reasons.items():
            if reason != NOT_REACHED or (name not in run.plans and not cached):
                run.reasons[name] = reason
        told: dict[str, list[str]] = {}
        for name, reason in call.reasons.items():
            if reason in WARNED or reason.endswith("smaller than a cell"):
                told.setdefault(reason, []).append(name)
        for reason, names in told.items():
            run.warn(f"{names[0]} runs unpatched{_and_more(names)}: {reason}")


def other_cache(model_options: dict[str, Any]) -> str | None:
    """The name of ComfyUI's own step cache that is on a model, or None."""
    other = model_options.get("transformer_options", {}).get("easycache")
    return None if other is None else str(getattr(other, "name", "EasyCache"))


def both_caches(other: str) -> str:
    """The error about a second cache."""
    return (
        f"AgentSD: {other} is on this model and caches steps too, so that one would reuse what the other skipped. "
        f"Remove {other}, or set cache_interval = 1 in AgentSD"
    )


@contextlib.contextmanager
def _kept(parts: SkippedParts, batch: Batch, keys: list[Any]) -> Iterator[None]:
    """Keep the features of a whole call."""
    with parts.kept() as found:
        yield
    if len(found) == 1:  # not where another node answered, or ran the model several times
        batch.kept.update(zip(keys, found[0].chunk(len(keys))))


def _read(sigma: Tensor, sampling: Any) -> tuple[list[float], list[float]]:
    """Noise levels and timesteps of the samples, in one copy from the device."""
    both = torch.stack([sigma.float().flatten(), sampling.timestep(sigma).float().flatten()])
    sigmas, timesteps = both.tolist()
    return sigmas, timesteps


def _is_compiled(unet: nn.Module) -> bool:
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in unet.modules())


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
