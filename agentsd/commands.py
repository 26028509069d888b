"""What the commands of `agentsd` do; heavy imports happen inside, so that wrong input is answered at once."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import AgentConfig

if TYPE_CHECKING:
    from .images.request import Request


def generate(options: argparse.Namespace, config: AgentConfig) -> int:
    if options.rounds is not None and not 1 <= options.rounds <= 100:
        raise ValueError(f"rounds={options.rounds}: must lie in 1 … 100")
    if options.rounds is not None and not options.compare:
        raise ValueError("rounds: belongs to --compare; a single image is generated once")
    from .images import png

    request = _request(options)
    output = png.check_output(options.output)
    _check_loading(options)
    from .images import compare, progress
    from .images.generate import calls_text
    from .images.methods import METHODS

    pipe = _load(options)
    _say_what_is_poor(pipe, request, options.scheduler)
    if not options.compare:
        progress.Progress(pipe, request.steps).single(METHODS[options.method])
        result = compare.generate(pipe, request, options.method, config)
        output = _place(output, options.overwrite)
        png.save_image(result.image, output, result.settings)
        calls = calls_text(result.settings)
        print(f"{output}: {METHODS[options.method]}, {result.seconds:.2f} s{calls and f', {calls}'}")
        return 0
    shown = progress.ComparisonProgress(pipe, request.steps, tuple(METHODS), options.rounds)
    comparison = compare.compare_methods(pipe, request, config, tuple(METHODS), options.rounds, shown)
    shown.finish()
    output = _place(output, options.overwrite)
    comparison.save(output)
    print(comparison)
    print(output)
    return 0


def _say_what_is_poor(pipe: Any, request: Request, scheduler: str | None) -> None:
    """Settings that make a poor image by every method: said, not refused."""
    from .images.names import scheduler_name
    from .images.quality_notes import quality_notes
    from .patch import find_unet
    from .unet.layers import own_latent_size

    height, width = (side * pipe.vae_scale_factor for side in own_latent_size(find_unet(pipe)))
    for note in quality_notes(request, scheduler or scheduler_name(pipe.scheduler), (height, width)):
        print(f"agentsd: {note}", file=sys.stderr)


def _place(output: Path, overwrite: bool, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """Where to write: the path asked for, or the next free number where something is there that may not be replaced."""
    from .images import png

    place = output if overwrite else png.free_path(output, taken)
    if place != output:
        print(
            f"agentsd: {output} exists and is kept, so this is {place.name}; --overwrite replaces it", file=sys.stderr
        )
    return place


def info(options: argparse.Namespace, config: AgentConfig) -> int:
    import json
    import shutil

    from .images.request import check_size

    for name in ("height", "width"):
        check_size(name, getattr(options, name))
    _check_loading(options)
    from .describing import describe
    from .patch import apply_patch
    from .report import USUAL_WIDTH, as_text, every_layer

    pipe = _load(options)
    report = describe(apply_patch(pipe, config), options.height, options.width)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif options.layers:
        print(every_layer(report))
    else:
        print(as_text(report, min(USUAL_WIDTH, shutil.get_terminal_size((USUAL_WIDTH, 24)).columns)))
    return 0


def tune(options: argparse.Namespace, config: AgentConfig) -> int:
    import json

    from .files import write_atomically
    from .images.request import Request

    height, width = options.size or (None, None)
    Request("-", steps=options.steps, height=height, width=width)  # raises for what it would refuse later
    for name, value, most in (("batch_size", options.batch_size, 64), ("rounds", options.rounds, 100)):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name}={value}: must lie in 1 … {most}")
    _check_loading(options)
    if options.json is not None and not Path(options.json).resolve().parent.is_dir():
        raise FileNotFoundError(f"json={options.json!r}: the folder {Path(options.json).parent} does not exist")
    said: set[int] = set()

    def on_round(name: str, number: int) -> None:
        if number not in said:
            said.add(number)
            print(f"round {number} …" if number else "warm-up …", file=sys.stderr, flush=True)

    from .images.tune import tune

    pipe = _load(options)
    tuning = tune(
        pipe, height, width, steps=options.steps, batch_size=options.batch_size, rounds=options.rounds,
        on_round=on_round,
    )  # fmt: skip
    print(tuning)
    if options.json is not None:
        output = _place(Path(options.json), options.overwrite)
        write_atomically(output, json.dumps(tuning.to_dict(), indent=2) + "\n")
        print(f"\n{output}")
    if options.share:
        print(f"\n{tuning.share()}")
    return 0


def prompts(options: argparse.Namespace, config: AgentConfig) -> int:
    import shutil
    import textwrap

    from .images.demo_prompts import DEMO_NAMES

    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    about = f'The demo model knows {len(DEMO_NAMES)} things. A prompt for it: "a high quality photograph of a castle."'
    print(textwrap.fill(about, width))
    print()
    print(textwrap.fill(", ".join(DEMO_NAMES), width))
    return 0


_SHEETS = ("image", "merge_map", "agents")
"""What `agentsd visualize` writes: names of the files without .png."""


def visualize(options: argparse.Namespace, config: AgentConfig) -> int:
    if options.call < 0:
        raise ValueError(f"call={options.call}: must be 0 or more, the number of a UNet call")
    if not 1 <= options.agents <= 256:
        raise ValueError(f"agents={options.agents}: must lie in 1 … 256")
    from .images import png

    request = _request(options)
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output={options.output!r}: is a file; give a folder")
    _check_loading(options)
    folder = _place(folder, options.overwrite, lambda path: any((path / f"{name}.png").exists() for name in _SHEETS))
    made_by_us = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in _SHEETS:
            png.check_output(folder / f"{name}.png")
        from . import visualize
        from .images import progress
        from .images.generate import settings_of

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


def _check_loading(options: argparse.Namespace) -> None:
    """Refuse a model, scheduler, type or device that cannot be, before torch is imported. Raises as load_pipeline."""
    from .images.model_files import check_config, check_model
    from .images.names import check_device, check_dtype, check_scheduler

    for name, check in (("scheduler", check_scheduler), ("dtype", check_dtype), ("device", check_device)):
        if (value := getattr(options, name, None)) is not None:
            check(value)
    check_model(options.model)
    check_config(options.model_config, options.model)


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
    return load_pipeline(
        options.model, device=options.device, dtype=options.dtype, scheduler=scheduler, config=options.model_config
    )


def _no_bars() -> None:
    """Switch off the bars of downloads and of loading, hundreds of frames in a file or a pipe."""
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
