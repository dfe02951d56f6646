"""Rivals that retrieve: by words, or by keys, once or anew as the text goes on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mc_kernels.rope import apply_rope
from mc_runtime.eval.pasts import Past, attention_of, hidden_after, layer_queries, read_past
from mc_runtime.eval.rivals.bm25 import BM25Append, chunk_scores
from mc_runtime.eval.rivals.infllm import InfLLM
from mc_runtime.eval.rivals.memorizing import Memorizing
from mc_runtime.eval.rivals.retro import Retro
from mc_runtime.model import LoadedModel

FAR, RECENT, TARGETS, BATCH = 64, 8, 12, 3
FOLLOW = RECENT + TARGETS


@pytest.fixture(scope="module")
def past(model: LoadedModel) -> Past:
    ids = torch.randint(0, 200, (BATCH, FAR + FOLLOW), generator=torch.Generator().manual_seed(0))
    return read_past(model.decoder, ids, FAR, RECENT)


def test_appending_everything_is_the_full_context(past: Past, model: LoadedModel) -> None:
    hidden = BM25Append(model.tokenizer, 16).follow(past, FAR, True)
    torch.testing.assert_close(hidden, past.hidden, rtol=1e-4, atol=1e-4)


def test_received_is_a_mean_of_logits(past: Past) -> None:
    layer, row, span, token = 2, 1, 3, 17
    q = layer_queries(attention_of(past.decoder, layer), past.inputs[layer])
    at = torch.arange(FAR + RECENT)
    q, k = (apply_rope(x.float(), at, past.decoder.rope) for x in (q, past.k_all[layer]))
    logits = q[row, :, token + 1 : token + 1 + span] @ k[row, :, token].repeat_interleave(2, 0)[..., None]
    expected = logits[..., 0].mean(-1).unflatten(0, (2, 2)).mean(1) / math.sqrt(8)
    torch.testing.assert_close(past.received(span)[layer, row, :, token], expected, rtol=1e-4, atol=1e-4)


def test_knn_of_all_is_full_attention_of_that_layer(past: Past) -> None:
    """Against one softmax over all stored keys, unrotated, and the rotated window, written out."""
    decoder, layer = past.decoder, 1
    attention = attention_of(decoder, layer)
    taken: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _m, x: taken.append(x[0])) for m in (attention, attention.out)]
    try:
        with torch.no_grad():
            Memorizing(layer, k=10**6).follow(past, FAR, True)
    finally:
        for hook in hooks:
            hook.remove()
    x, got = taken[0], taken[-1]
    heads = attention.qkv(x).unflatten(-1, (-1, 8)).transpose(1, 2)
    q, k, v = heads.split((4, 2, 2), dim=1)
    at = torch.arange(1, FOLLOW + 1)
    near_k = torch.cat((past.k[layer, :, :, :1], apply_rope(k, at, decoder.rope)), 2)  # rotation at 0 is none
    near_v = torch.cat((past.v[layer, :, :, :1], v), 2)
    far_k, far_v, near_k, near_v = (
        z.repeat_interleave(2, 1) for z in (past.k[layer, :, :, 1:], past.v[layer, :, :, 1:], near_k, near_v)
    )
    near = apply_rope(q, at, decoder.rope) @ near_k.transpose(-1, -2)
    ahead = torch.arange(FOLLOW + 1)[None, :] > at[:, None]
    logits = torch.cat((q @ far_k.transpose(-1, -2), near.masked_fill(ahead, float("-inf"))), -1) / math.sqrt(8)
    out = torch.softmax(logits, -1) @ torch.cat((far_v, near_v), 2)
    torch.testing.assert_close(got, out.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-4)


def test_knn_leaves_other_layers_alone(past: Past) -> None:
    """Without a neighbour, it is the window alone."""
    nothing = Memorizing(layer=99).follow(past, 4, True)
    torch.testing.assert_close(nothing, hidden_after(past, None), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(Memorizing().follow(past, 4, True), nothing, atol=1e-2)


def test_retro_with_one_retrieval_is_bm25_append(past: Past, model: LoadedModel) -> None:
    append = BM25Append(model.tokenizer, 16).follow(past, 20, True)
    once = Retro(model.tokenizer, every=FOLLOW, chunk=16).follow(past, 20, True)
    torch.testing.assert_close(once, append, rtol=1e-5, atol=1e-5)


def test_retro_retrieves_for_what_has_come_since(model: LoadedModel) -> None:
    """The first piece sees what the recent tokens ask for, the second what the tokens after them do."""

    def ids(text: str, length: int) -> list[int]:
        return model.tokenizer.encode(text.ljust(length, "."))

    far = ids("zebra grazing", 16) + ids("copper wires", 16) + ids("velvet gown", 16) + ids("umbrella", 16)
    window = torch.tensor([far + ids("zebra ", 8) + ids("copper ", 8) + ids("other", 8)])
    past = read_past(model.decoder, window, 64, 8)
    append = BM25Append(model.tokenizer, 16)
    hidden = Retro(model.tokenizer, every=8, chunk=16).follow(past, 15, True)
    first = append.behind(past, torch.arange(1, 16)[None], past.follow[:, :16], True)
    second = append.behind(past, torch.arange(16, 31)[None], past.follow, True)
    torch.testing.assert_close(hidden[:, :15], first[:, :15], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden[:, 15:], second[:, 15:], rtol=1e-4, atol=1e-4)


def test_bm25_fills_the_budget_in_order(model: LoadedModel) -> None:
    far = "".join(text.ljust(16) for text in ("a zebra, a pen", "copper wire", "zebra zebra", "marble"))
    ids = torch.tensor([model.tokenizer.encode(far + "zebra   " + "yyyy")])
    past = read_past(model.decoder, ids, 64, 8)
    places = BM25Append(model.tokenizer, 16).choose(past, 20, past.follow[:, :8])[0].tolist()
    assert places == [*range(1, 5), *range(32, 48)], "the best chunk whole, of the next one what fits"
    none = BM25Append(model.tokenizer, 16).choose(past, 20, past.follow[:, 8:])[0].tolist()
    assert none == [*range(32, 36), *range(48, 64)], "no match: the latest"
    scores = chunk_scores(["a cat sat", "dogs bark", "cats"], "the cats")
    assert scores[2] > scores[0] > scores[1] == 0
    assert not chunk_scores(["", ""], "x").any()


def test_infllm_takes_the_blocks_that_match(past: Past) -> None:
    rival = InfLLM(block=4, local=4)
    queries = torch.randn(BATCH, 4, FOLLOW, 8, generator=torch.Generator().manual_seed(2))
    choice = rival.choose(past, 1, queries, torch.arange(9, 9 + FOLLOW), 8, True)
    assert choice.index.shape == (BATCH, FOLLOW, 1, 8)
    assert (choice.index[:, :RECENT] == choice.index[:, :1]).all(), "the prompt is one chunk"
    votes = past.received(4)[1, 0]
    votes[:, 0] = float("-inf")
    q, worth = queries[0, :, RECENT + 2].unflatten(0, (2, 2)).sum(1), []
    for block in range(FAR // 4):
        span = slice(4 * block, 4 * block + 4)
        keys = past.k[1, 0, :, span][votes[:, span].isfinite()].view(2, -1, 8)
        worth.append(float((q * keys.mean(1)).sum()))
    best = sorted(sorted(range(len(worth)), key=lambda i: -worth[i])[:2])
    assert choice.index[0, RECENT + 2, 0].tolist() == [4 * b + i for b in best for i in range(4)]
