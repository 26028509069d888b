"""The `agentsd` command: its arguments, and one sentence on stderr for wrong input; other modules do the work."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from .config import AgentConfig

_METHODS = ("sd", "tomesd", "agentsd")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 interrupted or failed, 2 wrong input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    # Heavy imports happen in the commands, so that --help and wrong arguments answer at once.
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was written", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        return _fail(str(error), 2)
    except Exception as error:
        from .images.pipelines import ModelError

        if isinstance(error, ModelError):
            return _fail(str(error), 2)
        if type(error).__name__ == "OutOfMemoryError":
            return _fail("out of memory: try a smaller --height and --width, or --dtype float16", 1)
        raise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one sentence, as for all other wrong input, without the usage."""
        self.exit(2, f"agentsd: {message}; `{self.prog} --help` lists the options\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="agentsd",
        description="Faster Stable Diffusion without training, by token-merged agent attention.",
    )
    parser.add_argument("--version", action="version", version=f"agentsd {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="generate an image", description="Generate an image and save it as a PNG."
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", help="what the image shows")
    generate.add_argument("-o", "--output", required=True, metavar="FILE.png", help="where to save it")
    method = generate.add_mutually_exclusive_group()
    method.add_argument("--method", choices=_METHODS, default="agentsd", help="default: %(default)s")
    method.add_argument(
        "--compare", action="store_true", help="use all three methods with the same seed, and time them side by side"
    )
    generate.add_argument(
        "--rounds", type=int, metavar="N",
        help="with --compare: time each method N times, interleaved, and take medians (default: 3, or fewer once "
        "five minutes have passed)",
    )  # fmt: skip
    _add_request(generate)
    _add_model(generate)
    _add_patch(generate)

    info = commands.add_parser(
        "info", help="what would be patched, and what it saves", description="Patch a model and describe the patch."
    )
    info.set_defaults(run=_info)
    form = info.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--layers", action="store_true", help="every layer by name, with the number that visualize takes")
    info.add_argument("--height", type=int, help="in pixels; default: the model's own")
    info.add_argument("--width", type=int, help="in pixels; default: the model's own")
    _add_model(info)
    _add_patch(info)

    visualize = commands.add_parser(
        "visualize",
        help="show what a layer merges and what its agents attend to",
        description="Generate an image, and maps of what one layer did in one of its UNet calls.",
    )
    visualize.set_defaults(run=_visualize)
    visualize.add_argument("prompt", help="what the image shows")
    visualize.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the images; made if missing"
    )
    visualize.add_argument("--layer", default="0", help="number or name of a patched layer (default: 0)")
    visualize.add_argument("--call", type=int, default=0, help="number of the UNet call, from 0 (default: 0)")
    visualize.add_argument("--agents", type=int, default=16, help="how many agents' maps to show (default: 16)")
    _add_request(visualize)
    _add_model(visualize)
    _add_patch(visualize)

    prompts = commands.add_parser(
        "prompts",
        help="list what the built-in demo model knows",
        description="List what the built-in demo model knows.",
    )
    prompts.set_defaults(run=_prompts)
    return parser


def _add_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the image")
    group.add_argument("--negative-prompt", default="", help="what it should not show")
    group.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    group.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="seed of the initial noise (default: %(default)s)")
    group.add_argument("--height", type=int, help="in pixels; default: the model's own")
    group.add_argument("--width", type=int, help="in pixels; default: the model's own")
    # A wrong name is checked against pipelines.SCHEDULERS; importing it takes seconds.
    group.add_argument("--scheduler", help="plms, ddim, euler, dpm++2m-karras …; default: the model's own")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model", default="demo", help="demo (built in), a folder, or a Hugging Face id (default: %(default)s)"
    )
    group.add_argument("--device", help="cuda, mps or cpu; default: the first available of these")
    group.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")


