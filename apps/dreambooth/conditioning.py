"""Text as the UNet reads it: prompts checked for their length, token ids and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .settings import DreamBoothSettings, UsageError, option


def check_prompts(pipe: DiffusionPipeline, settings: DreamBoothSettings) -> None:
    """Make sure that the text encoders read every prompt to its end. Raises UsageError."""
    for field in ("instance_prompt", "class_prompt", "validation_prompt"):
        prompt = getattr(settings, field)
        for name in ("tokenizer", "tokenizer_2"):
            tokenizer = getattr(pipe, name, None)
            if prompt is None or tokenizer is None:
                continue
            count, most = len(tokenizer(prompt, truncation=False).input_ids), longest(pipe, name)
            if count > most:
                raise UsageError(
                    f"{option(field)}: has {count} tokens with the marks of beginning and end, and the text encoder "
                    f"reads {most}; shorten it"
                )


def longest(pipe: DiffusionPipeline, tokenizer: str = "tokenizer") -> int:
    """The most tokens that a text encoder of the pipeline reads."""
    encoder = getattr(pipe, tokenizer.replace("tokenizer", "text_encoder"))
    return min(getattr(pipe, tokenizer).model_max_length, encoder.config.max_position_embeddings)


def token_ids(pipe: DiffusionPipeline, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Token ids [P, T], and the attention mask for the encoders that want one, as the pipeline makes them."""
    found = pipe.tokenizer(
        list(prompts), padding="max_length", max_length=longest(pipe), truncation=True, return_tensors="pt"
    )
    wants_mask = getattr(pipe.text_encoder.config, "use_attention_mask", False)
    return found.input_ids, found.attention_mask if wants_mask else None


def encode_ids(text_encoder: nn.Module, ids: tuple[Tensor, Tensor | None], device: torch.device) -> Tensor:
    """Embeddings [P, T, C] of token ids, with gradients where the encoder has them; equal to the pipeline's own."""
    tokens, mask = ids
    return text_encoder(tokens.to(device), attention_mask=None if mask is None else mask.to(device))[0]


def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """What SD or SDXL is told of prompts, without gradients.

    Returns:
        "text" [P, T, C], and for SDXL "pooled" [P, D].
    """
    with torch.no_grad():
        if getattr(pipe, "tokenizer_2", None) is None:
            return {"text": encode_ids(pipe.text_encoder, token_ids(pipe, prompts), device).float()}
        text, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return {"text": text.float(), "pooled": pooled.float()}
