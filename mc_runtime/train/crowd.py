"""A crowd: gists of unrelated texts among those of a sample's own past, as they stand in a long memory.

Gists that were trained a few at a time add up when hundreds of them surround an opened passage, and the model answers
from them instead. So a fixed set of texts is read once, before the first step; each micro-batch pools some of them anew
with the weights of the moment (gradients flow into those), and each sample shows a number of their gists that is drawn
over two orders of magnitude, of all levels: single ones, whole runs of siblings as around an opened block, and gists of
the level above the trained ones, which are means.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mc_runtime.model.decoder import Decoder

from .corpus import Corpus, sample_mixture
from .gist_kinds import GistMaker, read_text
from .layouts import Entry

# Texts that a micro-batch pools, of those that were read.
POOLED = 8
# Most gists of level 2 that one sample shows, runs of level 1, and gists above.
MOST, RUNS, TOPS = 96, 4, 2


class Crowd:
    """`texts` texts of K**2 tokens each; k, v [L, texts, Hkv, K**2, D]. The block of the sink is read and left out."""

    def __init__(self, decoder: Decoder, corpora: Sequence[Corpus], maker: GistMaker, texts: int) -> None:
        self.decoder, self.maker, size = decoder, maker, maker.size
        self.texts, self.group = texts, min(texts, POOLED)
        ids = sample_mixture(corpora, random.Random("crowd"), texts, size + size**2)
        self.ids = torch.from_numpy(ids).to(decoder.device)
        parts = []
        for rows in self.ids.split(4):
            k, v = read_text(decoder, rows)
            parts.append(self._kept(k[:, :, :, size:], v[:, :, :, size:]))
        self.ids, (self.k, self.v) = self.ids[:, size:], (torch.cat(x, 1) for x in zip(*parts, strict=True))

    def _kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of keys and values [L, n, Hkv, K**2, D] of some texts."""
        return k.contiguous(), v.contiguous()

    def gists(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Keys and values [L, Hkv, M, D] of some texts' gists: K of level 1 per text, one of level 2 per text (if
        that is made), and last their mean."""
        chosen = torch.tensor(rng.sample(range(self.texts), self.group), device=self.ids.device)
        levels = self.maker.make(self.decoder, self.ids[chosen], self.k[:, chosen], self.v[:, chosen], 1)
        out = []
        for which in (0, 1):
            parts = [level.kv[which].transpose(1, 2).flatten(2, 3) for level in levels if level.kv is not None]
            out.append(torch.cat((*parts, parts[-1].mean(2, keepdim=True)), dim=2))
        return out[0], out[1]

    def draw(self, rng: random.Random, gists: Sequence[int]) -> list[Entry]:
        """What one sample shows. gists: per block, by level. Entries are of the level above `gists`, which stands for
        the crowd, and number what `gists` of this class gives."""
        size, level = self.maker.size, len(gists) + 1
        of_text = size * gists[0]
        first_of_level2 = self.group * of_text
        top = first_of_level2 + (self.group * gists[1] if len(gists) > 1 else 0)
        units: list[list[int]] = []
        for _ in range(rng.randint(0, RUNS)):
            text = rng.randrange(self.group)
            units.append(list(range(text * of_text, (text + 1) * of_text)))
        for _ in range(round(math.exp(rng.uniform(0.0, math.log(MOST)))) - 1):
            units.append([rng.randrange(first_of_level2, top) if top > first_of_level2 else rng.randrange(of_text)])
        units += [[top]] * rng.randint(0, TOPS)
        rng.shuffle(units)
        return [Entry(level, index) for unit in units for index in unit]
