"""The objective `attention`: gists that attention reads like the text itself, layer by layer.

A sequence runs once through the frozen model, which gives every layer's queries, keys, values and attention outputs o.
For a piece of it behind a context of gists each layer's attention is computed again, with the very same queries, and

    loss = 1/2 sum_l mean_t sum_d F_ld (W_l (o' - o))_td^2,    F_ld = E[(d log p(y) / d x_ld)^2],  y ~ p

where o' is what the layer reads from the gists, W its output projection and F the diagonal of the Fisher information of
the residual stream x after the layer's attention: to second order, and as far as the errors of different layers and
dimensions do not meet, the loss is the KL divergence in nats per token that the gists cause (Amari 1998). Nothing runs
through the model's other weights, and no gradient does: a step costs little more than reading the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mc_kernels import context_attention
from mc_kernels.rope import phases, rotate
from mc_runtime.model.decoder import Attention, Decoder

from .gist_kinds import LevelGists
from .layouts import Gathered, split_entries

# Positions whose gradients do not count: a first token is a sink, and its residual stream is like no other's.
SKIP = 8


@dataclass
class Recording:
    """What attention did, by layer: queries [B, Hq, T, D], unrotated; outputs [B, T, Hq D] before the projection."""

    queries: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def recording(decoder: Decoder) -> Iterator[Recording]:
    """Record every layer that runs within the block."""
    record, hooks = Recording(), []

    def keep_queries(attention: Attention, rows: Tensor) -> None:
        q = rows.unflatten(-1, (-1, attention.head_dim))[:, :, : attention.n_heads].transpose(1, 2)
        record.queries.append(q if attention.q_norm is None else attention.q_norm(q))

    for layer in decoder.layers:
        attention: Any = layer.attention
        hooks += [
            attention.qkv.register_forward_hook(lambda _m, _i, rows, at=attention: keep_queries(at, rows)),
            attention.out.register_forward_pre_hook(lambda _m, inputs: record.outputs.append(inputs[0])),
        ]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


@torch.enable_grad()
def residual_fisher(decoder: Decoder, ids: Tensor, generator: torch.Generator) -> Tensor:
    """[L, E] fp32: mean square of the gradient of log p(y) with respect to what each layer's attention adds to the
    residual stream, summed over the later tokens that it reaches; y is drawn from the model. ids: [B, N]."""
    layers: list[Any] = list(decoder.layers)
    added: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_() if not added else output
        if added:
            leaf.retain_grad()
        added.append(leaf)
        return leaf

    hooks = [layer.attention.out.register_forward_hook(keep) for layer in layers]
    total = torch.zeros(len(layers), decoder.config.embed_dim, device=decoder.device)
    try:
        for row in ids.split(1):
            added.clear()
            positions = torch.arange(row.shape[1], device=row.device)[None]
            hidden = decoder(decoder.embed(row), positions).hidden[0]
            _sampled_log_likelihood(decoder, hidden, generator).backward()
            for layer, x in enumerate(added):
                assert x.grad is not None
                total[layer] += x.grad[0, SKIP:].float().square().mean(0)
    finally:
        for hook in hooks:
            hook.remove()
    return total / len(ids)


def _sampled_log_likelihood(decoder: Decoder, hidden: Tensor, generator: torch.Generator) -> Tensor:
    log_p = torch.log_softmax(decoder.logits(hidden).float(), dim=-1)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    return log_p.gather(1, drawn).sum()


def matching_loss(
    decoder: Decoder,
    record: Recording,
    k: Tensor,
    v: Tensor,
    levels: Sequence[LevelGists],
    rows: Tensor,
    cuts: Tensor,
    where: Gathered,
    near: int,
    fisher: Tensor,
) -> Tensor:
    """Loss of n samples, [L] fp32, nats per token by layer.

    k, v: [L, B, Hkv, N, D] of the sequences that were recorded. levels: their gists. rows, cuts [n]: sequence and end
    of the past of each sample. where: its context. near: tokens after the cut whose queries are used. fisher: [L, E].

    Attention to tokens is what it is; only that to gists is differentiated, and the two are merged by their sums of
    exponentials (online softmax, Milakov & Gimelshein 2018).
    """
    device, tokens, c = k.device, k.shape[3], decoder.config
    span = torch.arange(near, device=device)
    at = cuts[:, None] + span  # [n, T] places in the sequence
    q_pos = where.start.to(device)[:, None] + span
    of_tokens, of_gists = split_entries(where, where.index < tokens)
    of_tokens, of_gists = ((i.to(device), p.to(device)) for i, p in (of_tokens, of_gists))
    token_index = torch.cat((of_tokens[0], at), dim=1)  # the near tokens follow the context
    token_pos = torch.cat((of_tokens[1], q_pos), dim=1)
    gist_index, gist_pos = (of_gists[0] - tokens).clamp_min(0), of_gists[1]
    absent = (gist_pos < 0)[:, None, None, None]
    spectrum, interleaved = decoder.rope.inv_freq_on(device), decoder.rope.interleaved
    (q_cos, q_sin), (k_cos, k_sin) = ([x[:, None] for x in phases(p, spectrum)] for p in (q_pos, gist_pos))
    scale = decoder.rope.attention_scaling**2 * c.head_dim**-0.5
    sample = rows[:, None]

    def pick(x: Tensor, index: Tensor) -> Tensor:
        """x [B, H, M, D] -> [n, H, S, D]"""
        return x.transpose(1, 2)[sample, index].transpose(1, 2)

    losses = []
    for number, module in enumerate(decoder.layers):
        layer: Any = module
        q = pick(record.queries[number], at)
        with torch.no_grad():
            read: Any = context_attention(
                q, pick(k[number], token_index), pick(v[number], token_index), q_pos, token_pos, decoder.rope,
                return_lse=True,
            )  # fmt: skip
        out, lse = (x.unflatten(1, (c.n_kv_heads, -1)).float() for x in read)  # [n, Hkv, g, T, D], [n, Hkv, g, T]
        kv = [level.kv for level in levels if level.kv is not None]
        keys, values = (pick(torch.cat([pair[i][number] for pair in kv], dim=2), gist_index).float() for i in (0, 1))
        queries = rotate(q, q_cos, q_sin, interleaved).unflatten(1, (c.n_kv_heads, -1))
        keys = rotate(keys, k_cos, k_sin, interleaved)
        logits = queries @ keys.transpose(-1, -2).unsqueeze(2) * scale  # [n, Hkv, g, T, M]
        logits = logits.masked_fill(absent, -torch.inf)
        total = torch.logaddexp(lse, logits.logsumexp(-1))[..., None]
        merged = (lse[..., None] - total).exp() * out + (logits - total).exp() @ values.unsqueeze(2)
        aim = record.outputs[number][sample, at]  # [n, T, Hq D]
        error = layer.attention.out((merged.flatten(1, 2).transpose(1, 2).flatten(2) - aim).to(k)).float()
        losses.append(0.5 * (error.square().mean((0, 1)) * fisher[number]).sum())
    return torch.stack(losses)
