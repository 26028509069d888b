"""Runs in ComfyUI's environment and calls its functions on tiny models; comfyui_support.py talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import logging
import os
import pickle
import sys
import traceback
from pathlib import Path

# What ComfyUI prints must not get between the answers.
_answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
# The node must not need diffusers. ComfyUI does not either.
sys.modules["diffusers"] = None

REPOSITORY = Path(__file__).parents[2]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True
comfy.cli_args.args.use_pytorch_cross_attention = True

import torch  # noqa: E402

torch.set_num_threads(1)

import comfy.cldm.cldm  # noqa: E402
import comfy.controlnet  # noqa: E402
import comfy.ldm.modules.diffusionmodules.mmdit  # noqa: E402
import comfy.ldm.modules.diffusionmodules.openaimodel  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.model_sampling  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models_base  # noqa: E402
import comfy.utils  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode  # noqa: E402
from comfy_extras.nodes_freelunch import FreeU_V2  # noqa: E402
from comfy_extras.nodes_hypertile import HyperTile  # noqa: E402
from comfy_extras.nodes_model_advanced import RescaleCFG  # noqa: E402
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale  # noqa: E402
from comfy_extras.nodes_pag import PerturbedAttentionGuidance  # noqa: E402
from comfy_extras.nodes_sag import SelfAttentionGuidance  # noqa: E402
from comfy_extras.nodes_tomesd import TomePatchModel  # noqa: E402
from comfyui_kinds import KINDS, fill  # noqa: E402

from eval.calls.comfyui_models import demo_model, node_functions  # noqa: E402

TINY = dict(
    image_size=32,
    use_spatial_transformer=True,
    legacy=False,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    transformer_depth=[1, 0],
    transformer_depth_output=[1, 1, 0, 0],
    transformer_depth_middle=1,
    adm_in_channels=None,
)
SHAPES = {
    "sd15": dict(num_heads=4, num_head_channels=-1, use_linear_in_transformer=False, context_dim=32),
    "sd2": dict(
        num_heads=-1,
        num_head_channels=16,
        use_linear_in_transformer=True,
        context_dim=32,
        attn_precision=torch.float32,
    ),
    "sdxl": dict(
        num_heads=-1,
        num_head_channels=16,
        use_linear_in_transformer=True,
        context_dim=64,
        transformer_depth=[0, 2],
        transformer_depth_output=[0, 0, 2, 2],
        transformer_depth_middle=2,
        num_classes="sequential",
        adm_in_channels=80,
    ),
}
MODELS: dict[str, comfy.model_patcher.ModelPatcher] = {}


nodes_module = node_functions()  # loaded as ComfyUI loads a custom node


def widgets():
    """The node's widgets as ComfyUI's first form of nodes has them: type or choices, and options."""
    inputs = importlib.import_module("agentsd_nodes.v1").AgentSD.INPUT_TYPES()
    return {**inputs["required"], **inputs["optional"]}


def samplers():
    """Names of ComfyUI's samplers."""
    return comfy.samplers.KSampler.SAMPLERS


def loaded_packages():
    """Top-level modules that are loaded."""
    return sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None})


