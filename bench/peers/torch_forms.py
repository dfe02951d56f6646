"""The plain formulas in the form that is fastest in PyTorch, for the peers `torch` and `torch.compile`.

    kv_splice           gathered and scattered by index: with slices, compiled code copies the whole cache
    context_attention   one query: products and sums in place of a matrix product, so that a compiled key is rotated
                        where it is read; many: head by head, so that a head's logits stay in the cache
    collapse_           entries gathered and gists scattered by index, outside of what is compiled: k and v share an
                        allocation
    lens_score          projections absorbed as in `mc_kernels/lens_score/ref.py`, in the storage dtype

On a CPU a function of many layers is called on as many layers as have their temporaries in the cache. Each builder
takes the name of the candidate and what to do with the function: compile it, or nothing.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from mc_kernels.gist_pool.weights import GistPoolWeights
from mc_kernels.lens_score.ref import score_formula
from mc_kernels.rope import phases, rotate

from ..workloads import Candidate, Workload
from ..workloads.collapse import blocks_of, put
from ..workloads.context_attention import visible
from ..workloads.fused_linear import plain_linear
from ..workloads.gist_encode import plain_encode
from ..workloads.gist_pool import plain_pool
from ..workloads.kv_splice import KvSplice

CACHE_BYTES = 4 << 20  # of temporaries of one call
Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
Calls = list[tuple[Any, ...]]  # arguments of each call


def start(compiled: Function, arguments: Iterable[Any]) -> None:
    """Compile for these arguments. What the tuner writes to stderr on the way is no output of the benchmark."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        compiled(*arguments)


def per_call(count: int, bytes_of_one: int, device: torch.device) -> int:
    """The largest divisor of `count` whose temporaries fit the cache; on a GPU, all."""
    fitting = [n for n in range(1, count + 1) if count % n == 0 and n * bytes_of_one <= CACHE_BYTES]
    return count if device.type != "cpu" else max(fitting, default=1)


def splice(workload: Workload, name: str, wrap: Wrap) -> Candidate:
    assert isinstance(workload, KvSplice)

    def splice(x: Tensor, fresh: Tensor, source: Tensor, destination: Tensor, *turns: Tensor) -> None:
        entries = torch.cat((x[..., source, :], fresh), dim=-2)
        x[..., destination, :] = rotate(entries, turns[0], turns[1], False) if turns else entries

    # Keys and values apart: they share an allocation. Where arguments might overlap the compiler copies it all, and the
    # code that torch 2.13 makes writes to the offsets of its first call ever after.
    compiled = {"k": wrap(splice), "v": wrap(splice)}

    def prepare(inputs: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Calls]]]:
        k, plan, rope = inputs["k"], inputs["plan"], inputs["rope"]
        source, destination = plan.moves.to(k.device).T.contiguous()
        slots = plan.insert_slots.to(k.device)
        places = [source, torch.cat((destination, slots))]
        turns: list[Tensor] = []
        if rope is not None:
            shifts = torch.cat((destination - source, slots))
            turns = [x.to(k.dtype) for x in phases(shifts, rope.inv_freq_on(k.device))]
        n = per_call(k.shape[0], 2 * places[1].numel() * k[0, ..., 0, :].nbytes, k.device)
        calls: list[tuple[str, Calls]] = []
        for part, more in (("k", turns), ("v", [])):
            fresh = inputs[f"{part}_new"].unflatten(0, k.shape[:2])
            layers = zip(inputs[part].split(n), fresh.split(n), strict=True)
            calls.append((part, [(*some, *places, *more) for some in layers]))
        return inputs, calls

    def run(state: tuple[dict[str, Any], list[tuple[str, Calls]]]) -> None:
        for part, calls in state[1]:
            for arguments in calls:
                compiled[part](*arguments)

    return Candidate(name, run, prepare, lambda state, _: workload.result(state[0], None))


def _one_query(q: Tensor, k: Tensor, v: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor) -> Tensor:
    """q [B, Hq, 1, D], k and v [B, Hkv, S, D], phases [B, n, D/2]. The query sees all."""
    keys = rotate(k, k_cos[:, None], k_sin[:, None], False)[:, :, None]
    rows = rotate(q, q_cos[:, None], q_sin[:, None], False).unflatten(1, (k.shape[1], -1))
    logits = (rows.float() * keys.float()).sum(-1) * q.shape[-1] ** -0.5
    return (torch.softmax(logits, dim=-1).to(v.dtype) @ v).view(q.shape)


def _one_head(
    q: Tensor, k: Tensor, v: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, mask: Tensor
) -> Tensor:
    """q [B, T, D], k and v [B, S, D], phases [B, n, D/2], mask [B, T, S] to be added."""
    logits = rotate(q, q_cos, q_sin, False) @ rotate(k, k_cos, k_sin, False).transpose(-1, -2)
    return torch.softmax(logits * q.shape[-1] ** -0.5 + mask, dim=-1) @ v


