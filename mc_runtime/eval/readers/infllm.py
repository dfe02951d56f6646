"""InfLLM (Xiao et al. 2024), as far as a frozen model with a small budget allows: per layer, the blocks of stored keys
and values that the present queries match best, beside the sink and the newest tokens.

A block of 128 tokens is known by four of them, those whose keys the queries that follow them match best. A layer's
blocks are those with the largest sum of products, positions left out, of its queries and these keys, over heads and
tokens; they are chosen anew in every forward. Positions are packed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mc_runtime.config import MemoryConfig
from mc_runtime.errors import BudgetError, InputError
from mc_runtime.model import LoadedModel

from .base import History, Opened, Progress, Question, Reply, Tokens, share_covered
from .decoding import decode, prompt_ids, rank
from .windowed import MOST, check_readable, read_windowed, watching_queries

BLOCK, REPRESENTATIVES = 128, 4


class InfLLM:
    name = "block top-k (InfLLM)"
    most: int | None = MOST

    def __init__(self, model: LoadedModel, system: Sequence[int], config: MemoryConfig) -> None:
        self.model, self.system, self.config = model, list(system), config

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        check_readable(self.name, history, remember=remember)
        return OpenedInfLLM(self.model, self.system, self.config, history, progress)


class StoredBlocks:
    """Keys and values of a text, k, v [L, Hkv, N, D], and the representatives [L, Hkv, blocks, r, D] of its blocks."""

    def __init__(self, model: LoadedModel, ids: Sequence[int], first: int, stop: int) -> None:
        """first, stop: the tokens that blocks are made of."""
        c = model.config
        self.first, self.count = first, max(0, stop - first) // BLOCK
        shape = (c.n_layers, c.n_kv_heads, len(ids), c.head_dim)
        self.k = torch.empty(shape, dtype=model.decoder.dtype, device=model.decoder.device)
        self.v = torch.empty_like(self.k)
        self._scores = torch.zeros(c.n_layers, len(ids), device=model.decoder.device)
        self._queries: dict[int, Tensor] = {}

    def see_queries(self, layer: int, q: Tensor) -> None:
        self._queries[layer] = q[0]

    def see_chunk(self, start: int, k: Tensor, v: Tensor) -> None:
        """k, v [L, Hkv, n, D]. Scores each token by the mean query of the chunk's later tokens."""
        stop = start + k.shape[2]
        self.k[:, :, start:stop], self.v[:, :, start:stop] = k, v
        later = torch.arange(k.shape[2], 0, -1, device=k.device)
        for layer, keys in enumerate(k):
            q = _per_kv_head(self._queries[layer], keys.shape[0])  # [Hkv, n, D]
            mean = q.flip(1).cumsum(1).flip(1) / later[:, None]
            self._scores[layer, start:stop] = (mean * keys.float()).sum((0, 2))

    def finish(self) -> None:
        stop = self.first + self.count * BLOCK
        best = self._scores[:, self.first : stop].unflatten(1, (self.count, BLOCK)).topk(REPRESENTATIVES, -1).indices
        at = self.first + torch.arange(self.count, device=best.device)[:, None] * BLOCK + best  # [L, blocks, r]
        rows = at.flatten(1)[:, None, :, None].expand(-1, self.k.shape[1], -1, self.k.shape[3])
        self.representatives = self.k.gather(2, rows).unflatten(2, at.shape[1:])

    def choose(self, layer: int, q: Tensor, most: int) -> Tensor:
        """q [Hq, T, D] -> sorted numbers of the best blocks."""
        summed = _per_kv_head(q, self.k.shape[1]).sum(1)  # [Hkv, D]
        scores = torch.einsum("hd,hbrd->b", summed, self.representatives[layer].float())
        return scores.topk(min(most, self.count)).indices.sort().values


def _per_kv_head(q: Tensor, kv_heads: int) -> Tensor:
    """[Hq, T, D] -> [Hkv, T, D] fp32, summed over the query heads that share a key head."""
    return q.float().unflatten(0, (kv_heads, -1)).sum(1)