def make(name, kind, weights, prediction="eps"):
    """Make a tiny model of ComfyUI's classes with a diffusers UNet's weights, and name it."""
    if kind == "demo":
        MODELS[name] = demo_model(weights, torch.device("cpu"))
        return
    shape = {**TINY, **SHAPES[kind]}
    config = type("TinyConfig", (comfy.supported_models_base.BASE,), {"unet_extra_config": {}})(dict(shape))
    config.set_inference_dtype(torch.float32, None)
    model_type = {"eps": comfy.model_base.ModelType.EPS, "v": comfy.model_base.ModelType.V_PREDICTION}[prediction]
    model = comfy.model_base.BaseModel(config, model_type=model_type)
    names = comfy.utils.unet_to_diffusers(shape)
    model.diffusion_model.load_state_dict({names[name]: tensor.float() for name, tensor in weights.items()})
    cpu = torch.device("cpu")
    MODELS[name] = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _patched(model, nodes):
    """Put nodes on a model, by name with their settings."""
    model = MODELS[model]
    for name, settings in nodes:
        if name == "AgentSD":
            model = nodes_module.patch(model, **settings)
        elif name == "ToMe":
            model = TomePatchModel.execute(model, settings["ratio"]).args[0]
        elif name == "HyperTile":
            model = HyperTile.execute(model, settings["tile_size"], 2, 0, False)[0]
        elif name == "Deep Shrink":
            model = PatchModelAddDownscale.execute(model, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic").args[0]
        elif name in ("compile", "compile in earnest"):
            model = model.clone()
            set_torch_compile_wrapper(model, settings.get("backend", "eager"))
        elif name == "EasyCache":
            model = EasyCacheNode.execute(model, settings.get("threshold", 0.2), 0.15, 0.95, False).args[0]
        elif name == "LazyCache":
            model = LazyCacheNode.execute(model, settings.get("threshold", 0.2), 0.15, 0.95, False).args[0]
        elif name == "PAG":
            model = PerturbedAttentionGuidance.execute(model, 3.0).args[0]
        elif name == "SAG":
            model = SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]
        elif name == "FreeU":
            model = FreeU_V2().patch(model, 1.3, 1.4, 0.9, 0.2)[0]
        elif name == "RescaleCFG":
            model = RescaleCFG().patch(model, 0.7)[0]
        elif name == "DeepCache":  # as such nodes: the wrapper runs the UNet itself
            model = model.clone()
            model.set_model_unet_function_wrapper(_running_the_unet(model.model))
        elif name == "compiled block":
            model = model.clone()
            block = model.model.diffusion_model.get_submodule(settings["name"])
            compiled = torch.compile(getattr(block, "_orig_mod", block), backend="eager")
            model.add_object_patch(f"diffusion_model.{settings['name']}", compiled)
        elif name == "fails":
            model = model.clone()
            model.set_model_patch(_failing(settings), "attn2_patch")
        elif name == "LoRA":
            model, _ = comfy.sd.load_lora_for_models(model, None, settings["weights"], settings["strength"], 0)
        elif name == "EDM":
            model = model.clone()
            sampling = type("Sampling", (comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EPS), {})
            model.add_object_patch("model_sampling", sampling(model.model.model_config))
        elif name == "attn2":  # as IP-Adapter's nodes: what they see of the tokens is noted
            model = model.clone()
            model.set_model_attn2_patch(_noting(settings["seen"]))
        elif name == "attn1 replace":  # as perturbed-attention guidance: every query gets its own value
            model = model.clone()
            model.set_model_attn1_replace(lambda q, k, v, extra: v, *settings["place"])
        elif name == "other keys":  # as reference-only nodes: keys and values have more tokens than the image
            model = model.clone()
            model.set_model_attn1_patch(lambda n, k, v, extra: (n, torch.cat([k, k], 1), torch.cat([v, v * 2], 1)))
        elif name == "attn1 sees":
            model = model.clone()
            model.set_model_attn1_patch(_noting(settings["seen"]))
            model.set_model_attn1_output_patch(_noting(settings["seen"]))
        else:
            raise ValueError(name)
    return model


def _running_the_unet(model):
    """A model_function_wrapper that never calls apply_model."""

    def wrapper(apply, arguments):
        x, sigma, c = arguments["input"], arguments["timestep"], arguments["c"]
        sampling = model.model_sampling
        latent = sampling.calculate_input(sigma, x)
        options = {key: value for key, value in c["transformer_options"].items() if key != "wrappers"}
        out = model.diffusion_model(
            latent, sampling.timestep(sigma).float(), context=c["c_crossattn"], transformer_options=options
        )
        return sampling.calculate_denoised(sigma, out, x)

    return wrapper


def _failing(settings):
    """An attention patch that raises at its n-th call, once."""
    calls = []

    def patch(q, k, v, extra):
        calls.append(1)
        if len(calls) == settings["at"]:
            raise settings.get("error", RuntimeError)("interrupted")
        return q, k, v

    return patch


