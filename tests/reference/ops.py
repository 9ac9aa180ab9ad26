"""What torch is asked to do, counted: for claims about what runs twice and what a GPU would be waited for."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = frozenset((
    "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default",
    "aten.unique_consecutive.default", "aten._unique2.default", "aten.bincount.default",
))  # fmt: skip


class CountedOps(TorchDispatchMode):
    """names: of the operations in their order, as "aten.mm.default"; "wait" behind each one that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def times(self) -> Counter[str]:
        return Counter(self.names)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(op), kwargs or {}
        self.names.append(name)
        by_mask = "index" in name and any(_is_mask(index) for index in args[1]) if _indexes(args) else False
        by_size = name == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None
        if name in WAITS or by_mask or by_size:
            self.names.append("wait")
        return op(*args, **kwargs)


def _indexes(args: Any) -> bool:
    return len(args) > 1 and isinstance(args[1], (list, tuple))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool
