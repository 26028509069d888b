"""The Python script that generates what the form says."""

from __future__ import annotations

import dataclasses
import json

from agentsd import AgentConfig

from .settings import Settings, preset_of, trained_config


def script(settings: Settings, scheduler: str | None = None) -> str:
    """Write a Python script that generates what the settings say, with the patch; defaults are left out.

    Args:
        settings: checked.
        scheduler: what to put in the place of the model's own scheduler (`scheduler_to_set`); None keeps it.
    """
    request, config = settings.request, settings.config
    loading = [json.dumps(settings.model, ensure_ascii=False)]
    if scheduler is not None:
        loading.append(f'scheduler="{scheduler}"')
    preset = preset_of(config)
    start = trained_config(settings.model) or AgentConfig()  # what apply_patch takes where nothing is named
    if preset and config != start:
        patch = [f'preset="{preset}"']
    else:
        fields = [field.name for field in dataclasses.fields(config)]
        changed = [name for name in fields if getattr(config, name) != getattr(start, name)]
        patch = [f"{name}={getattr(config, name)!r}" for name in dict.fromkeys(["ratio", *changed])]
    call = [json.dumps(request.prompt, ensure_ascii=False)]
    if request.negative_prompt:
        call.append(f"negative_prompt={json.dumps(request.negative_prompt, ensure_ascii=False)}")
    call.append(f"num_inference_steps={request.steps}")
    call.append(f"guidance_scale={request.guidance:g}")
    call += [f"{name}={getattr(request, name)}" for name in ("height", "width") if getattr(request, name)]
    call.append(f'generator=torch.Generator("cpu").manual_seed({request.seed})')
    arguments = "".join(f"    {argument},\n" for argument in call)
    return (
        "import agentsd\nimport torch\n\n"
        f"pipe = agentsd.load_pipeline({', '.join(loading)})  # or any diffusers pipeline of yours\n"
        f"agentsd.apply_patch(pipe, {', '.join(patch)})\n"
        f"image = pipe(\n{arguments}).images[0]\n"
        'image.save("image.png")\n'
    )
