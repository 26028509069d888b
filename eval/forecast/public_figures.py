"""Times and ratios that others measured on GPUs, with their sources; by them the forecast is judged."""

from __future__ import annotations

from dataclasses import dataclass

from .gpus import FAST_HOST, SLOW_HOST, Host
from .networks import Shape
from .roofline import EAGER, FIRST_FLASH_ATTENTION, GRAPH, USUAL, Efficiencies

_DEEPCACHE = "https://huggingface.co/docs/diffusers/optimization/deepcache"
_FAL = "https://github.com/fal-ai/stable-diffusion-benchmarks"
_PAUL = "https://huggingface.co/datasets/sayakpaul/sample-datasets"
_STABLE_FAST = "https://github.com/chengzeyi/stable-fast"
_TOMESD_3060 = "https://github.com/Haoming02/sd-webui-tomesd"
_TOME_4090 = "https://github.com/SLAPaper/a1111-sd-webui-tome"
_SDNEXT = "https://vladmandic.github.io/sdnext-docs/Benchmark"
_ONEDIFF = "https://github.com/siliconflow/onediff/issues/426"

SD15, SD15_1024, SDXL = Shape("sd15", 512), Shape("sd15", 1024), Shape("sdxl", 1024)


@dataclass(frozen=True)
class PublicFigure:
    """One figure.

    Attributes:
        what: method and setting.
        shape: of the UNet's calls.
        gpu: a key of GPUS.
        measured: milliseconds of a UNet call (a run's time by its steps, so with what surrounds them), or a ratio over
            the unpatched model.
        source: where it is published.
        tomesd: ToMeSD's ratio.
        deepcache: DeepCache's interval.
        mode, host, efficiencies: what it was measured on, as far as the source says; else assumed.
        outside_ms: of a DeepCache run of 50 steps, what lies outside the UNet (text encoder, autoencoder), assumed.
        later: found after the model's constants were set, so that nothing of it can have gone into them.
    """

    what: str
    shape: Shape
    gpu: str
    measured: float
    source: str
    tomesd: float | None = None
    deepcache: int | None = None
    mode: str = EAGER
    host: Host = FAST_HOST
    efficiencies: Efficiencies = USUAL
    outside_ms: float = 0.0
    later: bool = False

    @property
    def is_ratio(self) -> bool:
        return self.tomesd is not None or self.deepcache is not None


TIMES = (
    PublicFigure("A1111, xFormers, 8.00 it/s", SD15, "RTX 3060", 125, _TOMESD_3060),
    PublicFigure("A1111, xFormers, 1.48 it/s", SD15_1024, "RTX 3060", 676, _TOMESD_3060),
    PublicFigure("eager, 22.5 it/s", SD15, "RTX 3090", 44.4, _STABLE_FAST),
    PublicFigure("eager, 19.3 it/s", SD15, "RTX 3080 Ti", 51.8, _STABLE_FAST),
    PublicFigure("eager, 29.5 it/s", SD15, "RTX 4080", 33.9, _STABLE_FAST),
    PublicFigure("AITemplate, 65.7 it/s", SD15, "RTX 4090", 15.2, _STABLE_FAST, mode=GRAPH),
    PublicFigure("SDP, batch 4, 73 it/s", Shape("sd15", 512, 4), "RTX 4090", 54.8, _SDNEXT),
    PublicFigure("eager, 4.01 it/s", SDXL, "RTX 3090", 249, _ONEDIFF),
    PublicFigure("max-autotune, bf16, 30 steps in 0.493 s", SD15, "A100", 16.4, _PAUL, mode=GRAPH),
    PublicFigure("eager SDPA on a server's CPU, 31.44 it/s", SD15, "A100", 31.8, _FAL, host=SLOW_HOST),
    PublicFigure("eager SDPA, bf16, 30 steps in 3.315 s", SDXL, "A100", 110, _PAUL),
    PublicFigure("eager, 7.79 it/s", SDXL, "A100", 128, _ONEDIFF),
    PublicFigure("max-autotune, bf16, 30 steps in 2.538 s", SDXL, "A100", 84.6, _PAUL, mode=GRAPH),
    PublicFigure("eager, 50 steps in 2.61 s", Shape("sd21", 512), "A5000", 52.2, _DEEPCACHE),
    PublicFigure("eager, 8 images, 50 steps in 15.96 s", Shape("sd21", 512, 8), "A5000", 319, _DEEPCACHE),
    PublicFigure("eager SDPA on a server's CPU, 8.43 it/s", SDXL, "A100", 119, _FAL, host=SLOW_HOST, later=True),
    PublicFigure("xFormers, 7.72 it/s", SD15_1024, "RTX 4090", 129.5, _TOME_4090, later=True),
    PublicFigure("xFormers, batch 4, 12.01 it/s", Shape("sd15", 512, 4), "RTX 4090", 83.3, _TOME_4090, later=True),
)
"""Of unpatched UNet calls. GPU.calibration was fitted to those that are not `later`."""


