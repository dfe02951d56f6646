"""The torch library that holds the ops (namespace `mc`), and how an op is put into it.

`define`/`impl` rather than `torch.library.custom_op`: a call costs about 2 us instead of 8 to 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .dispatch import goes_direct, refuse_tangents
from .registry import select

NAMESPACE = "mc"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# An op works in the dtypes of its arguments and adds in fp32, under autocast too.
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def define_op(name: str, schema: str, fake: Callable[..., Any], *, tags: tuple[torch.Tag, ...] = ()) -> Any:
    """Define `mc::name`, route its calls to the registry and register its shape function. Returns a function that calls
    it, past the dispatcher where that has nothing to do (`dispatch`).

    schema: its last argument is `str? backend` and no argument has a default: the dispatcher drops trailing arguments
        that equal their default, and the implementations take all of theirs.
    """
    _LIBRARY.define(name + schema, tags=tags or (torch.Tag.pt2_compliant_tag,))

    def route(*args: Any) -> Any:
        *rest, backend = args
        first = rest[0]
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        implementation = select(name, backend, device, tuple(rest))
        if not torch._C._is_any_autocast_enabled():
            return implementation(*rest)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return implementation(*rest)

    _LIBRARY.impl(name, route, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*args)
        if goes_direct(args):
            return route(*args)
        refuse_tangents(name, args)
        return overload(*args)

    return call


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give `mc::name` a backward (see `torch.library.register_autograd`), which calls `mc::<name>_backward`. That one
    has none: a second derivative is refused, which torch would leave out with no more than a warning."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"mc::{name}: expected to be differentiated once (its gradient has no backward)")

    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", refuse, lib=_LIBRARY)


@contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Record gradients within an op's own implementation.

    The dispatcher runs an op's kernel with the autograd keys excluded; an oracle whose backward is "differentiate the
    forward" needs them back for its own inner graph.
    """
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (
        torch._C.DispatchKey.AutogradFunctionality,
        torch._C.DispatchKey.AutogradOther,
        torch._C.DispatchKey.AutogradNestedTensor,
        torch._C.DispatchKey.ADInplaceOrView,
    ):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def differentiate(forward: Callable[..., Any], inputs: list[Tensor], grad_outputs: list[Tensor | None]) -> list[Tensor]:
    """Gradients of `forward(*inputs)` (a tensor or a tuple) for every input, as zeros where it does not depend."""
    with autograd_inside_op():
        leaves = [x.detach().requires_grad_(True) for x in inputs]
        outputs = forward(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        grads = torch.autograd.grad([o for o, _ in pairs], leaves, [g.to(o.dtype) for o, g in pairs], allow_unused=True)
    # An op's outputs may alias neither each other nor an input, which autograd's gradients do (slices, sums).
    taken = {g.untyped_storage().data_ptr() for g in grad_outputs if g is not None}
    return [_own(g, x, taken) for x, g in zip(inputs, grads, strict=True)]


def _own(grad: Tensor | None, x: Tensor, taken: set[int]) -> Tensor:
    """`grad` in x's dtype, contiguous, in a storage of its own; zeros for None."""
    if grad is None:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    grad = grad.to(x.dtype).contiguous()
    storage = grad.untyped_storage()
    if storage.data_ptr() in taken or storage.nbytes() != grad.numel() * grad.element_size():
        grad = grad.clone(memory_format=torch.contiguous_format)
    taken.add(grad.untyped_storage().data_ptr())
    return grad
