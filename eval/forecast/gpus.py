"""The GPUs and hosts of the forecast: data sheets, and what was fitted to public times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Attributes:
        name: as users call it.
        tensor_tflops: dense float16 products with float32 accumulation, by the data sheet.
        gigabytes_per_second: of its memory, by the data sheet.
        multiprocessors: by the data sheet.
        cache_megabytes: second-level cache, by the data sheet.
        cache_gigabytes_per_second: of that cache; no data sheet has it, public micro-benchmarks and estimates.
        float32_tflops: by the data sheet.
        source: the data sheet.
        calibration: factor on tensor_tflops, fitted to the public times of unpatched UNet calls (clocks, and what
            libraries reach of the peak); ratios are not fitted.
        calibrated: there was a public time to fit it to; else it is assumed.
    """

    name: str
    tensor_tflops: float
    gigabytes_per_second: float
    multiprocessors: int
    cache_megabytes: float
    cache_gigabytes_per_second: float
    float32_tflops: float
    source: str
    calibration: float
    calibrated: bool = True


_GA102 = "NVIDIA Ampere GA102 GPU Architecture, whitepaper"
_ADA = "NVIDIA Ada GPU Architecture, whitepaper"

GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("RTX 3060", 25.5, 360, 28, 3, 1000, 12.7, f"{_GA102}; NVIDIA's page of the RTX 3060 12 GB", 1.17),
        GPU("RTX 3080 Ti", 68, 912, 80, 6, 2000, 34.1, _GA102, 1.10),
        GPU("RTX 3090", 71, 936, 82, 6, 2000, 35.6, _GA102, 1.28),
        GPU("RTX 4080", 97.5, 717, 76, 64, 3000, 48.7, _ADA, 1.30),
        GPU("RTX 4090", 165, 1008, 128, 72, 4500, 82.6, _ADA, 1.80),
        GPU("A5000", 111, 768, 64, 6, 2000, 27.8, "NVIDIA RTX A5000, data sheet", 0.74),
        GPU("A100", 312, 1935, 108, 40, 4500, 19.5, "NVIDIA A100 80 GB PCIe, data sheet", 0.88),
        GPU("H100", 989, 3350, 132, 50, 7000, 67, "NVIDIA H100 SXM, data sheet", 0.90, calibrated=False),
    )
}
"""GPU by name."""

FORECAST = ("RTX 3060", "RTX 4090", "A100", "H100")
"""The GPUs of the forecast; the others are there because public figures were measured on them."""


@dataclass(frozen=True)
class Host:
    """How fast Python and the libraries issue work, in microseconds; fitted to public times of eager UNet calls.

    Attributes:
        name: in print.
        operator, view: for one that launches kernels, and one that launches none.
        module: for a call of an nn.Module.
        call: for a step of the pipeline around the UNet (scheduler, guidance).
        relative: its time for the patch's hooks, over the time of the machine that measures them.
    """

    name: str
    operator: float
    view: float
    module: float
    call: float
    relative: float


FAST_HOST = Host("fast host", 9.0, 1.6, 4.0, 600.0, 0.65)
SLOW_HOST = Host("slow host", 24.0, 4.0, 9.0, 600.0, 1.7)
HOSTS = (FAST_HOST, SLOW_HOST)
"""A desktop CPU of about 5 GHz; a server's vCPU, about 2.5 times slower."""
