"""call_seconds: the time of a traced UNet call on a GPU, by a roofline model.

An operator takes the longer of its arithmetic and its memory traffic, and never less than a small kernel does:

- products, convolutions (as products) and attention run in tiles on the multiprocessors; the last wave may leave some
  of them idle, long products are split along k where tiles are few;
- everything else moves bytes, through the second-level cache where they fit into half of it;
- sorts take several kernels, by the length of what is sorted.

The host issues operators meanwhile, so that a call takes the longer of the two. With CUDA graphs it issues nothing, and
chains of elementwise operators count as fused, as Inductor does it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .gpus import GPU, Host
from .tracing import CallTrace, Operation

EAGER, GRAPH = "eager", "CUDA graph"
MODES = (EAGER, GRAPH)


@dataclass(frozen=True)
class Efficiencies:
    """What libraries reach of a GPU's peaks. One set for all GPUs.

    Attributes:
        matmul, convolution, attention: of the tensor cores' peak, in full waves of full tiles.
        bandwidth: of the memory's, for kernels that go through it in order.
        rows, elements: of the memory's, for gathers of whole rows, and of single elements.
        most_tflops, most_attention_tflops: what eager libraries reach at most, on the largest GPUs.
        kernel_us: of the smallest kernel.
        attention_us: what attention takes beside its tiles.
    """

    matmul: float = 0.72
    convolution: float = 0.60
    attention: float = 0.60
    bandwidth: float = 0.80
    rows: float = 0.35
    elements: float = 0.20
    most_tflops: float = 420.0
    most_attention_tflops: float = 390.0
    kernel_us: float = 2.2
    attention_us: float = 3.0


USUAL = Efficiencies()
FIRST_FLASH_ATTENTION = dataclasses.replace(USUAL, attention=0.30)
"""Libraries of early 2023, by whose attention some public ratios were measured."""

_TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.85), (64, 64, 0.7))  # rows, columns, efficiency
_ATTENTION_TILE = 128
_HEAD_DIMS = (32, 64, 96, 128, 160, 192, 256)  # FlashAttention pads to these
_GRAPH_CALL_US = 100.0  # what stays of a call's launch and of Python with a CUDA graph
_EAGER_CALL_US = 150.0  # between the end of a call on the GPU and the beginning of the next one
_WAIT_US = 8.0


@dataclass(frozen=True)
class CallTime:
    """A call's seconds, and what they are made of: `gpu` and `host` run side by side, `hooks` may wait for both."""

    gpu: float
    host: float
    hooks: float
    total: float


def call_seconds(
    call: CallTrace,
    gpu: GPU,
    host: Host,
    mode: str = EAGER,
    hooks: float = 0.0,
    efficiencies: Efficiencies = USUAL,
) -> CallTime:
    """The time of a UNet call with the step around it.

    Args:
        call: from `trace`.
        gpu, host: where it runs.
        mode: EAGER, or GRAPH: compiled, launched as one.
        hooks: seconds that the patch's hooks take on the machine that measured them.
        efficiencies: of the libraries.
    """
    on_gpu = 1e-6 * _gpu_us(call, gpu, mode, efficiencies)
    hooks *= host.relative
    issued = host.call + (_GRAPH_CALL_US if mode == GRAPH else _issue_us(call, host))
    waits = call.waits > 0  # then the GPU is idle while the hooks work
    side_by_side = max(on_gpu, 1e-6 * issued + (0 if waits else hooks))
    between = 1e-6 * (_EAGER_CALL_US if mode == EAGER else _GRAPH_CALL_US)
    return CallTime(on_gpu, 1e-6 * issued, hooks, side_by_side + between + (hooks if waits else 0))


def _issue_us(call: CallTrace, host: Host) -> float:
    return call.operators * host.operator + call.views * host.view + call.modules * host.module


def _gpu_us(call: CallTrace, gpu: GPU, mode: str, efficiencies: Efficiencies) -> float:
    total, after_fusable = 0.0, False
    for operation in call.operations:
        if mode == EAGER:
            total += _operation_us(operation, gpu, efficiencies)
            continue
        fuses = operation.kind in ("elementwise", "copy", "norm", "reduction")
        if operation.kind == "convolution":
            total += _product_us(operation, gpu, efficiencies)
        elif operation.kind in ("norm", "reduction"):  # one pass, with what leads to it
            bytes_moved = operation.bytes_in + operation.bytes_out
            total += _bytes_us(bytes_moved, gpu, efficiencies.bandwidth) + efficiencies.kernel_us
        elif fuses and after_fusable:  # no kernel of its own, perhaps one more tensor to read
            total += 0.25 * max(0.0, _operation_us(operation, gpu, efficiencies) - efficiencies.kernel_us)
        else:
            total += _operation_us(operation, gpu, efficiencies)
        after_fusable = fuses
    return total