def _tomesd_4090(what: str, shape: Shape, measured: float) -> PublicFigure:
    return PublicFigure(
        f"ToMeSD 0.5, torch 2.0, xFormers, {what}", shape, "RTX 4090", measured, _TOME_4090, tomesd=0.5, later=True
    )


RATIOS = (
    *(
        PublicFigure(f"ToMeSD {ratio}, xFormers", shape, "RTX 3060", measured, _TOMESD_3060, tomesd=ratio)
        for shape, ratio, measured in (
            (SD15, 0.3, 8.33 / 8.00),
            (SD15, 0.5, 8.69 / 8.00),
            (SD15_1024, 0.3, 1.86 / 1.48),
            (SD15_1024, 0.5, 2.15 / 1.48),
        )
    ),
    PublicFigure(
        "ToMeSD 0.5, xFormers, 9.1 → 6.9 s", SD15_1024, "RTX 3090", 9.1 / 6.9, "https://github.com/dbolya/tomesd/issues/6",
        tomesd=0.5,
    ),
    PublicFigure("ToMeSD 0.5, batch 4", Shape("sd15", 512, 4), "RTX 4090", 77 / 73, _SDNEXT, tomesd=0.5),
    *(
        PublicFigure(
            f"ToMeSD {ratio}, card unnamed (A100 taken), attention of early 2023", SD15, "A100", measured,
            "https://github.com/dbolya/tomesd/issues/19", tomesd=ratio, efficiencies=FIRST_FLASH_ATTENTION,
        )
        for ratio, measured in ((0.1, 0.8705), (0.3, 0.9989), (0.4, 1.0646), (0.5, 1.0953))
    ),
    *(
        PublicFigure(
            f"DeepCache {interval}", shape, "A5000", measured, _DEEPCACHE, deepcache=interval, outside_ms=outside
        )
        for shape, interval, measured, outside in (
            (Shape("sd21", 512), 3, 2.33, 60),
            (Shape("sd21", 512), 5, 3.24, 60),
            (Shape("sd21", 512, 8), 3, 2.32, 420),
            (Shape("sd21", 512, 8), 5, 3.18, 420),
            (Shape("sd21", 1024), 3, 2.28, 250),
            (Shape("sd21", 1024), 5, 3.12, 250),
        )
    ),
    PublicFigure(
        "DeepCache 3, card unnamed (A5000 taken), 17.52 → 6.71 s", SDXL, "A5000", 17.52 / 6.71,
        "https://github.com/horseee/DeepCache", deepcache=3, outside_ms=300,
    ),
    _tomesd_4090("DPM++ 2M", SD15, 32.42 / 32.78),
    _tomesd_4090("batch 4", Shape("sd15", 512, 4), 12.03 / 12.01),
    _tomesd_4090("batch 8", Shape("sd15", 512, 8), 6.57 / 5.79),
    _tomesd_4090("SD 2.1", Shape("sd21", 768), 20.25 / 18.63),
    _tomesd_4090("1024 px", SD15_1024, 9.88 / 7.72),
)  # fmt: skip
"""Over the unpatched model. Nothing was fitted to them."""