def _noting(seen):
    """An attention patch that changes nothing and notes the number of tokens."""

    def patch(tokens, *others):
        seen.append(tokens.shape[1])
        return (tokens, *others[:-1]) if len(others) > 1 else tokens

    return patch


def _agents(model):
    wrappers = model.get_wrappers("apply_model", "agentsd")
    return wrappers[-1] if wrappers else None


CONTROLNETS: dict[str, comfy.controlnet.ControlNet] = {}


def make_controlnet(name, seed):
    """Make a tiny ControlNet with random weights, and name it."""
    kept = ("image_size", "in_channels", "model_channels", "num_res_blocks", "channel_mult", "transformer_depth")
    kept += ("transformer_depth_middle", "use_spatial_transformer", "context_dim", "num_heads", "legacy")
    shape = {key: value for key, value in {**TINY, **SHAPES["sd15"]}.items() if key in kept}
    model = comfy.cldm.cldm.ControlNet(**shape, hint_channels=3, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    CONTROLNETS[name] = comfy.controlnet.ControlNet(model, load_device=torch.device("cpu"))


def _chain(names):
    control = None
    for name in names:
        hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(len(name)))
        control = CONTROLNETS[name].copy().set_cond_hint(hint, 1.0).set_previous_controlnet(control)
    return control


def _hooks(model):
    """Names of modules with any hook, and the keys of wrappers and patches on the model."""
    modules = list(model.model.named_modules())
    named = [name for name, module in modules if module._forward_pre_hooks or module._forward_hooks]
    named += [name for name, module in modules if "forward" in vars(module)]
    options = model.model_options.get("transformer_options", {})
    return named + sorted(options.get("patches", {})) + sorted(options.get("patches_replace", {}))


def call(model, nodes, latent, timestep, text, y=None, control=None, bypassed=None, seed=0):
    """One model call at a timestep, or one for each sample; returns the UNet's input, its output and the outcomes."""
    patcher = _patched(model, nodes)
    sampling = patcher.model.model_sampling
    sigma = sampling.sigmas[torch.tensor(timestep)].expand(latent.shape[0])
    seen = []
    handle = patcher.model.diffusion_model.register_forward_hook(lambda module, args, out: seen.extend([args[0], out]))
    options = {**patcher.model_options.get("transformer_options", {}), "wrappers": patcher.wrappers}
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    if bypassed is not None:  # a forward of its own, as some extensions give to blocks
        block = patcher.model.diffusion_model.get_submodule(bypassed)
        block.forward = lambda x, context=None, transformer_options=None: x * 1.1
    # A model in a graph is taken as compiled without the time that this takes.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        noisy = latent * (sigma[:, None, None, None] ** 2 + 1) ** 0.5
        patcher.model.apply_model(noisy, sigma, c_crossattn=text, control=control, transformer_options=options, y=y)
    handle.remove()
    if bypassed is not None:
        del block.forward
    agents = _agents(patcher)
    run = None if agents is None or agents.run is None else agents.run
    return {
        "sample": seen[0],
        "out": seen[1],
        "active": sorted(run.plans) if run else [],
        "actions": sorted({plan.action for plans in run.plans.values() for _, plan in plans}) if run else [],
        "told": list(run.told) if run else [],
        "hooks": _hooks(patcher),
        "random": not torch.equal(state, torch.get_rng_state()),
    }


