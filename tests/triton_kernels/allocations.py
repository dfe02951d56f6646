"""Fails where host code makes a tensor of its own instead of using the memory that it was given."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _interpreting() -> bool:
    """Does Triton's interpreter call (which converts between dtypes by torch, in place of a GPU's instructions)?"""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "triton.runtime.interpreter":
            return True
        frame = frame.f_back
    return False


class NoAllocation(TorchDispatchMode):
    """Within it every result of a torch operation lies in the memory of one of its arguments. Tensors without data
    (meta: they say how large a workspace has to be) are free."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        memory = {x.untyped_storage().data_ptr() for x in given}
        for x in tree_leaves(result):
            if not isinstance(x, Tensor) or x.is_meta or not x.numel() or any(x is y for y in given):
                continue
            if x.untyped_storage().data_ptr() not in memory and not _interpreting():
                raise AssertionError(f"{func} made a tensor {list(x.shape)} {x.dtype}")
        return result
