"""The tables of the vision benchmark as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.common.tables import markdown

from .paper import AGENT, BASELINE_TOP1
from .speed import exponent


def as_markdown(title: str, lines: Sequence[str], results: dict[str, Any]) -> str:
    """The whole report.

    Args:
        lines: paragraphs under the title.
        results: rows by stage, as results.json holds them.
    """
    parts = [f"# {title}", *lines]
    for stage, write in (
        ("counts", _counts),
        ("throughput", _throughput),
        ("growth", _growth),
        ("imagenet", _imagenet),
    ):
        if results.get(stage):
            parts.append(write(results[stage]))
    return "\n\n".join(parts) + "\n"


def _counts(rows: Sequence[dict[str, Any]]) -> str:
    table = markdown(
        ["model", "pixels", "parameters", "paper, M", "GMACs", "paper", "paper's top-1"],
        [
            [
                row["model"],
                str(row["size"]),
                f"{row['parameters']:,}",
                f"{row['paper_parameters_m']:g}",
                f"{row['gmacs']:.2f}",
                f"{row['paper_gmacs']:g}",
                f"{row['paper_top1']:g}",
            ]
            for row in rows
        ],
        "lr",
    )
    return (
        f"## Parameters and multiply-adds\n\n{table}\n\nGMACs: billions of multiply-adds in matrix products and "
        "convolutions, as PyTorch counts them; norms, pooling and the resizing of biases, which the paper's counter "
        "adds, are less than 1 %. Top-1 is the paper's; it is not measured here."
    )


def _throughput(rows: Sequence[dict[str, Any]]) -> str:
    table = markdown(
        ["baseline", "agent model", "pixels", "baseline ms", "agent ms", "speed-up", "quartiles", "top-1, papers"],
        [
            [
                row["baseline"],
                row["agent"],
                str(row["size"]),
                f"{row['baseline_ms']:.1f}",
                f"{row['agent_ms']:.1f}",
                *_speedup(row),
                f"{BASELINE_TOP1[row['baseline']]:g} → {AGENT[row['agent']].top1:g}",
            ]
            for row in sorted(rows, key=lambda row: row["why"], reverse=True)
        ],
        "llr",
    )
    return (
        f"## Speed against the baselines\n\n{table}\n\nMilliseconds an image, medians over the rounds; the two models "
        "of a row are timed in turn, and the speed-up is the median of the rounds' own ratios. Unstable: the quartiles "
        "of the ratio differ by more than 15 %. The models have random weights. Top-1 figures are the papers', at 224 "
        "pixels. pvt_v1 models are this repository's body of PVT with its reduced attention, as timm has no first PVT."
    )


def _growth(rows: Sequence[dict[str, Any]]) -> str:
    table = markdown(
        ["pixels", "tokens", "DeiT-T ms", "Agent-DeiT-T ms", "speed-up", "quartiles", "DeiT-T GMACs", "Agent GMACs"],
        [
            [
                str(row["size"]),
                f"{row['tokens']:,}",
                f"{row['baseline_ms']:.1f}",
                f"{row['agent_ms']:.1f}",
                *_speedup(row),
                f"{row['baseline_gmacs']:.2f}",
                f"{row['agent_gmacs']:.2f}",
            ]
            for row in rows
        ],
        "r",
    )
    text = f"## Growth with resolution\n\n{table}"
    if len(rows) > 1:
        powers = {key: exponent(rows, key) for key in ("baseline_ms", "agent_ms", "baseline_gmacs", "agent_gmacs")}
        text += (
            "\n\nFrom the first to the last row time grows with the number of tokens N as "
            f"N^{powers['baseline_ms']:.2f} for DeiT-T and N^{powers['agent_ms']:.2f} for Agent-DeiT-T, multiply-adds "
            f"as N^{powers['baseline_gmacs']:.2f} and N^{powers['agent_gmacs']:.2f}."
        )
    return text


def _speedup(row: dict[str, Any]) -> tuple[str, str]:
    """The cells of the speed-up and its quartiles."""
    if row["speedup"] is None:
        return "one round", ""
    unstable = " (unstable)" if row["unstable"] else ""
    return f"{row['speedup']:.2f}×{unstable}", "{:.2f}–{:.2f}".format(*row["speedup_quartiles"])


def _imagenet(row: dict[str, Any]) -> str:
    table = markdown(
        ["model", "images", "top-1", "top-5", "paper's top-1"],
        [
            [
                row["model"],
                f"{row['images']:,}",
                f"{row['top1']:.2f}",
                f"{row['top5']:.2f}",
                f"{AGENT[row['model']].top1:g}",
            ]
        ],
        "lr",
    )
    return f"## ImageNet\n\n{table}\n\nCheckpoint {row['checkpoint_sha256'][:12]}, {row['dtype']}."