@torch.inference_mode()  # as ComfyUI runs its graph
def sample(
    model,
    nodes,
    sampler="euler",
    steps=5,
    scheduler="normal",
    size=(16, 16),
    batch=1,
    areas=None,
    cfg=5.0,
    noise=None,
    text=None,
    control=None,
    timed=None,
    kind=None,
    again=0,
    between=None,
    **more,
):
    """Runs of ComfyUI's sampler on one patched model; returns latents, sigmas and report of the last one.

    Args:
        text: (positive, negative) text features.
        control: ControlNets for the positive prompt, by name, as a chain.
        timed: the part of the run at which a second positive prompt takes the place of the first.
        kind: of conditioning or model, one of comfyui_kinds.
        again: runs before the one that is returned; one that raises is left.
        between: (sampler, steps) of a run of the same patched model between two of them.
    """
    patcher = _patched(model, nodes)
    sigmas = []

    def note(apply, arguments):
        sigmas.append((float(arguments["timestep"][0]), tuple(arguments["input"].shape)))
        more = {}
        if "num_classes" in shape:  # pooled text and sizes, which BaseModel itself has not
            more["y"] = torch.linspace(-1, 1, shape["adm_in_channels"]).expand(len(arguments["input"]), -1)
        return apply(arguments["input"], arguments["timestep"], **arguments["c"], **more)

    shape = MODELS[model].model.model_config.unet_config
    patcher = patcher.clone()
    if "model_function_wrapper" not in patcher.model_options:
        patcher.set_model_unet_function_wrapper(note)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 1, 7, shape["context_dim"], generator=generator)
    if noise is None:
        noise = torch.randn(batch, 4, *size, generator=generator)
    positive, negative = [[features[0], {}]], [[features[1], {}]]
    if text is not None:
        positive, negative = [[text[0], {}]], [[text[1], {}]]
    if areas:
        positive = [[one, {"area": area, "strength": 1.0}] for one, area in zip(features[1:], areas)] + positive
    if timed is not None:
        positive = [
            [features[0], {"start_percent": 0.0, "end_percent": timed}],
            [features[2], {"start_percent": timed, "end_percent": 1.0}],
        ]
    if control:
        positive[0][1]["control"] = _chain(control)
    if kind is not None:
        patcher = KINDS[kind](patcher, positive, negative, noise)
    runs = []
    for number in range(again + 1):
        if number and between is not None:
            arguments = (patcher, noise[..., :8, :8] * 1, between[1], cfg, between[0], "simple", positive, negative)
            comfy.sample.sample(*arguments, torch.zeros_like(noise[..., :8, :8]), seed=1, disable_pbar=True)
        sigmas.clear()
        # A compiled model is taken as such without the time that compiling takes.
        stance = torch.compiler.set_stance("force_eager" if ("compile", {}) in nodes else "default")
        with stance, contextlib.suppress(RuntimeError, comfy.model_management.InterruptProcessingException):
            latents = comfy.sample.sample(
                patcher,
                noise,
                steps,
                cfg,
                sampler,
                scheduler,
                positive,
                negative,
                torch.zeros_like(noise),
                seed=0,
                disable_pbar=True,
                **more,
            )
            runs.append(latents)
    agents = _agents(patcher)
    run = agents.run if agents else None
    early = agents.config.early if agents else 0
    sampling = patcher.get_model_object("model_sampling")
    return {
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "latents": latents,
        "runs": runs,
        "calls": list(sigmas),
        "boundary": sampling.percent_to_sigma(early),
        "timesteps": [float(sampling.timestep(torch.tensor(s))) for s, _ in sigmas],
        "phases": {phase.value: count for phase, count in run.calls.items()} if run else {},
        "counts": (run.whole, run.cached) if run else None,
        "kept": run is not None and run.caching is not None,
        "told": list(run.told) if run else [],
        "report": nodes_module.describe(patcher) if agents else "",
        "hooks": _hooks(MODELS[model]),
        "seen": [settings["seen"] for _, settings in nodes if "seen" in settings],
    }


def make_random(name, seed=9, **shape):
    """Make a tiny model with random weights that needs no counterpart on diffusers, and name it."""
    config = {**TINY, **SHAPES["sd15"], "num_res_blocks": [2, 2], "transformer_depth": [1, 1, 0, 0]}
    config.update(transformer_depth_output=[1, 1, 1, 0, 0, 0], **shape)
    made = type("TinyConfig", (comfy.supported_models_base.BASE,), {"unet_extra_config": {}})(config)
    made.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(made, model_type=comfy.model_base.ModelType.EPS)
    fill(model.diffusion_model, seed, 0.1)
    if config["in_channels"] == 9:
        model.set_inpaint()
    cpu = torch.device("cpu")
    MODELS[name] = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@torch.inference_mode()
