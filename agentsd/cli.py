"""The `agentsd` command: arguments in, one clear sentence out where something is wrong; the work is done elsewhere."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from .config import AgentConfig

_METHODS = ("sd", "tomesd", "agentsd")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped or failed on the way, 2 wrong input."""
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
    def error(self, message: str) -> None:
        """One sentence, as for all other wrong input, and no page of usage before it."""
        self.exit(2, f"agentsd: {message}; `{self.prog} --help` lists the options\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="agentsd",
        description="Stable Diffusion made faster with no training, by token-merged agent attention.",
    )
    parser.add_argument("--version", action="version", version=f"agentsd {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="draw a picture", description="Draw a picture and save it as a PNG."
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", help="what the picture shows")
    generate.add_argument("-o", "--output", required=True, metavar="FILE.png", help="where to save it")
    method = generate.add_mutually_exclusive_group()
    method.add_argument("--method", choices=_METHODS, default="agentsd", help="default: %(default)s")
    method.add_argument(
        "--compare", action="store_true", help="draw all three methods with the same seed, and time them side by side"
    )
    generate.add_argument(
        "--rounds", type=int, metavar="N",
        help="with --compare: time every method N times, interleaved, and take medians (default: 3, or fewer once "
        "five minutes have gone by)",
    )  # fmt: skip
    _add_request(generate)
    _add_model(generate)
    _add_patch(generate)

    info = commands.add_parser(
        "info", help="what would be patched, and what it saves", description="Patch a model and describe the patch."
    )
    info.set_defaults(run=_info)
    info.add_argument("--json", action="store_true", help="as JSON")
    info.add_argument("--height", type=int, help="in pixels; default: the model's own")
    info.add_argument("--width", type=int, help="in pixels; default: the model's own")
    _add_model(info)
    _add_patch(info)

    visualize = commands.add_parser(
        "visualize",
        help="look inside a layer",
        description="Draw a picture, and maps of what one layer did in one step.",
    )
    visualize.set_defaults(run=_visualize)
    visualize.add_argument("prompt", help="what the picture shows")
    visualize.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the pictures; made if missing"
    )
    visualize.add_argument("--layer", default="0", help="number or name of a patched layer (default: 0)")
    visualize.add_argument("--call", type=int, default=0, help="number of the UNet call, from 0 (default: 0)")
    visualize.add_argument("--agents", type=int, default=16, help="how many agents' maps to show (default: 16)")
    _add_request(visualize)
    _add_model(visualize)
    _add_patch(visualize)
    return parser


def _add_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the picture")
    group.add_argument("--negative-prompt", default="", help="what it should not show")
    group.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    group.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of the initial noise (default: %(default)s)")
    group.add_argument("--height", type=int, help="in pixels; default: the model's own")
    group.add_argument("--width", type=int, help="in pixels; default: the model's own")
    # The names stand in pipelines.SCHEDULERS, which a wrong one is checked against; importing it takes seconds.
    group.add_argument("--scheduler", help="plms, ddim, euler, dpm++2m-karras …; default: the model's own")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model", default="demo", help="demo (built in), a folder, or a Hugging Face id (default: %(default)s)"
    )
    group.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    group.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")


