"""The frozen model run over a text, and over pieces of it behind contexts in which blocks of its past stand as gists.

Gists that are keys and values stand in the cache that the pieces run behind. Gists that are input embeddings run with
the piece through the model, and so do the tokens of the context: all of it is computed on what stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mc_runtime.model.decoder import Decoder
from mc_runtime.model.stores import ConcatStore

from .gist_kinds import GistMaker, LevelGists
from .gist_options import GistTaskOptions
from .layouts import Entry, Gathered, gather_layouts, split_entries


class GistRuns:
    """What runs behind the gists of a maker, as the options of its training have it."""

    def __init__(self, decoder: Decoder, maker: GistMaker, options: GistTaskOptions) -> None:
        self.decoder, self.maker, self.options, self.size = decoder, maker, options, maker.size

    def per_block(self, levels: Sequence[LevelGists]) -> tuple[int, ...]:
        """Gists that stand for one block, by level."""
        return tuple(self.size**level // gists.span for level, gists in enumerate(levels, start=1))

    @torch.no_grad()
    def read(self, ids: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """ids [B, N] -> keys (unrotated) and values [L, B, Hkv, N, D] of the layers that the objective runs (None for
        gists that are input embeddings) and their last hidden states [B, N, E]."""
        store = None if self.maker.kind == "embedding" else ConcatStore()
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        stop = self.options.stop_layer
        hidden = self.decoder(self.decoder.embed(ids), positions, store, stop_layer=stop).hidden
        return (None, None, hidden) if store is None else (store.keys, store.values, hidden)

    def run(
        self,
        ids: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        levels: Sequence[LevelGists],
        samples: Sequence[tuple[int, int]],
        layouts: Sequence[Sequence[Entry]],
        packed: Sequence[bool],
        near: int,
        *,
        near_ids: Tensor | None = None,
        crowd: tuple[Tensor, Tensor] | None = None,
        fresh: bool = False,
    ) -> Tensor:
        """Hidden states [n, near, E] of the tokens after each sample's cut, behind its layout.

        samples: (row of ids, cut). k, v as `read` and levels as the maker give them. near_ids: [n, near] what follows
        instead of the text. crowd: keys and values [L, Hkv, M, D] of the entries of the level above `levels`. fresh:
        tokens beyond the first block are run on what stands before them, instead of as they stood in the text.
        """
        cuts = [cut for _, cut in samples]
        where = gather_layouts(layouts, cuts, ids.shape[1], self.size, packed, self.per_block(levels))
        rows = torch.tensor([row for row, _ in samples], device=ids.device)
        index, position = where.index.to(ids.device), where.position.to(ids.device)
        span = torch.arange(near, device=ids.device)
        if near_ids is None:
            near_ids = ids[rows[:, None], torch.tensor(cuts, device=ids.device)[:, None] + span]
        x, at = self.decoder.embed(near_ids), where.start.to(ids.device)[:, None] + span
        stop = self.options.stop_layer
        kv = [level.kv for level in levels if level.kv is not None]
        if k is None or v is None or len(kv) < len(levels):
            vectors = [level.vectors for level in levels if level.vectors is not None]
            source = torch.cat((self.decoder.embed(ids), *vectors), dim=1)  # [B, N + gists, E]
            x, at = torch.cat((source[rows[:, None], index], x), dim=1), torch.cat((position, at), dim=1)
            return self.decoder(x, at, stop_layer=stop).hidden[:, -near:]

        if fresh:
            (run, run_at), (index, position) = split_entries(
                Gathered(index, position, where.start), (index >= self.size) & (index < ids.shape[1])
            )
            x = torch.cat((self.decoder.embed(ids[rows[:, None], run]), x), dim=1)
            at = torch.cat((run_at, at), dim=1)
        if crowd is not None:
            k_crowd, v_crowd = (one[:, None].expand(-1, len(ids), -1, -1, -1) for one in crowd)
            kv = [*kv, (k_crowd, v_crowd)]

        def context(tokens: Tensor, gists: Sequence[Tensor]) -> Tensor:
            source = torch.cat((tokens, *gists), dim=3)  # [L, B, Hkv, N + gists, D]
            return source.permute(1, 3, 0, 2, 4)[rows[:, None], index].permute(2, 0, 3, 1, 4)  # [L, n, Hkv, S, D]

        bias = (index >= ids.shape[1]).float() * self.options.gist_bias if self.options.gist_bias else None
        store = ConcatStore(context(k, [x for x, _ in kv]), context(v, [x for _, x in kv]), position, kv_bias=bias)
        return self.decoder(x, at, store, stop_layer=stop).hidden[:, -near:]
