"""How a model rotates: found by running it, because every architecture says it elsewhere.

The model runs twice over a few random vectors at known positions, with attention that records its inputs and gives
zeros, once as it is and once with rotary modules that give cos = 1 and sin = 0. Attention adds nothing in either run,
so every layer sees the same input twice, and a layer's queries and keys differ by exactly its rotation. Which
frequencies those are, the model's own rotary modules say: a layer takes the ones that turn the second run's into the
first's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...rope import RopeSpec, apply_rope
from .attention import RECORDER, Call

# Far enough apart that schedules which agree on their high frequencies differ on their low ones.
POSITIONS = (0, 1, 5, 40, 300, 1000)
# Frequencies that depend on how long the text is have no place in a cache that is rotated from positions.
VARYING = ("dynamic", "longrope")
# What models hand to attention and the attention of this package does, given it anew with each call.
SERVED = ("softcap", "s_aux")
# What changes nothing here: positions come from the cache.
HARMLESS = ("scaling", "position_ids", "cache_position", "use_cache", "sliding_window", "is_causal")


@dataclass(frozen=True)
class ProbedLayer:
    """One attention module. rope: None without positions. kv_shape: (Hkv, D) of its keys, as are dtype and device."""

    module: nn.Module
    rope: RopeSpec | None
    window: int | None
    kv_shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """[vocab, E]: what a model's input vectors are like."""
    return cast(Tensor, model.get_input_embeddings().weight)


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """Modules that hold frequencies and give (cos, sin)."""
    return [
        m for m in decoder.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))
    ]


def hook_identity(modules: list[nn.Module]) -> list[Any]:
    """Make rotary modules give no rotation, until the returned hooks are removed: q * 1 + rotate_half(q) * 0 is q,
    bit for bit, whatever the architecture pairs with what."""

    def identity(module: nn.Module, args: Any, output: Any) -> Any:
        if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, Tensor) for x in output)):
            raise ValueError(f"model: expected {type(module).__name__} to give (cos, sin), got {type(output).__name__}")
        return torch.ones_like(output[0]), torch.zeros_like(output[1])

    return [module.register_forward_hook(identity) for module in modules]


@torch.no_grad()
def probe(model: PreTrainedModel, decoder: PreTrainedModel) -> list[ProbedLayer]:
    """The attention layers of a model whose attention implementation is ours, in order. Raises ValueError, saying
    what stands in the way, for one that cannot run over a Working Context exactly."""
    if getattr(decoder.config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"model: {type(decoder).__name__} feeds its layers from the input ids too, which a vector does not have"
        )
    rotary = rotary_modules(decoder)
    if not rotary:
        raise ValueError(f"model: expected rotary position embeddings, found no inv_freq in {type(decoder).__name__}")
    candidates = [None, *_schedules(rotary)]
    real = _record(model, decoder)
    handles = hook_identity(rotary)
    try:
        plain = _record(model, decoder)
    finally:
        for handle in handles:
            handle.remove()
    if not real:
        raise ValueError(f"model: {type(decoder).__name__} does not attend through transformers' AttentionInterface")
    if len({call.module for call in real}) != len(real) or len(plain) != len(real):
        raise ValueError(f"model: expected every attention layer of {type(decoder).__name__} to run once a forward")
    layers = []
    for number, (a, b) in enumerate(zip(real, plain, strict=True)):
        _refuse_unknown(number, a)
        rope = _best(number, a, b, candidates)
        window = _window(number, a, decoder.config)
        layers.append(ProbedLayer(a.module, rope, window, (a.k.shape[1], a.k.shape[3]), a.k.dtype, a.k.device))
    kinds = {(layer.kv_shape, layer.dtype, layer.device) for layer in layers}
    if len(kinds) > 1:
        found = "; ".join(sorted(f"(Hkv, D) = {shape}, {dtype}, {device}" for shape, dtype, device in kinds))
        raise ValueError(f"model: expected layers of one shape and dtype on one device, got {found}")
    return layers


def _schedules(rotary: list[nn.Module]) -> list[RopeSpec]:
    found = []
    for module in rotary:
        kinds = getattr(module, "rope_type", "default")
        for name, inv_freq in module.named_buffers(recurse=False):
            prefix = name.removesuffix("inv_freq")
            if not name.endswith("inv_freq") or prefix.endswith("original_"):
                continue
            kind = kinds.get(prefix.removesuffix("_"), "default") if isinstance(kinds, dict) else kinds
            if kind in VARYING:
                raise ValueError(
                    f"model: its RoPE is of type {kind!r}, whose frequencies change with the length of the text; that "
                    "cannot be kept in a cache that is rotated from positions"
                )
            scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
            for interleaved in (False, True):
                found.append(RopeSpec(inv_freq.detach().float().clone(), interleaved, scaling))
    return found


def _record(model: PreTrainedModel, decoder: PreTrainedModel) -> list[Call]:
    embeddings = embedding_weight(model)
    if embeddings.device.type == "meta":
        raise ValueError("model: expected weights in memory, got a model on the meta device")
    noise = torch.randn(1, len(POSITIONS), embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    calls: list[Call] = []
    RECORDER.calls = calls
    try:
        decoder(
            inputs_embeds=noise.to(embeddings),
            position_ids=torch.tensor([POSITIONS], device=embeddings.device),
            use_cache=False,
        )
    finally:
        RECORDER.calls = None
    return calls


def _refuse_unknown(number: int, call: Call) -> None:
    where = f"model: layer {number} ({type(call.module).__name__})"
    asked = {name: value for name, value in call.options.items() if name not in (*HARMLESS, *SERVED)}
    unknown = [name for name, value in asked.items() if isinstance(value, Tensor) or value not in (None, False, 0)]
    if unknown:
        raise ValueError(
            f"{where} asks its attention for {', '.join(unknown)}, which attention over a Working Context does not do"
        )
    if not getattr(call.module, "is_causal", True) or call.options.get("is_causal") is False:
        raise ValueError(f"{where} is bidirectional; a Working Context is read causally")
    if call.k.shape != call.v.shape or call.q.shape[-1] != call.k.shape[-1]:
        raise ValueError(f"{where} has keys {list(call.k.shape)} and values {list(call.v.shape)}: expected one shape")


def _best(number: int, real: Call, plain: Call, candidates: list[RopeSpec | None]) -> RopeSpec | None:
    """The schedule that turns the unrotated queries and keys into the model's own; there has to be one."""
    positions = torch.tensor(POSITIONS, device=real.k.device)
    allowed = max(1e-3, 4 * torch.finfo(real.k.dtype).eps)

    def error(rope: RopeSpec | None) -> float:
        if rope is not None and rope.rotary_dim > real.k.shape[-1]:
            return math.inf
        worst = 0.0
        for want, given in ((real.q, plain.q), (real.k, plain.k)):
            got = given.float() if rope is None else apply_rope(given.float(), positions, rope)
            scale = float(want.float().abs().max())
            worst = max(worst, float((got - want.float()).abs().max()) / scale if scale else math.inf)
        return worst

    errors = [error(rope) for rope in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    if not errors[best] <= allowed:
        raise ValueError(
            f"model: layer {number} ({type(real.module).__name__}) rotates its queries and keys in no known way: the "
            f"nearest of its model's schedules is off by {errors[best]:.2g} of the largest value, allowed {allowed:.2g}"
        )
    return candidates[best]


def _window(number: int, call: Call, config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    kind = kinds[number] if kinds else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise ValueError(f"model: layer {number} is of type {kind!r}; expected full or sliding attention")
    window = call.options.get("sliding_window")
    if window is None and (kind == "sliding_attention" or not kinds):
        window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)