def recorded(model, nodes, sampler, scheduler, steps, text):
    """A run without guidance: (input, timestep, output) of each call of the UNet, and which calls were cached."""
    patcher = _patched(model, nodes)
    calls, cached = [], []

    def note(unet, args, out):
        run = _agents(patcher).run
        calls.append((args[0].clone(), float(args[1][0]), out.clone()))
        cached.append(run.cached)

    handle = patcher.model.diffusion_model.register_forward_hook(note)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = [[text, {}]]
    try:
        comfy.sample.sample(
            patcher, noise, steps, 1.0, sampler, scheduler, prompt, prompt, noise * 0, seed=0, disable_pbar=True
        )
    finally:
        handle.remove()
    run = _agents(patcher).run
    counts = [*cached[1:], run.cached]  # a call is counted when it has returned
    flags = [after > before for before, after in zip(cached, counts)]
    return {
        "calls": calls,
        "cached": flags,
        "counts": (run.whole, run.cached),
        "told": list(run.told),
        "left": _hooks(MODELS[model]) + [run.caching] * (run.caching is not None),
    }


def with_whole_parts(**arguments):
    """`sample` by a naive reference: cached calls run everything, and the kept feature takes the place of the last."""
    parts, wrapper = sys.modules["agentsd_nodes.skipping"].SkippedParts, sys.modules["agentsd_nodes.wrapper"]
    kept = parts.skipped, parts.control, parts.transformer_options, wrapper.stopped_controlnets

    @contextlib.contextmanager
    def replaced(self, feature):
        handle = self._last.register_forward_hook(lambda module, args, output: feature)
        try:
            yield
        finally:
            handle.remove()

    parts.skipped = replaced
    parts.control = parts.transformer_options = lambda self, given: given
    wrapper.stopped_controlnets = lambda controls, depth: contextlib.nullcontext()
    try:
        return sample(**arguments)
    finally:
        parts.skipped, parts.control, parts.transformer_options, wrapper.stopped_controlnets = kept


def with_little_memory(part, **arguments):
    """`sample` where a part of the weights fits on the device, as with --lowvram; the others are cast when used."""
    patcher = comfy.model_patcher.ModelPatcher
    own, casts = patcher.load, []

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        own(self, device_to, max(1, int(part * self.model_size())), force_patch_weights, full_load=False)
        modules = self.model.diffusion_model.modules()
        casts.append(sum(getattr(module, "comfy_cast_weights", False) for module in modules))

    comfy.model_management.unload_all_models()
    patcher.load = load
    try:
        return {**sample(**arguments), "casts": casts}
    finally:
        patcher.load = own
        comfy.model_management.unload_all_models()


def base_and_refiner(models, nodes, steps, switch):
    """KSampler (Advanced) twice, as a base and a refiner; returns the latents, and (whole, cached) of each half."""
    generator = torch.Generator().manual_seed(0)
    text, noise = torch.randn(2, 1, 7, 32, generator=generator), torch.randn(1, 4, 16, 16, generator=generator)
    latents, counts = torch.zeros_like(noise), []
    for half, model in enumerate(models):
        patcher = _patched(model, nodes)
        part = dict(start_step=0, last_step=switch) if half == 0 else dict(start_step=switch, disable_noise=True)
        latents = comfy.sample.sample(
            patcher,
            torch.zeros_like(noise) if half else noise,
            steps,
            3.0,
            "euler",
            "karras",
            [[text[0], {}]],
            [[text[1], {}]],
            latents,
            seed=0,
            disable_pbar=True,
            force_full_denoise=half == 1,
            **part,
        )
        run = _agents(patcher).run if nodes else None
        counts.append((run.whole, run.cached) if run else None)
    return latents, counts


def lora_of(model):
    """Random LoRA weights of all attention of a model, as LoraLoader reads them from a file."""
    generator, file = torch.Generator().manual_seed(8), {}
    for name, tensor in MODELS[model].model.diffusion_model.state_dict().items():
        if ".to_" in name and name.endswith("weight"):
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            file[f"{key}.lora_up.weight"] = torch.randn(tensor.shape[0], 4, generator=generator) * 0.1
            file[f"{key}.lora_down.weight"] = torch.randn(4, tensor.shape[1], generator=generator) * 0.1
    return file