def attention(workload: Workload, name: str, wrap: Wrap) -> Candidate:
    single = workload.case.queries == 1
    compiled = wrap(_one_query if single else _one_head)

    def prepare(inputs: dict[str, Any]) -> Calls:
        q, k, v, rope = (inputs[x] for x in ("q", "k", "v", "rope"))
        turns = [
            x.to(q.dtype) for p in ("q_pos", "kv_pos") for x in phases(inputs[p], rope.inv_freq_on(q.device))
        ]  # fmt: skip
        seen = visible(inputs)
        calls: Calls = [(q, k, v, *turns)]
        if not single:
            assert seen is not None
            mask = torch.zeros_like(seen[:, 0], dtype=q.dtype).masked_fill_(~seen[:, 0], float("-inf"))
            group = q.shape[1] // k.shape[1]
            calls = [(q[:, h], k[:, h // group], v[:, h // group], *turns, mask) for h in range(q.shape[1])]
        start(compiled, calls[0])
        return calls

    def run(calls: Calls) -> Tensor:
        outputs = [compiled(*arguments) for arguments in calls]
        return outputs[0] if single else torch.stack(outputs, dim=1)

    return Candidate(name, run, prepare, note="phases and mask made beforehand")


class Weights(nn.Module):
    """The fields of a dataclass of weights under their names, as the compiler takes them: its tensors as buffers."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        for field in fields(weights):
            value = getattr(weights, field.name)
            if isinstance(value, Tensor):
                self.register_buffer(field.name, value)
            else:
                setattr(self, field.name, value)
        self.width = getattr(weights, "width", None)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.buffers())


def pool(workload: Workload, name: str, wrap: Wrap) -> Candidate:
    compiled = wrap(plain_pool)

    def prepare(inputs: tuple[Tensor, Tensor, GistPoolWeights]) -> list[Calls]:
        k, v, weights = inputs
        n = per_call(k.shape[0], 4 * k[0].nbytes, k.device)
        blocks = k.shape[2] if n > 1 else per_call(k.shape[2], 4 * k[0, :, 0].nbytes, k.device)
        rows = []
        for keys, values, *tensors in zip(*(x.split(n) for x in (k, v, *weights.tensors())), strict=True):
            some = Weights(GistPoolWeights(*tensors))
            parts = zip(keys.split(blocks, dim=2), values.split(blocks, dim=2), strict=True)
            rows.append([(*part, some) for part in parts])
        start(compiled, rows[0][0])
        return rows

    def run(rows: list[Calls]) -> tuple[Tensor, Tensor]:
        gists = [[compiled(*arguments) for arguments in calls] for calls in rows]
        k_gist, v_gist = (torch.cat([torch.cat([g[i] for g in row], dim=2) for row in gists]) for i in range(2))
        return k_gist, v_gist

    return Candidate(name, run, prepare)


def collapse(workload: Workload, name: str, wrap: Wrap) -> Candidate:
    compiled = wrap(plain_pool)
    Part = tuple[Tensor, Tensor, Weights]

    def prepare(inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Part]]:
        k, v, children = inputs["k"].squeeze(1), inputs["v"].squeeze(1), inputs["children"]
        n = per_call(k.shape[0], 4 * children.numel() * k[0, :, 0].nbytes, k.device)
        parts = [
            (keys, values, Weights(GistPoolWeights(*tensors)))
            for keys, values, *tensors in zip(*(x.split(n) for x in (k, v, *inputs["weights"].tensors())), strict=True)
        ]
        keys, values, some = parts[0]
        start(compiled, (blocks_of(keys, children), blocks_of(values, children), some))
        return inputs, parts

    def run(state: tuple[dict[str, Any], list[Part]]) -> None:
        children, slots, moves = (state[0][x] for x in ("children", "slots", "moves"))
        for k, v, some in state[1]:
            gists = compiled(blocks_of(k, children), blocks_of(v, children), some)
            for x, gist in zip((k, v), gists, strict=True):
                put(x, gist.flatten(-3, -2), slots, moves)

    return Candidate(name, run, prepare, lambda state, _: workload.result(state[0], None))


def encode(workload: Workload, name: str, wrap: Wrap) -> Candidate:
    compiled = wrap(plain_encode)

    def prepare(inputs: tuple[Tensor, Any]) -> tuple[Tensor, Weights]:
        state = inputs[0], Weights(inputs[1])
        start(compiled, state)
        return state

    return Candidate(name, lambda state: compiled(*state), prepare)


def lens(workload: Workload, name: str, wrap: Wrap) -> Candidate:
    def score(entries: Tensor, features: Tensor, queries: Tensor, weights: Any, legal: Tensor) -> Tensor:
        tensors = (entries, features.to(entries.dtype), queries, *weights.tensors())
        return score_formula(tensors, legal, weights.n_heads).float()

    compiled = wrap(score)

    def prepare(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        entries, features, queries, weights, legal = inputs
        state = entries, features, queries, Weights(weights), legal
        start(compiled, state)
        return state

    return Candidate(name, lambda state: compiled(*state), prepare, note="projections absorbed")


def linear(workload: Workload, name: str, wrap: Wrap) -> Candidate:
    compiled = wrap(plain_linear)

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        start(compiled, (inputs,))
        return inputs

    return Candidate(name, compiled, prepare)


FORMS: dict[str, Callable[[Workload, str, Wrap], Candidate]] = {
    "kv_splice_": splice,
    "context_attention": attention,
    "fused_linear": linear,
    "gist_pool": pool,
    "collapse_": collapse,
    "gist_encode": encode,
    "lens_score": lens,
}


def serves(workload: Workload) -> bool:
    """Whether the forms know everything that the case asks for."""
    case = workload.case
    if workload.op not in FORMS:
        return False
    if workload.op == "context_attention":
        return not case.features and not case.fp8
    return not (workload.op == "kv_splice_" and case.rope and case.discipline == "slots")
