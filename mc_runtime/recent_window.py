"""The rival that everybody has: the same model with a plain window over the newest tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from .kv_cache import KVCache
from .model import LoadedModel
from .sampling import Sampler, SamplingParams
from .stats import TurnStats


class RecentWindow:
    """Answers from the first tokens of the history (system prompt, attention sink) and the newest ones that fit.

    head: tokens kept at the start. history: all tokens so far, the head included; turns are appended to it. window:
    tokens that the model may see at any time, the answer included.
    """

    def __init__(self, model: LoadedModel, head: Sequence[int], history: Sequence[int], window: int) -> None:
        self.model, self.head, self.history, self.window = model, list(head), list(history), window
        self.turns: list[TurnStats] = []
        decoder = model.decoder
        self._cache = KVCache.allocate(model.config, window, dtype=decoder.dtype, device=decoder.device)

    @torch.inference_mode()
    def generate(self, prompt: str, params: SamplingParams, *, remember: bool = True) -> Iterator[str]:
        """Stream an answer; the window is read anew for each turn. remember: append the turn to the history."""
        start = time.perf_counter()
        turn = self.model.chat.user_turn_ids(prompt)
        room = self.window - len(self.head) - len(turn) - params.max_new_tokens
        recent = self.history[len(self.head) :][-room:] if room > 0 else []
        ids = [*self.head, *recent, *turn]
        stats = TurnStats(prompt=prompt, prompt_tokens=len(turn))
        self.turns.append(stats)
        tokenizer = self.model.tokenizer
        sampler, text = Sampler(params, tokenizer.vocab_size), tokenizer.stream_decoder()
        self._cache.pos.fill_(-1)
        logits = self._run(ids, 0)
        answer: list[int] = []
        for step in range(params.max_new_tokens):
            token = sampler(logits)
            if step == 0:
                stats.time_to_first_token = time.perf_counter() - start
            if token in self.model.tokenizer.eos_ids:
                break
            before = time.perf_counter()
            logits = self._run([token], len(ids) + len(answer))
            stats.decode.append(time.perf_counter() - before)
            answer.append(token)
            stats.new_tokens += 1
            yield text.push(token)
        yield text.flush()
        if remember:
            self.history += [*turn, *answer, *self.model.chat.assistant_end_ids()]

    def _run(self, ids: Sequence[int], at: int) -> torch.Tensor:
        device = self.model.decoder.device
        slots = torch.arange(at, at + len(ids), device=device)
        self._cache.pos[0, slots] = slots
        x = self.model.decoder.embed(torch.tensor([list(ids)], device=device))
        output = self.model.decoder(x, slots[None], self._cache.writer(slots[None], at + len(ids)), logits=True)
        assert output.logits is not None
        return output.logits[0]
