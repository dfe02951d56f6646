"""The crowd (see `crowd`) where level 2 learns and level 1 does not: a gist of its own for every text, of many texts.

A memory of 100,000 tokens has a hundred gists of level 2 around what is open, each another one. Trained among a few
that are repeated, those of level 2 still spoke up: replies went on as the texts around would (docs/quality.md). Level 1
is frozen here, so what is kept of a text are its gists of level 1, a thirty-second of its keys and values: hundreds of
texts fit, and all of them are pooled anew for each micro-batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mc_kernels import gist_pool

from .crowd import RUNS, TOPS, Crowd
from .layouts import Entry
from .pooled_maker import PooledMaker, pool_levels

# Share of samples whose number of gists is drawn evenly; the others' over orders of magnitude.
EVENLY = 0.5


class Level2Crowd(Crowd):
    """k, v: [L, texts, Hkv, K * G, D], gists of level 1. maker: of two levels."""

    maker: PooledMaker

    @torch.no_grad()
    def _kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ((k1, v1),) = pool_levels(k, v, self.maker.weights()[:1], self.maker.size)
        return k1, v1

    def gists(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Keys and values [L, Hkv, M, D]: K * G gists of level 1 of each of some texts, then those of level 2 of all,
        and last their mean."""
        second = self.maker.weights()[1]
        made = gist_pool(self.k.transpose(1, 2), self.v.transpose(1, 2), second)
        shown = torch.tensor(rng.sample(range(self.texts), self._runs()), device=self.k.device)
        out = []
        for below, above in zip((self.k, self.v), made, strict=True):
            runs, tops = below[:, shown].transpose(1, 2).flatten(2, 3), above.flatten(2, 3)
            out.append(torch.cat((runs, tops, tops.mean(2, keepdim=True)), dim=2))
        return out[0], out[1]

    def _runs(self) -> int:
        return min(RUNS, self.texts)

    def draw(self, rng: random.Random, gists: Sequence[int]) -> list[Entry]:
        """What one sample shows, as `Crowd.draw`: up to all texts by their gists of level 2, none of them twice."""
        of_text, level = self.maker.size * gists[0], len(gists) + 1
        first_of_level2 = self._runs() * of_text
        top = first_of_level2 + self.texts * gists[1]
        units = [
            list(range(run * of_text, (run + 1) * of_text))
            for run in rng.sample(range(self._runs()), rng.randint(0, self._runs()))
        ]
        if rng.random() < EVENLY:
            count = rng.randint(0, self.texts)
        else:
            count = round(math.exp(rng.uniform(0.0, math.log(self.texts + 1)))) - 1
        for text in rng.sample(range(self.texts), count):
            start = first_of_level2 + text * gists[1]
            units.append(list(range(start, start + gists[1])))
        units += [[top]] * rng.randint(0, TOPS)
        rng.shuffle(units)
        return [Entry(level, index) for unit in units for index in unit]