_FIELD_HELP = {
    "ratio": "fraction of the tokens merged away",
    "early": "noisiest fraction of the run that uses agent attention",
    "late": "later steps: merge (as ToMeSD), downsample (keys and values, as ToDo) or full (unpatched)",
    "alpha": "weight of the mixing term",
    "broadcast_exponent": "scale of the second softmax is head_dim ** this",
    "agent_ratio": "fraction of the tokens merged away to make agents",
    "agent_stride": "cell of the agents' grid: N or ROWSxCOLUMNS",
    "merge_stride": "cell of the merge phase's grid: N or ROWSxCOLUMNS",
    "max_agents": "maximum number of agents, at any size, or none",
    "max_keys": "with --late downsample, maximum number of keys, at any size, or none",
    "match_tile": "compare tokens only within tiles of this many tokens a side, or none",
    "max_downsample": "patch levels down to this downsampling: auto, 1, 2, 4 or 8",
    "cache_interval": "at most this many consecutive UNet calls share one whole call; 1 = no step caching",
    "cache_order": "0 reuses the kept feature, 1 extrapolates it linearly",
    "cache_depth": "how much of the last up block a cached call recomputes, or auto",
    "use_rand": "take a random destination in each cell; --no-rand takes the first",
    "seed": "seed for choosing destination tokens",
    "merge_crossattn": "merge around cross-attention too",
    "merge_mlp": "merge around feed-forward layers too",
    "upcast": "softmax logits in float32; default: as the model says",
}
"""Field of AgentConfig -> help of its option."""

_FIELD_OPTIONS = {"seed": "--patch-seed", "use_rand": "--rand"}
"""Options that are not called as their field: --seed is that of the noise."""


