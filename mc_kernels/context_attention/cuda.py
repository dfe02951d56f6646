"""`context_attention` on a GPU by csrc/context_attention/cuda.cu (kernel.cuh there), for few queries. Forward only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import cuda_backend, native

Results = tuple[Tensor, Tensor, Tensor]


def _check_out(name: str, x: Tensor, like: Tensor, device: torch.device, *, contiguous: bool) -> None:
    if x.shape != like.shape or x.dtype != like.dtype or x.device != device:
        raise ValueError(
            f"out: expected {name} {list(like.shape)} {like.dtype} on {device}, got {list(x.shape)} {x.dtype} on"
            f" {x.device}"
        )
    if contiguous and not x.is_contiguous():
        raise ValueError(f"out: expected contiguous {name}, got strides {list(x.stride())}")


def _empty_results(q: Tensor, k: Tensor, return_mass: bool, device: torch.device | str) -> Results:
    mass_shape = (k.shape[0], k.shape[2]) if return_mass else (0,)
    return (
        torch.empty(q.shape, dtype=q.dtype, device=device),
        torch.empty(q.shape[:3], dtype=torch.float32, device=device),
        torch.empty(mass_shape, dtype=torch.float32, device=device),
    )


def _call(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float, return_mass: bool,
    k_scale: Tensor | None, v_scale: Tensor | None, out: Results,
) -> Callable[[Any], int]:  # fmt: skip
    """The library's call but for its last argument; keeps what it reads."""
    positions = [cuda_backend.array(x, torch.int64) for x in (q_pos, kv_pos)]
    freq = cuda_backend.frequencies(inv_freq)
    by_slot, by_head = (
        [cuda_backend.array(x, torch.float32) for x in pair] for pair in ((sigma, kv_bias), (k_scale, v_scale))
    )
    result, lse, mass = out
    arguments = (
        *(native.view(x) for x in (q, k, v)),
        *(native.address(x) for x in positions),
        native.address(freq),
        0 if freq is None else freq.shape[0],
        interleaved,
        attention_scaling,
        *(native.address(x) for x in by_slot),
        scale,
        native.view(result),
        native.address(lse),
        native.address(mass),
        *(native.address(x) for x in by_head),
    )
    held = (*positions, freq, *by_slot, *by_head, out)  # the library gets addresses

    def call(where: Any, held: object = held) -> int:
        return int(cuda_backend.library().context_attention(*arguments, where))

    return call


def context_attention_workspace(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float, return_mass: bool,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> int:  # fmt: skip
    """Bytes of workspace that a call with these arguments needs on this device."""
    args = (q, k, v, q_pos, kv_pos, inv_freq, interleaved, attention_scaling, sigma, kv_bias, scale, return_mass)
    return cuda_backend.workspace_bytes(_call(*args, k_scale, v_scale, _empty_results(q, k, return_mass, q.device)), q)


def context_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float, return_mass: bool,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, *, out: Results | None = None,
    workspace: Tensor | None = None,
) -> Results:  # fmt: skip
    """See `ref.context_attention_ref`. fp32, bf16 or fp16, keys and values of float8_e4m3fn too, D <= 256.

    out: (out [B, Hq, T, D] of q's dtype, last dimension contiguous; lse [B, Hq, T] and mass [B, S] ([0] unless asked)
        fp32, contiguous), overwritten; they alias nothing else. workspace: uint8 on q's device,
        `context_attention_workspace(...)` bytes. Given both, int64 positions, an fp64 `inv_freq` and fp32 sigma and
        kv_bias, all contiguous, nothing is allocated: the launches can be captured in a CUDA graph.
    """
    if out is None:
        out = _empty_results(q, k, return_mass, q.device)
    else:
        names = ("out", "lse", "mass")
        for name, x, like in zip(names, out, _empty_results(q, k, return_mass, "meta"), strict=True):
            _check_out(name, x, like, q.device, contiguous=name != "out")
    call = _call(
        q, k, v, q_pos, kv_pos, inv_freq, interleaved, attention_scaling, sigma, kv_bias, scale, return_mass, k_scale,
        v_scale, out,
    )  # fmt: skip
    kind = "context_attention", q.shape, k.shape, q.dtype, k.dtype, inv_freq is None, return_mass, q.device
    cuda_backend.launch(call, q, workspace, kind)
    return out
