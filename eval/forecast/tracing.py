"""trace: every operator that a call runs, with its sizes and bytes, on the meta device, which computes nothing.

unet = UNet2DConditionModel(**config).to("meta")
call = trace(lambda: unet(sample, timestep, text), unet)
call.operators, call.waits
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..common.operations import launches_nothing


@dataclass(frozen=True)
class Operation:
    """One operator of a call.

    Attributes:
        name: of the operator in ATen, or "attention" for fused attention.
        kind: "matmul", "convolution", "attention", "sort", "gather", "norm", "reduction", "copy", "elementwise", or
            "wait": the host waits for the device, as it reads a value or uploads one without `non_blocking`.
        bytes_in, bytes_out: read and written at least.
        sizes: of a matmul or convolution (batch, m, n, k); of attention (batch, heads, queries, keys, head_dim); of a
            sort (segments, length, bytes of a key).
        float32: the arithmetic is in 32 bits.
    """

    name: str
    kind: str
    bytes_in: int
    bytes_out: int
    sizes: tuple[int, ...] = ()
    float32: bool = False


@dataclass
class CallTrace:
    """What one call ran.

    Attributes:
        operations: in their order, without views and allocations.
        views: number of operators that launch nothing, but cost the host time.
        modules: number of calls of nn.Modules.
    """

    operations: list[Operation] = field(default_factory=list)
    views: int = 0
    modules: int = 0

    @property
    def operators(self) -> int:
        """Number of operators that compute something, as `count_operations` counts them."""
        return sum(one.kind != "wait" for one in self.operations)

    @property
    def waits(self) -> int:
        """How often the host waits for the device."""
        return sum(one.kind == "wait" for one in self.operations)


def trace(call: Callable[[], Any], network: nn.Module, there: Tensor | None = None) -> CallTrace:
    """Record what `call` runs on the meta device.

    Fused attention counts as one operator. A value that the host reads from the device is recorded and taken to be 1.

    Args:
        call: runs `network`, whose weights and inputs are on the meta device.
        network: its modules' calls are counted.
        there: a tensor on the CPU that stands for one on the device, as a pipeline's timesteps: moving it is free.
    """
    found = CallTrace()
    with torch.no_grad(), _module_calls(network, found), _Recorder(found, there), _GPUFunctions(found):
        call()
    return found


@contextmanager
def _module_calls(network: nn.Module, found: CallTrace) -> Iterator[None]:
    def count(*_: Any) -> None:
        found.modules += 1

    handles = [module.register_forward_pre_hook(count) for module in network.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchDispatchMode):
    """Records the operators that reach the dispatcher."""

    def __init__(self, found: CallTrace, there: Tensor | None):
        super().__init__()
        self.found, self.there = found, there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        source = args[0] if args and isinstance(args[0], Tensor) else None
        read = source if source is not None and source.device.type == "meta" else None
        if read is not None and name == "_local_scalar_dense":
            self.found.operations.append(Operation(name, "wait", read.element_size(), 0))
            return True if read.dtype is torch.bool else 1.0 if read.is_floating_point() else 1
        if read is not None and name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.found.operations.append(Operation(name, "wait", _bytes(read), 0))
            return torch.ones(read.shape, dtype=kwargs.get("dtype") or read.dtype)
        output = func(*args, **kwargs)
        if name == "_to_copy" and source is not None and self._is_there(source):
            return output
        if _is_upload(name, args, output) and not (
            kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        ):
            self.found.operations.append(Operation(name, "wait", 0, 0))  # copied at once where the device may be busy
        if launches_nothing(func, output):
            self.found.views += 1
        elif any(one.device.type == "meta" for one in _tensors(output)):  # what is small and on the CPU is the host's
            self.found.operations.append(_operation(name, args, kwargs, output))
        return output

    def _is_there(self, source: Tensor) -> bool:
        if self.there is None or source.device.type != "cpu":
            return False
        return source.untyped_storage().data_ptr() == self.there.untyped_storage().data_ptr()


class _GPUFunctions(TorchFunctionMode):
    """Answers functions that a GPU has and the meta device has not."""

    def __init__(self, found: CallTrace):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.rms_norm:
            self.found.operations.append(_operation("_fused_rms_norm", args[:1], {}, args[0]))
            return torch.empty_like(args[0])
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.found.operations.append(Operation("tensor", "wait", 0, 0))  # made on the host and uploaded
        if func is torch.randint:  # with a generator of a device that has none
            return func(*args, **{key: value for key, value in kwargs.items() if key != "generator"})
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        batch, heads, queries, head_dim = query.shape
        size = query.element_size()
        read = (query.numel() + key.numel() + value.numel()) * size
        sizes = (batch, heads, queries, key.shape[-2], head_dim)
        written = batch * heads * queries * value.shape[-1] * size
        self.found.operations.append(Operation("attention", "attention", read, written, sizes))
        # The layout in which FlashAttention returns it: [batch, queries, heads, head_dim].
        shape = (batch, queries, heads, value.shape[-1])
        return torch.empty(shape, dtype=query.dtype, device=query.device).transpose(1, 2)


_GATHERS = (
    "index_select", "gather", "index", "embedding", "scatter", "scatter_add", "scatter_reduce", "index_add",
    "index_put", "_index_put_impl", "_embedding_bag", "_embedding_bag_forward_only", "index_copy", "index_fill",
)  # fmt: skip
_REDUCTIONS = (
    "max", "min", "amax", "amin", "argmax", "argmin", "sum", "mean", "linalg_vector_norm", "norm", "_softmax", "any",
    "all", "cumsum", "var_mean",
)  # fmt: skip
_COPIES = ("_to_copy", "copy", "clone", "cat", "stack", "repeat", "constant_pad_nd")


def _operation(name: str, args: tuple, kwargs: dict, output: Any) -> Operation:
    inputs, outputs = _tensors((args, kwargs)), _tensors(output)
    plain = name.rstrip("_") if not name.startswith("_") or name.endswith("_") else name
    read, written = sum(map(_bytes, inputs)), sum(map(_bytes, outputs))
    first = inputs[0] if inputs else outputs[0]
    kind = "elementwise"
    sizes: tuple[int, ...] = ()
    if (product := _product_sizes(plain, args, output)) is not None:
        kind, sizes = "convolution" if plain == "convolution" else "matmul", product
    elif "sort" in plain or plain == "topk":
        length = first.shape[-1] if first.ndim else 1
        kind = "sort"
        sizes = (first.numel() // max(1, length), length, first.element_size()) if plain != "searchsorted" else ()
    elif plain in _GATHERS:
        kind = "gather"
        if plain in ("index_select", "gather", "index", "embedding"):  # reads what it takes, not all there is
            read = written + _bytes(inputs[-1])
    elif plain in ("native_group_norm", "native_layer_norm", "_fused_rms_norm"):
        kind = "norm"
    elif plain in _REDUCTIONS:
        kind = "reduction"
    elif plain in _COPIES:
        kind = "copy"
        if plain == "copy":
            read = _bytes(inputs[1]) if len(inputs) > 1 else 0
    return Operation(name, kind, read, written, sizes, first.dtype is torch.float32)


def _is_upload(name: str, args: tuple, output: Any) -> bool:
    """Whether an operator copies a tensor of the host to the device."""
    if name not in ("_to_copy", "copy_") or not isinstance(output, Tensor) or output.device.type != "meta":
        return False
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, Tensor) and source.device.type == "cpu"


def _product_sizes(name: str, args: tuple, output: Any) -> tuple[int, int, int, int] | None:
    """(batch, m, n, k) of a matrix product, or of the one that a convolution is; None for other operators."""
    if name == "convolution":
        weight = args[1]
        batch, channels, *size = output.shape
        return 1, batch * math.prod(size), channels, weight.shape[1:].numel()
    if name not in ("mm", "addmm", "bmm", "baddbmm"):
        return None
    left, right = args[-2:] if name in ("mm", "bmm") else args[1:3]
    batch = left.shape[0] if left.ndim == 3 else 1
    return batch, left.shape[-2], right.shape[-1], left.shape[-1]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in memory; what `expand` repeats is there once."""
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)
    return count * tensor.element_size()
