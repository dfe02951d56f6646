"""Training of pooled gists of level 2 alone, those of level 1 being what they are.

Among the samples that train both levels a gist of level 2 is rare, and what it says stands beside it in finer detail.
Here each text sample has one in place of the newest K**2 tokens of its past. A text of 2 K**2 tokens is read once, and
the window that is pooled begins at any of its blocks, so that one reading serves many different windows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mc_kernels import gist_pool
from mc_runtime.errors import InputError
from mc_runtime.model.decoder import Decoder

from .corpus import Corpus, sample_mixture
from .gist_kinds import LevelGists
from .gist_options import LOGITS, GistTaskOptions
from .gist_questions import QuestionSource
from .gist_task import GistTask
from .layouts import Entry
from .level2_crowd import Level2Crowd
from .pooled_maker import PooledMaker, pool_levels

# Samples of a text that was read.
WINDOWS = 16
# Share of them with gists of level 1 for what stands before the window; the others begin with the sink alone.
PRECEDED = 0.5


class Level2Task(GistTask):
    """The loss of gists of level 2 on texts (see the module) and on questions (as of both levels). Level 1 must be
    frozen; at packed positions only."""

    maker: PooledMaker

    def __init__(
        self,
        decoder: Decoder,
        corpora: Sequence[Corpus],
        maker: PooledMaker,
        options: GistTaskOptions | None = None,
        questions: QuestionSource | None = None,
    ) -> None:
        super().__init__(decoder, corpora, maker, options, questions=questions)
        o = self.options
        if o.reconstruct or o.contrast or any(o.curriculum) or o.objective != LOGITS:
            raise InputError(
                f"train_levels: level 2 alone is trained by objective {LOGITS}, without reconstruction, contrast and "
                "curriculum"
            )

    @cached_property
    def crowd(self) -> Level2Crowd:
        """The same texts for the same corpora."""
        return Level2Crowd(self.decoder, self.corpora, self.maker, self.options.crowd)

    def _text_loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        o, size = self.options, self.size
        far = 2 * size**2
        batch = max(1, o.tokens // (far + o.near))
        ids = torch.from_numpy(sample_mixture(self.corpora, rng, batch, far + o.near)).to(self.decoder.device)
        k, v, teacher = self.read(ids)
        assert k is not None
        assert v is not None
        starts = [(row, rng.randint(0, size)) for row in range(batch) for _ in range(WINDOWS)]
        below, (k2, v2) = self._pooled(k, v, starts)
        gists = self.per_block([below])
        of_window = k2.shape[2] // len(starts)
        layouts = []
        for i, (_, start) in enumerate(starts):
            before = [Entry(1, j) for j in range(start * gists[0])] if rng.random() < PRECEDED else []
            own = [Entry(2, i * of_window + g) for g in range(of_window)]
            layouts.append([Entry(0, 0), *before, *own])
        if o.crowd and rng.random() < o.crowded:
            # Its entries count as the windows' gists do, behind them.
            k_crowd, v_crowd = self.crowd.gists(rng)
            for layout in layouts:
                drawn = self.crowd.draw(rng, self.maker.gists)
                layout[1:1] = [Entry(2, k2.shape[2] + entry.index) for entry in drawn]
            k2, v2 = torch.cat((k2, k_crowd), dim=2), torch.cat((v2, v_crowd), dim=2)
        samples = [(row, (start + size) * size) for row, start in starts]
        hidden = self.run(ids, k, v, [below], samples, layouts, [True] * len(samples), o.near, crowd=(k2, v2))
        loss, figures = self._main_loss(ids, teacher, samples, hidden)
        return loss, {"loss": float(loss.detach()), **{name: float(x.detach()) for name, x in figures.items()}}

    def _pooled(self, k: Tensor, v: Tensor, starts: list[tuple[int, int]]) -> tuple[LevelGists, tuple[Tensor, Tensor]]:
        """k, v [L, B, Hkv, N, D] -> the gists of level 1 of all blocks, and keys and values [L, Hkv, windows * G, D] of
        the windows that begin at (row, block)."""
        size, (first, second) = self.size, self.maker.weights()
        with torch.no_grad():
            ((k1, v1),) = pool_levels(k, v, [first], size)
            spans = [slice(start * first.n_gists, (start + size) * first.n_gists) for _, start in starts]
            rows = [row for row, _ in starts]
            children = [
                torch.stack([x[:, row, :, span] for row, span in zip(rows, spans, strict=True)], dim=2)
                for x in (k1, v1)
            ]  # [L, Hkv, windows, K * G, D]
        k2, v2 = gist_pool(children[0], children[1], second)
        return LevelGists(size // first.n_gists, kv=(k1, v1)), (k2.flatten(2, 3), v2.flatten(2, 3))
