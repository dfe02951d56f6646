"""What all readers do alike once the context stands: rank candidates and decode greedily up to a line break."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mc_runtime.kv_cache import KVCache
from mc_runtime.model import Decoder, LoadedModel

from .base import Question

# Bytes of copied context that one batch of candidates may take.
RANK_BYTES = 1 << 29


def prompt_ids(model: LoadedModel, question: Question) -> list[int]:
    """The user's turn in the chat format, up to where the model goes on with the answer."""
    return [*model.chat.user_turn_ids(question.prompt), *model.tokenizer.encode(question.opening)]


@torch.inference_mode()
def rank(decoder: Decoder, k: Tensor, v: Tensor, logits: Tensor, candidates: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability, in nats, of each continuation of a context, summed over its tokens.

    k, v: [L, Hkv, N, D] of the context in timeline order, keys unrotated, at positions 0 .. N-1. logits: [vocab] of
    the next token. candidates: token ids, at least one each. The context stays as it is.
    """
    per_row = 2 * k.numel() * k.element_size()
    rows = max(1, RANK_BYTES // max(per_row, 1))
    first = logits.float().log_softmax(-1)
    scores: list[float] = []
    for i in range(0, len(candidates), rows):
        part = candidates[i : i + rows]
        later = _later_scores(decoder, k, v, part)
        scores += [float(first[ids[0]]) + rest for ids, rest in zip(part, later, strict=True)]
    return scores


def _later_scores(decoder: Decoder, k: Tensor, v: Tensor, candidates: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of every token of each candidate after its first."""
    count, used, longest = len(candidates), k.shape[2], max(len(ids) for ids in candidates) - 1
    if longest == 0:
        return [0.0] * count
    device = decoder.device
    cache = KVCache.allocate(decoder.config, used + longest, batch=count, dtype=decoder.dtype, device=device)
    cache.k[:, :, :, :used] = k[:, None]
    cache.v[:, :, :, :used] = v[:, None]
    cache.pos[:, :used] = torch.arange(used, device=device)
    ids = torch.zeros(count, longest, dtype=torch.int64)
    real = torch.zeros(count, longest, dtype=torch.bool)
    for row, candidate in enumerate(candidates):
        ids[row, : len(candidate) - 1] = torch.tensor(list(candidate[:-1]))
        real[row, : len(candidate) - 1] = True
    slots = torch.arange(used, used + longest, device=device).expand(count, longest)
    positions = torch.where(real.to(device), slots, -1)
    cache.pos[:, used:] = positions
    output = decoder(decoder.embed(ids.to(device)), positions, cache.writer(slots, used + longest))
    logs = decoder.logits(output.hidden).float().log_softmax(-1)
    return [
        sum(float(logs[row, at, token]) for at, token in enumerate(candidate[1:]))
        for row, candidate in enumerate(candidates)
    ]


def decode(
    model: LoadedModel, logits: Tensor, step: Callable[[int], Tensor], most: int
) -> tuple[str, list[int], list[int]]:
    """Greedy decoding up to the first line break behind some text, an end token, or `most` tokens.

    step: reads a token and gives the logits [vocab] of the next. Returns the text, the token ids that were read, and
    those at the end that were not because nothing had to follow them.
    """
    ids: list[int] = []
    text = ""
    while len(ids) < most:
        token = int(logits.argmax())
        if token in model.tokenizer.eos_ids:
            break
        longer = model.tokenizer.decode([*ids, token]).lstrip()
        if "\n" in longer:
            return longer.split("\n")[0], ids, []
        ids, text = [*ids, token], longer
        if len(ids) == most:
            return text, ids[:-1], ids[-1:]
        logits = step(token)
    return text, ids, []
