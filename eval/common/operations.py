"""TensorWatch: how many tensor operations run, and how many bytes of tensors are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TensorWatch(TorchDispatchMode):
    """Watches the operations of a `with` block, without torch.compile.

    Attributes:
        operations: how many were run, which on a GPU is about how many kernels are launched; views, which launch
            nothing, are not counted.
        peak: bytes of the tensors made in the block, at the moment when most of them were alive. What an operation
            takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.peak = 0
        self._alive: dict[int, int] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not launches_nothing(func, output):
            self.operations += 1
        if not func.is_view:
            for tensor in _tensors(output):
                self._watch(tensor.untyped_storage())
        return output

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._bytes += self._alive[key]
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._bytes -= self._alive.pop(key)


def count_operations(call: Callable[[], Any]) -> int:
    """The number of operations on tensors that `call` runs without torch.compile; views, which launch nothing, not."""
    with TensorWatch() as watch:
        call()
    return watch.operations


def launches_nothing(operator: Any, output: Any) -> bool:
    """Whether an operator of ATen computes nothing: it returns a view of its input, or an empty tensor."""
    return operator.is_view or operator.overloadpacket in _ALLOCATIONS or not any(True for _ in _tensors(output))


_ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided}
_ALLOCATIONS |= {torch.ops.aten._unsafe_view, torch.ops.aten.detach}


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, (tuple, list)):
        for one in output:
            yield from _tensors(one)
    elif isinstance(output, torch.Tensor):
        yield output