def _operation_us(operation: Operation, gpu: GPU, efficiencies: Efficiencies) -> float:
    """Microseconds of one operator, run by itself."""
    kernel = efficiencies.kernel_us
    moved = operation.bytes_in + operation.bytes_out
    stream = efficiencies.bandwidth
    if operation.kind == "wait":
        return _WAIT_US
    if operation.kind == "attention":
        return _attention_us(operation, gpu, efficiencies)
    if operation.kind == "matmul":
        return _product_us(operation, gpu, efficiencies)
    if operation.kind == "convolution":
        # cuDNN wants channels last: input and output change their layout, and the bias is added in a pass of its own.
        layout = _bytes_us(2 * 0.9 * operation.bytes_in, gpu, stream) / 2
        layout += _bytes_us(2 * operation.bytes_out, gpu, stream) / 2 + 2 * kernel
        bias = _bytes_us(2 * operation.bytes_out, gpu, stream)
        return _product_us(operation, gpu, efficiencies) + layout + bias
    if operation.kind == "sort":
        return _sort_us(operation)
    if operation.kind == "gather":
        whole_rows = operation.name in ("index_select", "index", "embedding") or "embedding_bag" in operation.name
        # A mean by scattering is sums, counts and a division.
        passes = 3 if "scatter_reduce" in operation.name else 1
        share = efficiencies.rows if whole_rows else efficiencies.elements
        return _bytes_us(passes * moved, gpu, share) + passes * kernel
    if operation.kind == "norm":
        passes = 3 if "group_norm" in operation.name else 1  # moments, coefficients, the normalised values
        extra = operation.bytes_out if passes == 3 else 0
        return _bytes_us(moved + extra, gpu, stream) + passes * kernel
    if operation.kind == "reduction":
        return _bytes_us(moved, gpu, 0.7 * stream) + kernel
    return _bytes_us(moved, gpu, stream) + kernel


def _bytes_us(moved: float, gpu: GPU, efficiency: float) -> float:
    speed = gpu.gigabytes_per_second * efficiency
    if moved < 0.5 * gpu.cache_megabytes * 1e6:
        speed = max(speed, 0.75 * gpu.cache_gigabytes_per_second * efficiency)
    return moved / (speed * 1e3)


def _waves(tiles: int, gpu: GPU) -> float:
    """Turns in which the multiprocessors work through some tiles; where they are many, a part of the last one."""
    turns = tiles / gpu.multiprocessors
    return math.ceil(turns) if turns < 6 else turns


def _product_us(operation: Operation, gpu: GPU, efficiencies: Efficiencies) -> float:
    """Microseconds of a matrix product by the best of the usual tiles and splits."""
    batch, m, n, k = operation.sizes
    efficiency = efficiencies.convolution if operation.kind == "convolution" else efficiencies.matmul
    peak = gpu.float32_tflops if operation.float32 else gpu.tensor_tflops * gpu.calibration
    per_multiprocessor = min(peak, efficiencies.most_tflops) * 1e6 / gpu.multiprocessors  # operations a microsecond
    best = math.inf
    for rows, columns, of_tile in _TILES:
        for splits in (1, 2, 4, 8):
            if splits > 1 and k // splits < 256:
                break
            tiles = batch * math.ceil(m / rows) * math.ceil(n / columns) * splits
            depth = math.ceil(k / splits / 32) * 32
            time = _waves(tiles, gpu) * 2 * rows * columns * depth / (per_multiprocessor * efficiency * of_tile)
            if splits > 1:  # the partial sums, in float32
                time += 2 * batch * m * n * 4 * splits / (gpu.cache_gigabytes_per_second * 1e3)
            best = min(best, time)
    moved = _bytes_us(operation.bytes_in + operation.bytes_out, gpu, efficiencies.bandwidth)
    return max(best, moved) + efficiencies.kernel_us


def _attention_us(operation: Operation, gpu: GPU, efficiencies: Efficiencies) -> float:
    """Microseconds of FlashAttention: a tile of queries walks along all keys, which are split where tiles are few."""
    batch, heads, queries, keys, head_dim = operation.sizes
    padded = next((size for size in _HEAD_DIMS if size >= head_dim), head_dim)
    tiles = batch * heads * math.ceil(queries / _ATTENTION_TILE)
    splits = 1
    if tiles < 0.8 * gpu.multiprocessors and keys >= 512:
        splits = min(8, gpu.multiprocessors // tiles, keys // _ATTENTION_TILE) or 1
    peak = min(gpu.tensor_tflops * gpu.calibration * efficiencies.attention, efficiencies.most_attention_tflops)
    per_multiprocessor = peak * 1e6 / gpu.multiprocessors
    key_tiles = math.ceil(keys / splits / _ATTENTION_TILE)
    tile = 4 * _ATTENTION_TILE * _ATTENTION_TILE * key_tiles * padded / per_multiprocessor
    moved = _bytes_us(operation.bytes_in + operation.bytes_out, gpu, efficiencies.bandwidth)
    time = max(_waves(tiles * splits, gpu) * tile, moved)
    return time + efficiencies.attention_us + (2.0 if splits > 1 else 0.0)


def _sort_us(operation: Operation) -> float:
    """Microseconds of a sort: in shared memory where it is short, else a radix sort with a pass for each byte."""
    if not operation.sizes:  # searching in what is sorted
        return 5.0
    segments, length, key_bytes = operation.sizes
    if length <= 1024:
        return 12.0
    if length <= 4096:
        return 25.0
    passes = key_bytes + 3 + (0 if segments == 1 else 6)
    return 3.5 * passes
