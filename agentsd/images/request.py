"""Request: what image to generate, checked when made; and the part of its prompt that a model does not read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """What to generate, checked when made.

    Attributes:
        prompt: what the image shows.
        negative_prompt: what it should not show.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 and below switch it off.
        seed: seed of the initial noise.
        height, width: image size in pixels, multiples of 8; None takes the model's own.

    Raises:
        TypeError, ValueError: the message names field, value and what is allowed.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt={self.prompt!r}: must be a text that is not empty")
        if not isinstance(self.negative_prompt, str):
            raise TypeError(f"negative_prompt={self.negative_prompt!r}: must be a text")
        _check_integer(
            "steps", self.steps, 1, 999
        )  # at 1,000, SD's steps_offset of 1 points PLMS past its last timestep
        _check_integer("seed", self.seed, 0, 2**63 - 1)
        if isinstance(self.guidance, bool) or not isinstance(self.guidance, (int, float)):
            raise TypeError(f"guidance={self.guidance!r}: must be a number in 0 … 100")
        if not math.isfinite(self.guidance) or not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance={self.guidance}: must be a number in 0 … 100")
        for name in ("height", "width"):
            check_size(name, getattr(self, name))


def check_size(name: str, value: int | None) -> None:
    """Check a height or width in pixels; None is the model's own. Raises TypeError or ValueError as Request."""
    if value is not None:
        _check_integer(name, value, 8, 8192)
        if value % 8:
            raise ValueError(f"{name}={value}: must be a multiple of 8 (one latent pixel is 8 × 8 pixels)")


def unread_part(pipe: Any, prompt: str) -> str:
    """The end of a prompt that the pipeline's text encoder does not read, "" where it reads all of it.

    CLIP reads 77 tokens, two of which mark beginning and end; diffusers cuts the rest off.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return ""
    limit = tokenizer.model_max_length
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    return tokenizer.decode(tokens[limit - 1 : -1]).strip() if len(tokens) > limit else ""


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be an integer in {low} … {high}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: must be an integer in {low} … {high}")
