"""Training of the rival `gist_tokens`: the loss of our pooled gists, with all of the far text behind gist tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mc_runtime.model.decoder import Decoder
from mc_runtime.model.stores import ConcatStore
from mc_runtime.train.corpus import Corpus, sample_mixture
from mc_runtime.train.losses import distillation_loss

from .gist_tokens import NAME, encode_blocks


@dataclass(frozen=True)
class GistTokensOptions:
    """lengths: far tokens, one drawn per micro-batch. near: tokens that follow. tokens: of a micro-batch, about.
    teacher: share of the KL in the loss; the rest is cross-entropy."""

    lengths: tuple[int, ...] = (256, 512)
    near: int = 96
    tokens: int = 4096
    teacher: float = 0.7


class GistTokensTask:
    """A `train.trainer.Task` of one parameter: the embeddings [G, E] fp32, first those of tokens drawn at random from
    the vocabulary (Lester et al. 2021)."""

    def __init__(
        self,
        decoder: Decoder,
        corpora: Sequence[Corpus],
        gists: int,
        size: int,
        options: GistTokensOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.decoder, self.corpora, self.size = decoder, corpora, size
        self.options = options or GistTokensOptions()
        drawn = torch.randint(len(decoder.embedding), (gists,), generator=torch.Generator().manual_seed(seed))
        start = decoder.embedding[drawn.to(decoder.device)].detach().float().clone()
        self.parameters: dict[str, Tensor] = {NAME: start.requires_grad_()}

    def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        o, decoder = self.options, self.decoder
        far = rng.choice(o.lengths)
        ids = torch.from_numpy(sample_mixture(self.corpora, rng, max(1, o.tokens // (far + o.near)), far + o.near))
        ids = ids.to(decoder.device)
        with torch.no_grad():
            text = ConcatStore()
            at = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            teacher = decoder(decoder.embed(ids), at, text).hidden[:, far:]
            k, v = text.keys[:, :, :, :far], text.values[:, :, :, :far]
        k_gist, v_gist = encode_blocks(decoder, k, v, self.parameters[NAME], self.size)
        slots = 1 + k_gist.shape[3]
        context = ConcatStore(
            torch.cat((k[:, :, :, :1], k_gist), 3),
            torch.cat((v[:, :, :, :1], v_gist), 3),
            torch.arange(slots, device=ids.device).expand(len(ids), slots),
        )
        near = ids[:, far:]
        positions = torch.arange(slots, slots + o.near, device=ids.device).expand(near.shape)
        hidden = decoder(decoder.embed(near), positions, context).hidden
        loss, nll = distillation_loss(
            hidden[:, :-1].flatten(0, 1),
            teacher[:, :-1].flatten(0, 1),
            near[:, 1:].flatten(),
            decoder.head,
            o.teacher,
        )
        return loss, {"loss": float(loss.detach()), "nll": float(nll)}