class LayerwiseStore:
    """A `KVStore` in which each layer sees past entries of its own, as many in each, and then the turn's."""

    def __init__(self, blocks: StoredBlocks, sink: int, recent: tuple[int, int], most: int) -> None:
        self.blocks, self.most = blocks, most
        self._ends = torch.arange(sink, device=blocks.k.device), torch.arange(*recent, device=blocks.k.device)
        self.past = sink + min(most, blocks.count) * BLOCK + recent[1] - recent[0]
        self.length = 0
        layers = blocks.k.shape[0]
        self.k: list[Tensor | None] = [None] * layers
        self.v: list[Tensor | None] = [None] * layers
        self.chosen: dict[int, Tensor] = {}
        self._entries: dict[int, Tensor] = {}

    def see_queries(self, layer: int, q: Tensor) -> None:
        chosen = self.blocks.choose(layer, q[0], self.most)
        self.chosen[layer] = chosen
        inside = self.blocks.first + chosen[:, None] * BLOCK + torch.arange(BLOCK, device=chosen.device)
        self._entries[layer] = torch.cat((self._ends[0], inside.flatten(), self._ends[1]))

    def begin(self, positions: Tensor) -> None:
        self.length += positions.shape[1]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before_k, before_v = self.k[layer], self.v[layer]
        turn_k = k if before_k is None else torch.cat((before_k, k), 2)
        turn_v = v if before_v is None else torch.cat((before_v, v), 2)
        self.k[layer], self.v[layer] = turn_k, turn_v
        at = self._entries[layer]
        keys = torch.cat((self.blocks.k[layer].index_select(1, at)[None], turn_k), 2)
        values = torch.cat((self.blocks.v[layer].index_select(1, at)[None], turn_v), 2)
        return keys, values, torch.arange(keys.shape[2], device=k.device)[None]

    def whole(self) -> tuple[Tensor, Tensor]:
        """What each layer saw last, the turn included: [L, Hkv, S, D] each."""
        pairs = [(self.blocks.k, self.k), (self.blocks.v, self.v)]
        stacked = []
        for stored, turn in pairs:
            rows = []
            for layer, mine in enumerate(turn):
                assert mine is not None, "something is run before the whole is asked for"
                rows.append(torch.cat((stored[layer].index_select(1, self._entries[layer]), mine[0]), 1))
            stacked.append(torch.stack(rows))
        return stacked[0], stacked[1]


class OpenedInfLLM:
    """The sink is the system prompt; the newest tokens are as many as our reader keeps at full detail."""

    def __init__(
        self,
        model: LoadedModel,
        system: Sequence[int],
        config: MemoryConfig,
        history: History,
        progress: Progress | None,
    ) -> None:
        self.model, self.config, self.sink = model, config, len(system)
        ids = [*system, *(int(i) for i in history.ids)]
        start = max(self.sink, len(ids) - config.recent_tokens)
        self.recent = (start, len(ids))
        self.blocks = StoredBlocks(model, ids, self.sink, start)
        with watching_queries(model.decoder, self.blocks.see_queries):
            read_windowed(
                model.decoder,
                ids,
                sink=self.sink,
                window=config.ingest_window,
                chunk=config.ingest_chunk,
                see_chunk=self.blocks.see_chunk,
                progress=progress,
            )
        self.blocks.finish()

    @torch.inference_mode()
    def ask(self, question: Question) -> Reply:
        start = time.perf_counter()
        model, decoder = self.model, self.model.decoder
        turn = prompt_ids(model, question)
        fixed = self.sink + (self.recent[1] - self.recent[0]) + len(turn) + question.max_new_tokens
        if fixed > self.config.budget:
            raise BudgetError(f"budget: the question needs {fixed} slots, the budget is {self.config.budget}")
        store = LayerwiseStore(self.blocks, self.sink, self.recent, (self.config.budget - fixed) // BLOCK)

        def run(ids: Sequence[int]) -> Tensor:
            at = store.past + store.length
            positions = torch.arange(at, at + len(ids), device=decoder.device)[None]
            x = decoder.embed(torch.tensor([list(ids)], device=decoder.device))
            with watching_queries(decoder, store.see_queries):
                return decoder.logits(decoder(x, positions, store).hidden[0, -1])

        logits = run(turn)
        seen = self._seen(store, question)
        encoded = [model.tokenizer.encode(c) for c in question.candidates]
        logprobs = rank(decoder, *store.whole(), logits, encoded)
        text, _, _ = decode(model, logits, lambda token: run([token]), question.max_new_tokens)
        slots, refocus = store.past + store.length, len(turn) if seen == 1 else None
        return Reply(text, tuple(logprobs), slots, 0, time.perf_counter() - start, seen, refocus)

    def _seen(self, store: LayerwiseStore, question: Question) -> float:
        """Mean over layers."""
        evidence = [(self.sink + span.start, self.sink + span.stop) for span in question.evidence]
        first, shares = self.blocks.first, []
        for chosen in store.chosen.values():
            shown = [(first + b * BLOCK, first + (b + 1) * BLOCK) for b in chosen.tolist()]
            shares.append(share_covered(evidence, [*shown, self.recent]))
        return sum(shares) / len(shares)

    def tell(self, ids: Tokens) -> int:
        raise InputError("tell: expected a reader that remembers, got one opened for single questions")

    def close(self) -> None:
        pass