def _add_patch(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the patch (the fields of agentsd.AgentConfig)")
    defaults = AgentConfig()

    def add(name: str, convert: Any, text: str) -> None:
        group.add_argument(
            "--" + name.replace("_", "-"), type=convert, default=getattr(defaults, name),
            help=f"{text} (default: %(default)s)",
        )  # fmt: skip

    add("ratio", float, "fraction of the tokens merged away")
    add("early", float, "noisiest fraction of the run that uses agent attention")
    add("late", str, "later steps: merge (as ToMeSD), downsample (keys and values, as ToDo) or full (unpatched)")
    add("alpha", float, "weight of the mixing term")
    add("broadcast_exponent", float, "scale of the second softmax is head_dim ** this")
    add("agent_ratio", float, "fraction of the tokens merged away to make agents")
    add("agent_stride", _stride, "cell of the agents' grid: N or ROWSxCOLUMNS")
    add("merge_stride", _stride, "cell of the merge phase's grid: N or ROWSxCOLUMNS")
    add("max_agents", _none_or_int, "the most agents there may be, at any size")
    add("max_keys", _none_or_int, "with --late downsample, the most keys there may be, at any size")
    add("match_tile", _none_or_int, "compare tokens only within tiles of so many tokens a side")
    add("max_downsample", _auto_or_int, "patch levels down to this downsampling: auto, 1, 2, 4 or 8")
    group.add_argument("--no-rand", dest="use_rand", action="store_false", help="fixed destinations, not random ones")
    group.add_argument("--patch-seed", type=int, default=0, help="of the random destinations (default: %(default)s)")
    group.add_argument("--merge-crossattn", action="store_true", help="merge around cross-attention too")
    group.add_argument("--merge-mlp", action="store_true", help="merge around feed-forward layers too")
    group.add_argument(
        "--upcast", action=argparse.BooleanOptionalAction, default=None,
        help="softmax logits in float32 (default: as the model says)",
    )  # fmt: skip


def _stride(text: str) -> int | tuple[int, ...]:
    parts = tuple(int(part) for part in text.lower().replace("×", "x").split("x"))
    return parts[0] if len(parts) == 1 else parts


_stride.__name__ = "N or ROWSxCOLUMNS"  # argparse names the type in its error


def _auto_or_int(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _none_or_int(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


_none_or_int.__name__ = "integer or none"


def _config(options: argparse.Namespace) -> AgentConfig:
    from .config import FIELD_NAMES

    values = {name: getattr(options, name) for name in FIELD_NAMES if name != "seed"}
    return AgentConfig(**values, seed=options.patch_seed)


# --- the commands -----------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.rounds is not None and not 1 <= options.rounds <= 100:
        raise ValueError(f"rounds={options.rounds}: must lie in 1 … 100")
    if options.rounds is not None and not options.compare:
        raise ValueError("rounds: belongs to --compare; a single picture is drawn once")
    from .images import compare, png
    from .images.methods import METHODS

    request = _request(options)
    output = png.check_output(options.output)
    pipe = _load(options)
    if not options.compare:
        pipe.set_progress_bar_config(desc=METHODS[options.method], leave=False)
        result = compare.generate(pipe, request, options.method, config)
        png.save_image(result.image, output, result.settings)
        print(f"{output}: {METHODS[options.method]}, {result.seconds:.2f} s")
        return 0

    def announce(method: str, number: int) -> None:
        name = METHODS[method]
        pipe.set_progress_bar_config(desc=f"{name}, " + (f"round {number}" if number else "warm-up"), leave=False)

    comparison = compare.compare_methods(pipe, request, config, _METHODS, options.rounds, announce)
    comparison.save(output)
    print(comparison)
    print(output)
    return 0


def _info(options: argparse.Namespace) -> int:
    import json

    config = _config(options)
    from .patch import apply_patch
    from .report import describe

    pipe = _load(options)
    report = describe(apply_patch(pipe, config), options.height, options.width)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0


def _visualize(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.call < 0:
        raise ValueError(f"call={options.call}: must be 0 or more, the number of a UNet call")
    if not 1 <= options.agents <= 256:
        raise ValueError(f"agents={options.agents}: must lie in 1 … 256")
    from . import visualize
    from .images import png
    from .images.generate import settings_of

    request = _request(options)
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output={options.output!r}: is a file; give a folder")
    made_by_us = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in ("picture", "merge_map", "agents"):
            png.check_output(folder / f"{name}.png")
        pipe = _load(options)
        pipe.set_progress_bar_config(desc="AgentSD", leave=False)
        layer = int(options.layer) if options.layer.isdigit() else options.layer
        image, view = visualize.look_inside(pipe, request, config, layer, options.call)
    except BaseException:
        for path in made_by_us:
            path.rmdir()
        raise
    settings = settings_of(pipe, request, "agentsd", config)
    settings["view"] = {"layer": view.layer, "call": view.call, "timestep": view.timestep, "phase": view.phase.value}
    pictures = {"picture": image, "merge_map": visualize.merge_map(view, image)}
    if view.agent_attention is not None:
        pictures["agents"] = visualize.agents_sheet(view, image, options.agents)
    for name, picture in pictures.items():
        png.save_image(picture, folder / f"{name}.png", settings)
    if "agents" not in pictures:
        (folder / "agents.png").unlink(missing_ok=True)  # of an earlier look into this folder: another picture's
    agents = "no agents" if view.agent_attention is None else f"{len(view.agent_attention)} agents"
    height, width = view.grid
    print(f"{view.layer} at timestep {view.timestep:g} ({view.phase.value} phase): {height * width} tokens, {agents}")
    print("\n".join(str(folder / f"{name}.png") for name in pictures))
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
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # deprecations between libraries are not the user's business
    from .images.pipelines import load_pipeline

    scheduler = getattr(options, "scheduler", None)
    return load_pipeline(options.model, device=options.device, dtype=options.dtype, scheduler=scheduler)


def _version() -> str:
    from . import __version__

    return __version__


def _fail(message: str, code: int) -> int:
    print(f"agentsd: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
