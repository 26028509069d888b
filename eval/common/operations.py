"""count_operations: how many tensor operations a call runs, which on a GPU is about how many kernels it launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def count_operations(call: Callable[[], Any]) -> int:
    """The number of operations on tensors that `call` runs without torch.compile; views, which launch nothing, not."""
    with _Counter() as counter:
        call()
    return counter.count


class _Counter(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.count += not launches_nothing(func, output)
        return output


def launches_nothing(operator: Any, output: Any) -> bool:
    """Whether an operator of ATen computes nothing: it returns a view of its input, or an empty tensor."""
    return operator.is_view or operator.overloadpacket in _ALLOCATIONS or not _has_tensor(output)


_ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided}
_ALLOCATIONS |= {torch.ops.aten._unsafe_view, torch.ops.aten.detach}


def _has_tensor(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return any(_has_tensor(one) for one in output)
    return isinstance(output, torch.Tensor)
