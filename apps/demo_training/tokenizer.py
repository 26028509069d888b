"""A CLIP tokenizer in which every word of the captions is one token."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from .run import Run

EXTRA_WORDS = ("a", "an", "emoji", "high", "of", "photo", "photograph", "picture", "quality", "the")
"""Words of the tokenizer beside the names."""


def split_word(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The BPE pieces of a word under merges ranked by priority; the last piece ends in "</w>"."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        pair = min(itertools.pairwise(pieces), key=lambda candidate: ranks.get(candidate, len(ranks)))
        if pair not in ranks:
            break
        merged, at = [], 0
        while at < len(pieces):
            step = 2 if tuple(pieces[at : at + 2]) == pair else 1
            merged.append("".join(pieces[at : at + step]))
            at += step
        pieces = merged
    return pieces


def build_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP vocabulary and its merges with every word of `words` as one token and single bytes for everything else."""
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(set(words)):
        # A later merge has a lower priority than all earlier ones, so the words already done stay whole.
        while len(pieces := split_word(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(code) for code in printable] + [chr(256 + code) for code in range(256 - len(printable))]
    tokens = characters + [character + "</w>" for character in characters] + ["".join(pair) for pair in ranks]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, list(ranks)


def build_tokenizer(run: Run, names: Iterable[str], folder: Path):
    """A CLIPTokenizer that knows every word of `names`; its vocab.json and merges.txt are written to `folder`.

    A model that grows from another keeps that one's tokenizer, which spells unknown words in bytes.
    """
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if run.grow_from:
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(run.grow_from / "tokenizer" / name, folder / name)
    else:
        vocabulary, merges = build_vocabulary([*EXTRA_WORDS, *(word for name in names for word in words_of(name))])
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    # The length is stated or the tokenizer would pad to no length at all.
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def words_of(name: str) -> list[str]:
    """The words of a caption as CLIP's tokenizer separates them: runs of letters."""
    return re.findall(r"[a-z]+", name.lower())


def tokenise(tokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers [captions, 77], int64."""
    return tokenizer(
        list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
