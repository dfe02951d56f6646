"""A reader that is trained along and thrown away: from a gist to the bag of the tokens that it stands for.

A gist from which its tokens can be read back has kept what they were, also where the text that follows does not ask for
it. Code = gist's features . down / sqrt(F); hidden = code . up / sqrt(rank) + bias; logits by the model's embedding.

The roots are there for Adam, whose every step moves each weight by about the learning rate: without them a code of
F = 11,520 features of size one moves by more than its own size, and the reader forgets what it has learnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mc_runtime.model.decoder import Decoder

from .gist_kinds import LevelGists
from .losses import bag_loss


class BagReader:
    """parameters: `aux/<field>`, which no GistNet file holds. down [F, rank]; up [rank, E] and bias [E] zero."""

    def __init__(self, decoder: Decoder, features: int, rank: int, rows: int) -> None:
        """features: F of `LevelGists.features`. rows: gists per micro-batch that are read, at most."""
        self.decoder, self.rows = decoder, rows
        draw = torch.Generator().manual_seed(0)
        width = decoder.config.embed_dim
        start = {
            "aux/down": torch.randn(features, rank, generator=draw),
            "aux/up": torch.zeros(rank, width),
            "aux/bias": torch.zeros(width),
        }
        self.parameters = {name: x.to(decoder.device).requires_grad_() for name, x in start.items()}

    def loss(self, levels: Sequence[LevelGists], ids: Tensor, rng: random.Random) -> Tensor:
        """Mean over the levels of the cross-entropy of each read gist's tokens, nats a token. ids: [B, N]."""
        down, up, bias = (self.parameters[f"aux/{name}"] for name in ("down", "up", "bias"))
        parts = []
        for gists in levels:
            features = gists.features()
            count = features.shape[1]
            if count == 0:
                continue
            tokens = ids[:, : count * gists.span].unflatten(1, (count, gists.span)).flatten(0, 1)
            chosen = torch.tensor(rng.sample(range(len(tokens)), min(self.rows, len(tokens))), device=ids.device)
            code = features.flatten(0, 1)[chosen] @ down * down.shape[0] ** -0.5
            hidden = code @ up * up.shape[0] ** -0.5 + bias
            parts.append(bag_loss(hidden, tokens[chosen], self.decoder.head))
        return torch.stack(parts).mean()
