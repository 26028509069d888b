"""The `agentsd` command: its arguments, and one sentence on stderr for wrong input; other modules do the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from . import commands
from .config import PRESET_NOTES, PRESETS, SETTINGS, AgentConfig
from .fields import written
from .images.model_files import ModelError
from .images.names import DTYPES, SCHEDULERS
from .messages import did_you_mean, install_hint
from .trained import Trained, read_trained, start_from

_METHODS = ("sd", "tomesd", "agentsd")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 interrupted or failed, 2 wrong input."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.refuse(unknown)
    try:
        trained = _trained(options)
        config = _config(options, trained)
        _refuse_unused(options)
        if trained is not None and (said := trained.sentence(_given_fields(options))):
            print(f"agentsd: {said}", file=sys.stderr)
        return options.run(options, config)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was written", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        return _fail(str(error), 2)
    except ModelError as error:
        return _fail(str(error), 2)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            return _fail("out of memory: try a smaller --height and --width, or --dtype float16", 1)
        raise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one sentence, as for all other wrong input, without the usage."""
        self.exit(2, f"agentsd: {message}; `{self.prog} --help` lists the options\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """End with an error for arguments that no command takes, naming the option that was perhaps meant."""
        self.error(unrecognized(self, unknown))


class _PrintCompletion(argparse.Action):
    """Print a shell's completion script, made by shtab from the parser."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error(f"--print-completion needs shtab: {install_hint('completion')}")
        for one in (parser, *parser._subparsers._group_actions[0].choices.values()):  # type: ignore[union-attr]
            _name_values(one, shtab)
        print(shtab.complete(parser, values))
        parser.exit(0)


def _name_values(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Note at the options of a parser what can follow them; the values are checked elsewhere, with better errors."""
    files = {"output": shtab.FILE, "model": shtab.FILE, "model_config": shtab.DIRECTORY}
    words = {"scheduler": list(SCHEDULERS), "dtype": list(dict.fromkeys(DTYPES.values()))}
    words["device"] = ["cuda", "mps", "cpu"]
    words |= {f"patch_{name}": list(map(written, setting.choices)) for name, setting in SETTINGS.items()}
    for action in parser._actions:
        if action.dest in files:
            action.complete = files[action.dest]  # type: ignore[attr-defined]
        if words.get(action.dest):
            action.choices = words[action.dest]


def unrecognized(parser: argparse.ArgumentParser, unknown: list[str]) -> str:
    """Name arguments that a parser does not take, and the option that was perhaps meant."""
    meant = did_you_mean(unknown[0].split("=")[0], parser._option_string_actions)
    if not unknown[0].startswith("-") and any(action.dest == "prompt" for action in parser._actions):
        meant = " (put the prompt in quotes)"
    return f"unrecognized arguments: {' '.join(unknown)}{meant}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="agentsd",
        description="Faster Stable Diffusion without training, by token-merged agent attention.",
    )
    parser.add_argument("--version", action="version", version=f"agentsd {_version()}")
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=("bash", "zsh", "tcsh"),
        help="print the completion of this command for a shell; agentsd/README.md says where to put it",
    )  # fmt: skip
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = subparsers.add_parser(
        "generate", help="generate an image", description="Generate an image and save it as a PNG."
    )
    generate.set_defaults(run=commands.generate, parser=generate)
    generate.add_argument("prompt", help="what the image shows")
    generate.add_argument(
        "-o", "--output", required=True, metavar="FILE.png",
        help="where to save it; a file that is there is kept, and the new one gets a number: FILE-2.png",
    )  # fmt: skip
    generate.add_argument("--overwrite", action="store_true", help="replace a file that is there")
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

    info = subparsers.add_parser(
        "info", help="what would be patched, and what it saves", description="Patch a model and describe the patch."
    )
    info.set_defaults(run=commands.info, parser=info)
    form = info.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--layers", action="store_true", help="every layer by name, with the number that visualize takes")
    info.add_argument("--height", type=int, help="in pixels; default: the model's own")
    info.add_argument("--width", type=int, help="in pixels; default: the model's own")
    _add_model(info)
    _add_patch(info)

    visualize = subparsers.add_parser(
        "visualize",
        help="show what a layer merges and what its agents attend to",
        description="Generate an image, and maps of what one layer did in one of its UNet calls.",
    )
    visualize.set_defaults(run=commands.visualize, parser=visualize)
    visualize.add_argument("prompt", help="what the image shows")
    visualize.add_argument(
        "-o", "--output", required=True, metavar="DIR",
        help="folder for the images; made if missing. If there are such images in it, they are kept, and the new ones "
        "go to DIR-2",
    )  # fmt: skip
    visualize.add_argument("--overwrite", action="store_true", help="replace images that are there")
    visualize.add_argument("--layer", default="0", help="number or name of a patched layer (default: 0)")
    visualize.add_argument("--call", type=int, default=0, help="number of the UNet call, from 0 (default: 0)")
    visualize.add_argument("--agents", type=int, default=16, help="how many agents' maps to show (default: 16)")
    _add_request(visualize)
    _add_model(visualize)
    _add_patch(visualize)

    tune = subparsers.add_parser(
        "tune",
        help="time the presets on this machine, and say which pay",
        description="Time the UNet calls of the unpatched model and of every preset on this machine, in a minute or "
        "two on a GPU, and say which settings pay. Changes nothing.",
    )
    # A folder's agentsd.json has no say here: every preset is timed as it is.
    tune.set_defaults(run=commands.tune, parser=tune, preset="paper")
    tune.add_argument("--size", type=_size, metavar="N|HEIGHTxWIDTH", help="in pixels; default: the model's own")
    tune.add_argument("--steps", type=int, default=25, help="denoising steps of the run (default: %(default)s)")
    tune.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    tune.add_argument("--rounds", type=int, metavar="N", help="default: 5, or fewer, but 3, once a minute has passed")
    tune.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SCHEDULERS)}; default: the model's own")
    tune.add_argument(
        "--json", metavar="FILE", help="also write everything there as JSON; a file that is there is kept"
    )
    tune.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    tune.add_argument(
        "--share", action="store_true",
        help="also print a row of a Markdown table for others: device, versions and figures, nothing that names you",
    )  # fmt: skip
    _add_model(tune)

    prompts = subparsers.add_parser(
        "prompts",
        help="list what the built-in demo model knows",
        description="List what the built-in demo model knows.",
    )
    prompts.set_defaults(run=commands.prompts, parser=prompts)
    return parser


def _add_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the image")
    group.add_argument("--negative-prompt", default="", help="what it should not show")
    group.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    group.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="seed of the initial noise (default: %(default)s)")
    group.add_argument("--height", type=int, help="in pixels; default: the model's own")
    group.add_argument("--width", type=int, help="in pixels; default: the model's own")
    group.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SCHEDULERS)}; default: the model's own")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--model", default="demo",
        help="demo (built in), a folder, a .safetensors checkpoint, or a Hugging Face id (default: %(default)s); a "
        "folder's agentsd.json sets the defaults of the patch",
    )  # fmt: skip
    group.add_argument(
        "--model-config", metavar="DIR",
        help="of a checkpoint: folder (or Hugging Face id) with its tokenizer, scheduler and sizes; default: the "
        "folder of its name beside it, or else that of its kind from the hub",
    )  # fmt: skip
    group.add_argument("--device", help="cuda, mps or cpu; default: the first available of these")
    group.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")


def _size(text: str) -> tuple[int, int]:
    """(height, width) from "512" or "512x768"."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of pixels, or HEIGHTxWIDTH as in 512x768")
    return int(parts[0]), int(parts[-1])


def add_settings(group: Any, prefix: str, names: Iterable[str], defaults: Mapping[str, object] | None = None) -> None:
    """Add the option of each named field of AgentConfig to a parser or a group.

    Args:
        group: what gets the options.
        prefix: `prefix + field` is the attribute of the result, which is missing where the option is not given.
        names: fields of AgentConfig.
        defaults: what the help says is the default, where that is not the field's own.
    """
    for name in names:
        setting = SETTINGS[name]
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        help = setting.help
        if setting.kind != "flag":
            number = {"number": "X", "integer": "N", "cell": "N|ROWSxCOLUMNS"}.get(setting.kind)
            words = [*([number] if number else []), *map(written, setting.choices)]
            kind = {"type": setting.read, "metavar": "|".join(words)}
            default = (defaults or {}).get(name, written(getattr(AgentConfig, name)).lower())
            help += f" (default: {default})"
        group.add_argument(
            option_of(name), dest=f"{prefix}{name}", default=argparse.SUPPRESS, help=help.replace("%", "%%"), **kind
        )


def option_of(name: str) -> str:
    """The option of a field of AgentConfig."""
    return SETTINGS[name].option or "--" + name.replace("_", "-")


def _add_patch(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of AgentConfig; the preset decides the fields that are not given."""
    group = parser.add_argument_group("the patch (the fields of agentsd.AgentConfig)")
    notes = "; ".join(f"{name}: {note.help.removesuffix('.')}" for name, note in PRESET_NOTES.items())
    group.add_argument(
        "--preset", choices=list(PRESETS), help=f"settings to start from; single options win over it. {notes}"
    )
    add_settings(group, "patch_", (name for name, setting in SETTINGS.items() if not setting.advanced))
    advanced = parser.add_argument_group("the patch: settings that most users leave alone")
    add_settings(advanced, "patch_", (name for name, setting in SETTINGS.items() if setting.advanced))


def _config(options: argparse.Namespace, trained: Trained | None = None) -> AgentConfig:
    return start_from(trained, preset=getattr(options, "preset", None), **_given_fields(options))


def _trained(options: argparse.Namespace) -> Trained | None:
    """The settings that the model was trained for; None where the options take none from it."""
    model, method = getattr(options, "model", "demo"), getattr(options, "method", "agentsd")
    compares = getattr(options, "compare", False)
    if model == "demo" or getattr(options, "preset", None) or (method != "agentsd" and not compares):
        return None
    return read_trained(model) if model.strip() and os.path.isdir(model) else None


def _given_fields(options: argparse.Namespace) -> dict[str, Any]:
    return {name.removeprefix("patch_"): value for name, value in vars(options).items() if name.startswith("patch_")}


def _refuse_unused(options: argparse.Namespace) -> None:
    """Raise ValueError for settings of the patch that the chosen method would ignore."""
    if getattr(options, "compare", True) or options.method == "agentsd":
        return
    used = ("ratio", "use_rand", "seed") if options.method == "tomesd" else ()
    unused = [name for name in _given_fields(options) if name not in used]
    unused += ["preset"] if getattr(options, "preset", None) and not used else []
    if unused:
        raise ValueError(f"{', '.join(unused)}: no setting of --method {options.method}; leave it out or use agentsd")


def _version() -> str:
    from . import __version__

    return __version__


def _fail(message: str, code: int) -> int:
    print(f"agentsd: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
