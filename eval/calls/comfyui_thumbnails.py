"""Write the pictures that ComfyUI shows of the example workflows: `python -m eval.calls.comfyui_thumbnails FOLDER`.

`.ci/comfyui FOLDER` prepares the folder. Each workflow's node and sampler run on the demo network in ComfyUI, without
and with AgentSD; no SDXL, ControlNet or checkpoint is needed, and the caption says how many model calls were whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from eval.calls import comfyui_models as models
from eval.launch import REPOSITORY

WORKFLOWS = REPOSITORY / "apps" / "comfyui" / "example_workflows"
NAMES = {"text_to_image": "castle", "sdxl": "zebra", "controlnet": "lobster", "image_to_image": "tiger"}
"""What the network draws for each; knows only names such as these."""
BEGINS_WITH = "zebra"
"""What the workflow with an image begins with."""
PANEL, CAPTION, QUALITY = 300, 30, 85


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="comfyui_thumbnails", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what .ci/comfyui prepared")
    options = argparse.Namespace(**vars(parser.parse_args(arguments)), device="cpu", threads=2)
    import torch

    import agentsd

    pipe = agentsd.load_pipeline("demo")
    texts = {}
    with torch.no_grad():
        for name in {*NAMES.values(), BEGINS_WITH}:
            texts[name] = tuple(pipe.encode_prompt(f"a high quality photograph of a {name}.", "cpu", 1, True)[:2])
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "demo.pt"
        torch.save({"weights": pipe.unet.state_dict(), "texts": texts}, file)
        if code := models.run_in_comfyui("eval.calls.comfyui_thumbnails", options, file=str(file)):
            return code
        found = torch.load(file)
    for workflow, panels in found.items():
        with torch.no_grad():
            images = [pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0] for _, latents in panels]
        _write(WORKFLOWS / f"{workflow}.jpg", images, [caption for caption, _ in panels])
    return 0


def _write(path: Path, images: list[Any], captions: list[str]) -> None:
    from PIL import Image, ImageDraw, ImageFont

    width = PANEL * len(images)
    sheet = Image.new("RGB", (width, PANEL + CAPTION), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for number, (image, caption) in enumerate(zip(images, captions)):
        pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.LANCZOS), (number * PANEL, 0))
        draw.text((number * PANEL + PANEL // 2, PANEL + CAPTION // 2), caption, "black", font, anchor="mm")
    sheet.save(path, quality=QUALITY, optimize=True)


def _sample_all(options: argparse.Namespace) -> None:
    """Sample each workflow in ComfyUI's environment, into options.file."""
    device = models.start(options)
    import comfy.sample
    import torch

    given = torch.load(options.file)
    model = models.demo_model(given["weights"], device)
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    found = {}
    with torch.inference_mode():
        for workflow, name in NAMES.items():
            graph = json.loads((WORKFLOWS / f"{workflow}.json").read_text("utf-8"))
            values = {node["type"]: node.get("widgets_values") for node in graph["nodes"]}
            _, _, steps, guidance, sampler, scheduler, denoise = values["KSampler"]

            def sample(patcher, name, latents, denoise):
                text = given["texts"][name]
                arguments = [noise, steps, guidance, sampler, scheduler, [[text[0], {}]], [[text[1], {}]], latents]  # noqa: B023
                return comfy.sample.sample(patcher, *arguments, seed=0, denoise=denoise, disable_pbar=True)

            begin, panels = torch.zeros_like(noise), []
            if denoise < 1:
                begin = sample(model, BEGINS_WITH, begin, 1.0)
                panels.append(("begins with", begin))
            plain = sample(model, name, begin, denoise)
            panels.append((f"without: {steps} of {steps} calls whole", plain))
            nodes = models.node_functions()
            inputs = sys.modules["agentsd_nodes.schema"].PATCH.inputs[1:]
            patcher = nodes.patch(model, **dict(zip([one.name for one in inputs], values["AgentSD"])))
            patched = sample(patcher, name, begin, denoise)
            run = patcher.get_wrappers("apply_model", "agentsd")[-1].run
            panels.append((f"AgentSD: {run.whole} of {steps} calls whole", patched))
            found[workflow] = [(caption, latents.float()) for caption, latents in panels]
    torch.save(found, options.file)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        _sample_all(argparse.Namespace(**json.loads(sys.argv[1])))
    else:
        sys.exit(main())