def _run(patcher, sampler, steps, size, seed):
    generator = torch.Generator().manual_seed(seed)
    text, noise = torch.randn(2, 1, 7, 32, generator=generator), torch.randn(1, 4, *size, generator=generator)
    prompts = [[text[0], {}]], [[text[1], {}]]
    return comfy.sample.sample(
        patcher, noise, steps, 3.0, sampler, "karras", *prompts, noise * 0, seed=seed, disable_pbar=True
    )


def two_samplers(model, nodes, steps):
    """Runs of two samplers by turns on one patched model, and the second one's on a model of its own."""
    patcher = _patched(model, nodes)
    first, second = ("euler", steps, (16, 16), 1), ("dpmpp_2m", steps + 3, (16, 8), 2)
    runs = [_run(patcher, *one) for one in (first, second, first)]
    return [*runs, _run(_patched(model, nodes), *second)]


def with_whole_controlnets(**arguments):
    """`sample` where ControlNets are never stopped."""
    wrapper = sys.modules["agentsd_nodes.wrapper"]
    kept = wrapper.stopped_controlnets
    wrapper.stopped_controlnets = lambda controls, depth: contextlib.nullcontext()
    try:
        return sample(**arguments)
    finally:
        wrapper.stopped_controlnets = kept


def cancelled(model, nodes):
    """A run that the user stops in its sixth step."""
    patcher = _patched(model, nodes)
    text, noise = torch.randn(1, 7, 32), torch.randn(1, 4, 16, 16)

    def stop(step, *others):
        if step == 5:
            raise comfy.model_management.InterruptProcessingException()

    raised = None
    try:
        comfy.sample.sample(
            patcher, noise, 12, 1.0, "euler", "normal", [[text, {}]], [[text, {}]], noise * 0, seed=0, callback=stop
        )
    except BaseException as error:
        raised = type(error).__name__
    return {"raised": raised, "kept": _agents(patcher).run.caching is not None, "hooks": _hooks(MODELS[model])}


def upcasts(model, forced):
    """Whether agent attention was told to upcast, in one call."""
    attention = sys.modules["comfy.ldm.modules.attention"]
    calls = sys.modules["agentsd_nodes.unet_call"]
    kept, own = attention.FORCE_UPCAST_ATTENTION_DTYPE, calls.agent_attention
    seen = set()

    def note(*args, upcast, **more):
        seen.add(upcast)
        return own(*args, upcast=upcast, **more)

    attention.FORCE_UPCAST_ATTENTION_DTYPE = {torch.float32: torch.float32} if forced else None
    calls.agent_attention = note
    try:
        call(model, [("AgentSD", {"early": 1.0})], torch.randn(1, 4, 16, 16), 900, torch.randn(1, 7, 32))
    finally:
        attention.FORCE_UPCAST_ATTENTION_DTYPE, calls.agent_attention = kept, own
    return sorted(seen)


def patched_with(model, values):
    """The settings of a node that got these values and no others."""
    return dataclasses.asdict(_agents(nodes_module.patch(MODELS[model], **values)).config)


def loaded_by_comfyui(model, v3, values):
    """The folder loaded by ComfyUI's own loader, with or without its current form of nodes, and run by its executor.

    Returns:
        Whether the nodes have the current form; the inputs of each node as {name: (kind or choices, options)}; the
        titles; the settings of a model that AgentSD got these values for; what the report gives and shows.
    """
    import execution
    import nodes

    folder = str(REPOSITORY / "apps" / "comfyui")
    own = sys.modules["comfy_api.latest"]
    for name in [name for name in sys.modules if name.startswith(folder.replace(".", "_x_"))]:
        del sys.modules[name]
    if not v3:
        sys.modules["comfy_api.latest"] = None
    try:
        assert asyncio.run(nodes.load_custom_node(folder))
    finally:
        sys.modules["comfy_api.latest"] = own
    found = {name: nodes.NODE_CLASS_MAPPINGS[name] for name in ("AgentSD", "AgentSDReport")}

    def run(name, inputs):
        given = {key: [value] for key, value in inputs.items()}
        return asyncio.run(execution.get_output_data("prompt", "1", found[name](), given))[:2]

    ((patched,),), _ = run("AgentSD", {"model": MODELS[model], **values})
    report = run("AgentSDReport", {"model": patched, "samples": None})
    return {
        "v3": [issubclass(one, own.io.ComfyNode) for one in found.values()],
        "inputs": {name: _plain_inputs(one.INPUT_TYPES()) for name, one in found.items()},
        "outputs": {name: [str(kind) for kind in one.RETURN_TYPES] for name, one in found.items()},
        "shows": [getattr(one, "OUTPUT_NODE", False) for one in found.values()],
        "texts": [(one.CATEGORY, one.DESCRIPTION) for one in found.values()],
        "titles": [nodes.NODE_DISPLAY_NAME_MAPPINGS[name] for name in found],
        "settings": dataclasses.asdict(_agents(patched).config),
        "report": report,
    }