def _add_patch(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of AgentConfig, by its type; the preset decides the fields that are not given."""
    from .images.settings import PRESETS

    group = parser.add_argument_group("the patch (the fields of agentsd.AgentConfig)")
    if PRESETS:
        group.add_argument("--preset", choices=list(PRESETS), help="settings to start from; single options win over it")
    for field in dataclasses.fields(AgentConfig):
        option = _FIELD_OPTIONS.get(field.name, "--" + field.name.replace("_", "-"))
        text = _FIELD_HELP.get(field.name, "see AgentConfig")
        kind = str(field.type).removesuffix(" | None")
        if kind == "bool":
            group.add_argument(
                option, dest=f"patch_{field.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                help=text,
            )  # fmt: skip
        else:
            optional = str(field.type).endswith(" | None")
            group.add_argument(
                option, dest=f"patch_{field.name}", type=_Converter(kind, optional), default=argparse.SUPPRESS,
                metavar=field.name.upper(), help=f"{text} (default: {str(field.default).lower()})",
            )  # fmt: skip


class _Converter:
    """From an option's text to the value of a field of AgentConfig, by the type in its annotation."""

    _SHAPES = {"int": "integer", "float": "number", "str": "text", "int | tuple[int, int]": "N or ROWSxCOLUMNS"}

    def __init__(self, kind: str, optional: bool):
        self.kind = kind
        self.optional = optional
        # argparse names the type in its error.
        self.__name__ = self._SHAPES.get(kind, "integer or word") + (" or none" if optional else "")

    def __call__(self, text: str) -> Any:
        if self.optional and text.lower() == "none":
            return None
        if self.kind in ("int", "float", "str"):
            return {"int": int, "float": float, "str": str}[self.kind](text)
        if "tuple" in self.kind:
            parts = tuple(int(part) for part in text.lower().replace("×", "x").split("x"))
            return parts[0] if len(parts) == 1 else parts
        return int(text) if text.isdigit() else text  # a number or a word, as max_downsample is


def _config(options: argparse.Namespace) -> AgentConfig:
    from .images.settings import make_config

    fields = {name.removeprefix("patch_"): value for name, value in vars(options).items() if name.startswith("patch_")}
    return make_config(preset=getattr(options, "preset", None), **fields)


# --- the commands -----------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.rounds is not None and not 1 <= options.rounds <= 100:
        raise ValueError(f"rounds={options.rounds}: must lie in 1 … 100")
    if options.rounds is not None and not options.compare:
        raise ValueError("rounds: belongs to --compare; a single image is generated once")
    from .images import compare, png, progress
    from .images.methods import METHODS

    request = _request(options)
    output = png.check_output(options.output)
    pipe = _load(options)
    if not options.compare:
        progress.Progress(pipe, request.steps).single(METHODS[options.method])
        result = compare.generate(pipe, request, options.method, config)
        png.save_image(result.image, output, result.settings)
        print(f"{output}: {METHODS[options.method]}, {result.seconds:.2f} s")
        return 0
    shown = progress.ComparisonProgress(pipe, request.steps, _METHODS, options.rounds)
    comparison = compare.compare_methods(pipe, request, config, _METHODS, options.rounds, shown)
    shown.finish()
    comparison.save(output)
    print(comparison)
    print(output)
    return 0


def _info(options: argparse.Namespace) -> int:
    import json
    import shutil

    config = _config(options)
    from .patch import apply_patch
    from .report import describe
    from .report_text import USUAL_WIDTH, as_text, every_layer

    pipe = _load(options)
    report = describe(apply_patch(pipe, config), options.height, options.width)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif options.layers:
        print(every_layer(report))
    else:
        print(as_text(report, min(USUAL_WIDTH, shutil.get_terminal_size((USUAL_WIDTH, 24)).columns)))
    return 0


def _prompts(options: argparse.Namespace) -> int:
    import shutil
    import textwrap

    from .images.demo_prompts import DEMO_NAMES

    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    about = f'The demo model knows {len(DEMO_NAMES)} things. A prompt for it: "a high quality photograph of a castle."'
    print(textwrap.fill(about, width))
    print()
    print(textwrap.fill(", ".join(DEMO_NAMES), width))
    return 0


def _visualize(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.call < 0:
        raise ValueError(f"call={options.call}: must be 0 or more, the number of a UNet call")
    if not 1 <= options.agents <= 256:
        raise ValueError(f"agents={options.agents}: must lie in 1 … 256")
    from . import visualize
    from .images import png, progress
    from .images.generate import settings_of

    request = _request(options)
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output={options.output!r}: is a file; give a folder")
    made_by_us = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in ("image", "merge_map", "agents"):
            png.check_output(folder / f"{name}.png")
        pipe = _load(options)
        progress.Progress(pipe, request.steps).single("AgentSD")
        layer = int(options.layer) if options.layer.isdigit() else options.layer
        image, view = visualize.look_inside(pipe, request, config, layer, options.call)
    except BaseException:
        for path in made_by_us:
            path.rmdir()
        raise
    settings = settings_of(pipe, request, "agentsd", config)
    settings["view"] = {"layer": view.layer, "call": view.call, "timestep": view.timestep, "phase": view.phase.value}
    sheets = {"image": image, "merge_map": visualize.merge_map(view, image)}
    if view.agent_attention is not None:
        sheets["agents"] = visualize.agents_sheet(view, image, options.agents)
    for name, sheet in sheets.items():
        png.save_image(sheet, folder / f"{name}.png", settings)
    if "agents" not in sheets:
        (folder / "agents.png").unlink(missing_ok=True)  # left by an earlier run, for another image
    agents = "no agents" if view.agent_attention is None else f"{len(view.agent_attention)} agents"
    height, width = view.grid
    print(f"{view.layer} at timestep {view.timestep:g} ({view.phase.value} phase): {height * width} tokens, {agents}")
    if view.agent_attention is None:
        print(f"--call: {view.where_agents_are}")
    print("\n".join(str(folder / f"{name}.png") for name in sheets))
    return 0


def _request(options: argparse.Namespace) -> Any:
    from .images.request import Request

    return Request(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        height=options.height,
        width=options.width,
    )


def _load(options: argparse.Namespace) -> Any:
    # Deprecations between libraries are nothing that a user of the command can act on.
    warnings.filterwarnings("ignore", category=FutureWarning)
    from .images.pipelines import load_pipeline

    prompt = getattr(options, "prompt", None)
    if options.model == "demo" and prompt is not None:
        from .images.demo_prompts import unknown_subject

        unknown = unknown_subject(prompt)
        if unknown:
            print(f"agentsd: {unknown}", file=sys.stderr)
    if not sys.stderr.isatty():
        _no_bars()
    scheduler = getattr(options, "scheduler", None)
    return load_pipeline(options.model, device=options.device, dtype=options.dtype, scheduler=scheduler)


def _no_bars() -> None:
    """Switch off the bars of downloads and of loading, hundreds of frames in a file or a pipe."""
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def _version() -> str:
    from . import __version__

    return __version__


def _fail(message: str, code: int) -> int:
    print(f"agentsd: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
