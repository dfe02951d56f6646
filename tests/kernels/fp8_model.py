"""A cache of fp8 for tests: a case's keys and values stored in it, and what they stand for."""

from __future__ import annotations

from typing import Any

from mc_kernels.context_attention.cases import stored


def with_fp8(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `context_attention` with their keys and values stored."""
    (k, k_scale), (v, v_scale) = stored(args["k"]), stored(args["v"])
    return {**args, "k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}


def read(args: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """Arguments of the formula (attention_model.model) for those of an fp8 cache: in fp64, or rounded to q's dtype, as
    plain code does it."""
    out = dict(args)
    for name in ("k", "v"):
        wide = args[name].double() * out.pop(f"{name}_scale").double()[:, None, None]
        out[name] = wide if exact else wide.to(args["q"].dtype)
    return out
