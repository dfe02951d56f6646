"""Training of pooled gists: what follows must be as likely after gists as after the text itself.

A sequence runs once through the frozen model: that gives every token's keys and values (of which gists are pooled) and
the teacher's hidden states. Then several pieces of it run again, each behind a context in which blocks of its past
stand as gists. The loss is the KL divergence from the teacher plus cross-entropy; gradients flow through the model's
attention into the gists, and into the pooling weights.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mc_kernels import GistPoolWeights, gist_pool
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.stores import ConcatStore

from .corpus import Corpus, sample_mixture
from .layouts import LayoutOptions, draw_layout, gather_layouts
from .losses import distillation_loss

FIELDS = ("w", "b", "m", "c")


@dataclass(frozen=True)
class GistTaskOptions:
    """lengths: far tokens of a sequence, drawn per step with `length_weights`. near: tokens that run behind the gists.
    tokens: of the sequences of one micro-batch, about. cuts: pieces per sequence. teacher: share of the KL in the loss.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    length_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    near: int = 128
    tokens: int = 4096
    cuts: tuple[int, ...] = (1, 2, 4)
    teacher: float = 0.7
    layout: LayoutOptions = field(default_factory=LayoutOptions)


def pool_levels(k: Tensor, v: Tensor, levels: Sequence[GistPoolWeights], size: int) -> list[tuple[Tensor, Tensor]]:
    """k, v [L, B, Hkv, N, D] -> keys and values of the gists of each level, [L, B, Hkv, N // size**level, D]."""
    out = []
    for weights in levels:
        layers, batch = k.shape[:2]
        whole = k.shape[3] // size * size

        def blocks(x: Tensor, whole: int = whole) -> Tensor:
            return x[:, :, :, :whole].unflatten(3, (-1, size)).flatten(0, 1)

        k_gist, v_gist = gist_pool(blocks(k), blocks(v), weights)
        k, v = (x[..., 0, :].unflatten(0, (layers, batch)) for x in (k_gist, v_gist))
        out.append((k, v))
    return out


class GistTask:
    """Loss of pooled gists of one or two levels; `parameters` are fp32, by name `pool<level>/<field>`."""

    def __init__(
        self,
        decoder: Decoder,
        corpora: Sequence[Corpus],
        weights: Sequence[GistPoolWeights],
        options: GistTaskOptions | None = None,
        frozen_levels: Sequence[int] = (),
    ) -> None:
        self.decoder, self.corpora, self.options = decoder, corpora, options or GistTaskOptions()
        self.size = weights[0].b.shape[-1]
        self.parameters: dict[str, Tensor] = {
            f"pool{level}/{name}": x.detach().float().clone().requires_grad_(level not in frozen_levels)
            for level, w in enumerate(weights, start=1)
            for name, x in zip(FIELDS, w.tensors(), strict=True)
        }

    def weights(self, tensors: dict[str, Tensor] | None = None) -> list[GistPoolWeights]:
        named = self.parameters if tensors is None else tensors
        levels = sorted({int(name[4 : name.index("/")]) for name in named})
        return [GistPoolWeights(*(named[f"pool{level}/{f}"] for f in FIELDS)) for level in levels]

    def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """Loss of one micro-batch and figures for the log (nats a token)."""
        o = self.options
        which = rng.choices(range(len(o.lengths)), o.length_weights)[0]
        far, cuts = o.lengths[which], o.cuts[which]
        length = far + o.near
        batch = max(1, o.tokens // length)
        ids = torch.from_numpy(sample_mixture(self.corpora, rng, batch, length)).to(self.decoder.device)
        k, v, teacher = self.read(ids)
        levels = pool_levels(k, v, self.weights(), self.size)
        samples = [
            (row, self.size * rng.randint(max(1, far // self.size // 2), far // self.size) if cuts > 1 else far)
            for row in range(batch)
            for _ in range(cuts)
        ]
        layouts = [draw_layout(rng, cut // self.size, self.size, o.layout) for _, cut in samples]
        packed = [rng.random() >= o.layout.true_positions for _ in samples]
        hidden = self.run(ids, k, v, levels, samples, layouts, packed, o.near)
        rows = torch.tensor([row for row, _ in samples], device=ids.device)
        at = torch.tensor([cut for _, cut in samples], device=ids.device)[:, None] + torch.arange(
            o.near - 1, device=ids.device
        )
        targets = ids[rows[:, None], at + 1].flatten()
        loss, nll = distillation_loss(
            hidden[:, :-1].flatten(0, 1),
            teacher[rows[:, None], at].flatten(0, 1),
            targets,
            self.decoder.head,
            o.teacher,
        )
        return loss, {"loss": float(loss.detach()), "nll": float(nll)}

    @torch.no_grad()
    def read(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, N] -> keys (unrotated) and values [L, B, Hkv, N, D] and final hidden states [B, N, E]."""
        store = ConcatStore()
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        hidden = self.decoder(self.decoder.embed(ids), positions, store).hidden
        return store.keys, store.values, hidden

    def run(
        self,
        ids: Tensor,
        k: Tensor,
        v: Tensor,
        levels: Sequence[tuple[Tensor, Tensor]],
        samples: Sequence[tuple[int, int]],
        layouts: Sequence[Sequence[object]],
        packed: Sequence[bool],
        near: int,
    ) -> Tensor:
        """Hidden states [n, near, E] of the tokens after each sample's cut, behind its layout.

        samples: (row of ids, cut). k, v and `levels` as `read` and `pool_levels` give them.
        """
        cuts = [cut for _, cut in samples]
        where = gather_layouts(layouts, cuts, ids.shape[1], self.size, packed)  # type: ignore[arg-type]
        rows = torch.tensor([row for row, _ in samples], device=ids.device)
        index = where.index.to(ids.device)

        def context(tokens: Tensor, gists: Sequence[Tensor]) -> Tensor:
            source = torch.cat((tokens, *gists), dim=3)  # [L, B, Hkv, N + gists, D]
            return source.permute(1, 3, 0, 2, 4)[rows[:, None], index].permute(2, 0, 3, 1, 4)  # [L, n, Hkv, S, D]

        store = ConcatStore(
            context(k, [x for x, _ in levels]),
            context(v, [x for _, x in levels]),
            where.position.to(ids.device),
        )
        span = torch.arange(near, device=ids.device)
        near_ids = ids[rows[:, None], torch.tensor(cuts, device=ids.device)[:, None] + span]
        positions = where.start.to(ids.device)[:, None] + span
        return self.decoder(self.decoder.embed(near_ids), positions, store).hidden