def _plain_inputs(given):
    """Inputs of either form in one: (kind or list of choices, options)."""
    inputs = {}
    for part in ("required", "optional"):
        for name, (kind, options) in given.get(part, {}).items():
            options = {key: value for key, value in options.items() if key not in ("options", "multiselect")}
            choices = given[part][name][1].get("options")
            inputs[name] = (part, str(kind) if choices is None else choices, options)
            if isinstance(kind, list):
                inputs[name] = (part, kind, options)
    return inputs


def two_runs(model, nodes):
    """The same patched model in two runs of different length; returns the phases counted in each."""
    patcher = _patched(model, nodes)
    generator = torch.Generator().manual_seed(0)
    text, noise = torch.randn(1, 7, 32, generator=generator), torch.randn(1, 4, 16, 16, generator=generator)
    counts, latents = [], []
    for steps in (4, 6, 4):
        latents.append(
            comfy.sample.sample(
                patcher, noise, steps, 1.0, "euler", "normal", [[text, {}]], [[text, {}]], noise * 0, seed=0
            )
        )
        counts.append(sum(_agents(patcher).run.calls.values()))
    return counts, torch.equal(latents[0], latents[2])


def failing_call(model, nodes):
    """A call that raises half-way; returns the hooks left behind and whether the next run is the same as before."""
    patcher = _patched(model, nodes)

    def fail(hidden, extra):
        raise RuntimeError("interrupted")

    broken = patcher.clone()
    broken.set_model_patch(fail, "middle_patch")
    options = {**broken.model_options["transformer_options"], "wrappers": broken.wrappers}
    latent, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    with contextlib.suppress(RuntimeError):
        broken.model.apply_model(latent, torch.tensor([9.0]), c_crossattn=text, transformer_options=options)
    return _hooks(MODELS[model])


def error_of(model, nodes):
    """The error that putting nodes on a model raises."""
    try:
        _patched(model, nodes)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def error_on_dit():
    """The error on a model that is a DiT (SD 3's, tiny)."""
    dit = comfy.ldm.modules.diffusionmodules.mmdit.MMDiT(
        input_size=8, patch_size=2, depth=2, context_embedder_config=None, operations=torch.nn
    )
    return _error_on(dit)


def error_on_video_unet():
    """The error on a UNet whose transformers attend over time too (Stable Video Diffusion's, tiny)."""
    video = dict(
        use_temporal_attention=True,
        use_temporal_resblock=True,
        extra_ff_mix_layer=True,
        use_spatial_context=True,
        merge_strategy="learned_with_images",
        merge_factor=0.0,
        video_kernel_size=[3, 1, 1],
    )
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **{**TINY, **SHAPES["sd15"], **video}, operations=comfy.ops.disable_weight_init
    )
    return _error_on(unet)


def _error_on(diffusion_model):
    holder = torch.nn.Module()
    holder.diffusion_model = diffusion_model
    MODELS["other"] = comfy.model_patcher.ModelPatcher(holder, torch.device("cpu"), torch.device("cpu"))
    return error_of("other", [("AgentSD", {})])


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = None, globals()[function](**arguments)
        except Exception:
            answer = traceback.format_exc(), None
        pickle.dump(answer, _answers)
        _answers.flush()


if __name__ == "__main__":
    main()
