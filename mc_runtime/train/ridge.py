"""A start for the projector of `projected` gists: reduced-rank ridge regression from vectors to keys and values.

With vectors x [n, E] and what pooled gists of the same blocks hold, y [n, F] (F = L * 2 * Hkv * D), both centred, and y
scaled so that each layer's keys and each layer's values spread alike:

    W  = (x'x / n + a t I)^-1 x'y / n,  t the mean of the diagonal of x'x / n
    W_r = W V V',  V [F, r] the top right singular vectors of C^1/2 W,  C = x'x / n

which is the best map of rank r to the fitted values (Izenman 1975). Only moments of x and y are kept, not the samples.
The code down . x has unit variance, so that one learning rate serves both factors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mc_kernels import GistPoolWeights
from mc_runtime.gistnet import Projector
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.stores import ConcatStore

from .corpus import Corpus, sample_mixture
from .pooled_maker import pool_levels

# Candidates for the strength of the penalty, over the mean variance of an input.
STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


class Moments:
    """First and second moments of pairs of rows: all that a linear fit needs, in fp64."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.n = 0
        self.x, self.y = (torch.zeros(size, dtype=torch.float64) for size in (inputs, outputs))
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.yy = torch.zeros(outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: [n, E], y: [n, F]; of any float dtype, on any device."""
        x, y = x.detach().float(), y.detach().float()
        self.n += len(x)
        for total, more in (
            (self.x, x.sum(0)), (self.y, y.sum(0)), (self.xx, x.T @ x), (self.xy, x.T @ y), (self.yy, y.square().sum(0))
        ):  # fmt: skip
            total += more.to(total)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of x and y, covariances x'x and x'y, variances of y."""
        x, y = self.x / self.n, self.y / self.n
        return (
            x, y, self.xx / self.n - torch.outer(x, x), self.xy / self.n - torch.outer(x, y), self.yy / self.n - y * y
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LinearMap:
    """y = up @ (down @ x) + bias. down: [r, E], up: [F, r], bias: [F], fp64."""

    down: Tensor
    up: Tensor
    bias: Tensor

    def explained(self, held_out: Moments, scale: Tensor) -> float:
        """Share of the variance of y / scale that the map explains."""
        x, y, xx, xy, yy = held_out.centred()
        w = (self.up @ self.down).T / scale  # [E, F]
        offset = (x @ w * scale + self.bias - y) / scale
        missed = yy / scale**2 - 2 * (w * xy / scale).sum(0) + (w * (xx @ w)).sum(0) + offset**2
        return float(1 - missed.sum() / (yy / scale**2).sum())


def fit_ridge(moments: Moments, strength: float, rank: int, scale: Tensor) -> LinearMap:
    """scale: [F], what an output is divided by while ranks are chosen."""
    x, y, xx, xy, _ = moments.centred()
    values, vectors = torch.linalg.eigh(xx)
    values = values.clamp_min(0)
    rotated = vectors.T @ (xy / scale)  # [E, F] in the inputs' principal axes
    w = rotated / (values + strength * values.mean())[:, None]
    fitted = values.sqrt()[:, None] * w
    # Singular vectors by the small side: E is far below F.
    squares, left = torch.linalg.eigh(fitted @ fitted.T)
    squares, left = squares.flip(0)[:rank].clamp_min(1e-30), left.flip(1)[:, :rank]
    sizes = squares.sqrt()
    right = fitted.T @ left / sizes  # V, [F, r]
    down = (w @ right / sizes).T @ vectors.T
    up = right * sizes * scale[:, None]
    return LinearMap(down, up, y - up @ (down @ x))


def group_scale(moments: Moments, group: int) -> Tensor:
    """[F]: root of the mean variance of each run of `group` outputs."""
    variance = moments.centred()[-1].unflatten(0, (-1, group)).mean(1, keepdim=True)
    return variance.expand(-1, group).flatten().clamp_min(1e-12).sqrt()


@torch.no_grad()
def collect(
    decoder: Decoder,
    corpora: Sequence[Corpus],
    encode: Callable[[Tensor], Tensor],
    pool: GistPoolWeights,
    *,
    blocks: int,
    seed: int = 0,
    length: int = 512,
    batch: int = 4,
) -> tuple[Moments, Moments]:
    """Moments of (vector, pooled key and value) of about `blocks` blocks, and of a ninth as many more held out.

    encode: ids [B, N] -> vectors [B, N // K, E]. pool: of one gist per block; untrained, their means.
    """
    c = decoder.config
    sizes = (c.embed_dim, c.n_layers * 2 * c.n_kv_heads * c.head_dim)
    fit, held_out = Moments(*sizes), Moments(*sizes)
    rng = random.Random(f"ridge {seed}")
    turn = 0
    while fit.n < blocks or not held_out.n:
        ids = torch.from_numpy(sample_mixture(corpora, rng, batch, length)).to(decoder.device)
        store = ConcatStore()
        decoder(decoder.embed(ids), torch.arange(length, device=ids.device).expand(ids.shape), store)
        ((k, v),) = pool_levels(store.keys, store.values, [pool], pool.block_size)
        y = torch.stack((k, v), dim=1).permute(2, 4, 0, 1, 3, 5).flatten(2)  # [B, M, L * 2 * Hkv * D]
        # The first block holds the sink, whose keys and values are like no other's, and which no gist replaces.
        into = held_out if turn % 10 == 4 else fit
        into.add(encode(ids)[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1))
        turn += 1
    return fit, held_out


def ridge_projector(decoder: Decoder, fit: Moments, held_out: Moments, rank: int) -> tuple[Projector, float, float]:
    """The projector of the strength that explains most on held-out blocks; the share of variance that it explains
    there, and that of the map of full rank."""
    c = decoder.config
    scale = group_scale(fit, c.n_kv_heads * c.head_dim)
    full = min(c.embed_dim, len(scale))
    shares = {a: fit_ridge(fit, a, full, scale).explained(held_out, scale) for a in STRENGTHS}
    best = max(shares, key=lambda a: shares[a])
    chosen = fit_ridge(fit, best, min(rank, full), scale)
    heads = (c.n_layers, 2, c.n_kv_heads, c.head_dim)
    down, up, bias = (x.to(decoder.device, torch.float32) for x in (chosen.down, chosen.up, chosen.bias))
    projector = Projector(down, up.view(*heads, -1), bias.view(heads))
    return projector, chosen.explained(held_out, scale), shares[best]
