"""Whether a call of an op has to pass torch's dispatcher, which costs more than a short op itself.

Between two tokens a model's weights drive all else from the caches, torch's code included: to dispatch an op that is
written in Python then takes up to 0.1 ms of a CPU, ten times what it takes in a loop. Where nothing that the dispatcher
serves has a part in the call (gradients, modes, transforms, tracing, a profiler, subclasses of tensors), the op's
implementation is called at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# Of most arguments, told without a question to torch.
_NO_TENSORS = frozenset({type(None), bool, int, float, str})
# What a thread includes by default, and in inference mode. Modes and transforms (fake tensors, vmap, tracing) add keys.
_USUAL = torch._C._dispatch_tls_local_include_set()
_KEYS = frozenset(keys.raw_repr() for keys in (_USUAL, _USUAL.remove(torch._C.DispatchKey.ADInplaceOrView)))


def goes_direct(args: Iterable[Any]) -> bool:
    """Whether the dispatcher would do nothing with a call of these flat arguments but find the implementation.

    Not to be asked while torch compiles.
    """
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _KEYS:
        return False
    if torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled():
        return False
    if forward_ad._current_level >= 0:
        return False
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    for x in args:
        kind = type(x)
        if kind in _NO_TENSORS:
            continue
        if kind is not Tensor and kind is not Parameter:
            if isinstance(x, Tensor):
                return False
            continue
        if (grad and x.requires_grad) or x.is_meta or x.is_neg():  # has a shape alone; is minus what its memory holds
            return False
        if not inference and x.is_inference():  # written outside of the mode it is an error, which torch raises
            return False
    return True


def refuse_tangents(name: str, args: Iterable[Any]) -> None:
    """No op has a forward-mode derivative, and the dispatcher would drop tangents without a word: NotImplementedError.

    Not to be asked while torch compiles.
    """
    if forward_ad._current_level < 0:
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"mc::{name}: expected no forward-mode tangents (the op has no jvp), got some")
