"""Splices between calls: what stands in the cache afterwards, and what the model makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import CASES, attached, build, by_rank, named, plain_logits, random_ids, run
from torch import Tensor

from mc_kernels import Edit, GistPoolWeights, gist_pool
from mc_kernels.integrations.transformers import WorkingContextCache, insert_embeddings, recompute
from mc_kernels.testing import assert_within_error_rule

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def pooled(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One gist [L, Hkv, 1, D] of entries [L, Hkv, K, D]."""
    layers, heads, size, dim = k.shape
    gist_k, gist_v = gist_pool(k[:, :, None], v[:, :, None], GistPoolWeights.zeros(layers, heads, 1, size, dim))
    return gist_k[:, :, 0], gist_v[:, :, 0]


def collapse(cache: WorkingContextCache, start: int, count: int = 32) -> tuple[Tensor, Tensor]:
    """32 entries to their gist; returns the 32."""
    k, v = cache.read(start, start + count)
    cache.splice([Edit(start, count, 1)], *pooled(k, v))
    return k, v


@pytest.mark.parametrize("case", CASES)
def test_logits_after_a_splice_are_those_of_a_context_from_scratch(case: str) -> None:
    """80 entries, of which 32 become one gist and another 8 go: then tokens in one piece and one by one, against
    transformers' own cache with the same entries at the same ranks."""
    model, ids = build(case), random_ids(1, 12, seed=3)
    with attached(model):
        cache = WorkingContextCache(model, 96)
        run(model, cache, random_ids(1, 80))
        collapse(cache, 5)
        cache.splice([Edit(20, 8, 0)])
        assert cache.lengths == [41]
        exact, plain = (plain_logits(model, cache, ids, dtype) for dtype in (torch.float64, torch.float32))
        got = torch.cat([run(model, cache, part) for part in ids.split([9, 1, 1, 1], dim=1)], dim=1)
    assert_within_error_rule(got, exact, plain)


@pytest.mark.parametrize("case", CASES)
def test_collapse_and_expansion_give_every_bit_back(case: str) -> None:
    model, ids = build(case), random_ids(1, 10, seed=3)
    with attached(model):
        cache = WorkingContextCache(model, 96)
        run(model, cache, random_ids(1, 80))
        before = by_rank(cache)
        exact = plain_logits(model, cache, ids, torch.float64)
        plain = plain_logits(model, cache, ids, torch.float32)
        for start in (7, 40, 0):
            children = collapse(cache, start)
            assert cache.lengths == [49]
            assert not torch.equal(cache.slots(), torch.arange(49)), "slots are not in timeline order"
            cache.splice([Edit(start, 1, 32)], *children)
            assert all(torch.equal(a, b) for a, b in zip(by_rank(cache), before, strict=True))
            assert torch.equal(cache.pos[0, cache.slots()], torch.arange(80))
        got = run(model, cache, ids)
    assert_within_error_rule(got, exact, plain)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_generate_goes_on_over_a_spliced_context(case: str) -> None:
    """Positions of the next tokens are ranks, not places in the text."""
    model, prompt = build(case), random_ids(1, 7, seed=3)
    with attached(model):
        cache = WorkingContextCache(model, 96)
        run(model, cache, random_ids(1, 80))
        collapse(cache, 5)
        expected = prompt
        for _ in range(6):
            logits = plain_logits(model, cache, expected, torch.float64)
            expected = torch.cat((expected, logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(model.generate(prompt, **named(model, cache), **GREEDY), expected)
        assert cache.lengths == [49 + 7 + 5]  # the last token has not been run


@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_rows_of_a_batch_take_different_splices(case: str) -> None:
    model, ids, more = build(case), random_ids(3, 60), random_ids(3, 8, seed=4)
    with attached(model):
        cache, alone = WorkingContextCache(model, 96, batch_size=3), []
        run(model, cache, ids)
        edits = {0: [Edit(4, 32, 1)], 2: [Edit(0, 1, 1), Edit(10, 3, 2)]}
        new = tuple(torch.randn(3, 3, 2, 3, 12, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        for row in range(3):
            single = WorkingContextCache(model, 96)
            run(model, single, ids[row : row + 1])
            count = sum(edit.insert for edit in edits.get(row, []))
            single.splice(edits.get(row, []), *(x[:, row, :, :count] for x in new))
            alone.append(run(model, single, more[row : row + 1]))
        cache.splice(edits, *new)
        assert cache.lengths == [29, 60, 59]
        together = run(model, cache, more)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "gemma", "gemma3", "glm"])
def test_inserted_embeddings_and_recomputation_make_a_context_from_scratch(case: str) -> None:
    """A, X and C are read, then X is replaced by B as vectors and C is run again: as if A, B, C had been read."""
    model, (a, b, c) = build(case), random_ids(2, 60).split([20, 15, 25], dim=1)
    with attached(model):
        whole, cache = (WorkingContextCache(model, 64, batch_size=2) for _ in range(2))
        expected = run(model, whole, torch.cat((a, b, c), dim=1))
        run(model, cache, torch.cat((a, random_ids(2, 4, seed=5), c), dim=1))
        vectors = model.get_input_embeddings()(b).detach()
        inserted = insert_embeddings(model, cache, 20, vectors, remove=4).logits
        assert cache.lengths == [60, 60]
        last = recompute(model, cache, range(35, 60), c).logits
        tolerance = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(inserted, expected[:, 20:35], **tolerance)
        torch.testing.assert_close(last, expected[:, 35:], **tolerance)
        for row in (0, 1):
            for got, want in zip(by_rank(cache, row), by_rank(whole, row), strict=True):
                torch.testing.assert_close(got, want, **tolerance)


def test_crop_reset_and_rows_like_transformers_own_caches() -> None:
    model, ids = build("qwen2"), random_ids(2, 30)
    with attached(model):
        cache = WorkingContextCache(model, 64, batch_size=2)
        run(model, cache, ids)
        kept = [cache.read(0, 24, row=row) for row in (0, 1)]
        collapse_row = {1: [Edit(2, 5, 1)]}
        cache.crop(-6)
        assert cache.lengths == [24, 24]
        k, v = cache.read(2, 3, row=1)
        cache.splice(collapse_row, k, v)
        assert cache.lengths == [24, 20]
        cache.batch_select_indices(torch.tensor([1, 0, 0]))
        assert cache.lengths == [20, 24, 24]
        assert cache.layers[0].keys.shape == (3, 2, 64, 12)
        for row in (1, 2):
            assert all(torch.equal(a, b) for a, b in zip(by_rank(cache, row), kept[0], strict=True))
        cache.reset()
        assert cache.lengths == [0, 0, 0]
        again = WorkingContextCache(model, 64, batch_size=3)
        three = random_ids(3, 8)
        assert torch.equal(run(model, cache, three), run(model, again, three))


def test_bad_splices_change_nothing() -> None:
    model = build("llama")
    with attached(model):
        cache = WorkingContextCache(model, 32, batch_size=2)
        run(model, cache, random_ids(2, 30))
        before, k = cache.data.clone(), torch.zeros(3, 2, 4, 12)
        for error, message, edits, new in (
            (ValueError, "k_new: expected the 1 inserted entries, got None", [Edit(0, 1, 1)], ()),
            (ValueError, "at least M=5", [Edit(0, 5, 5)], (k, k)),
            (ValueError, r"k_new: expected shape \[3, 2, M, 12\]", [Edit(0, 1, 1)], (k[1:], k[1:])),
            (TypeError, "k_new: expected dtype float32", [Edit(0, 1, 1)], (k.half(), k.half())),
            (ValueError, r"edits\[0\]: expected start", [Edit(30, 1, 0)], ()),
            (ValueError, "at most capacity = 32", [Edit(0, 1, 4)], (k, k)),
            (ValueError, "rows 0 to 1, got 2", {2: [Edit(0, 1, 0)]}, ()),
        ):
            with pytest.raises(error, match=message):
                cache.splice(edits, *new)
        for message, call in (
            ("start, stop: expected", lambda: cache.read(3, 31)),
            ("row: expected 0 to 1", lambda: cache.read(0, 1, row=2)),
            ("ranks: expected sorted", lambda: recompute(model, cache, [3, 2], random_ids(2, 2))),
            ("ranks: expected sorted distinct ranks below 30", lambda: recompute(model, cache, [30], random_ids(2, 1))),
            (r"inputs: expected shape \[2, 2\]", lambda: recompute(model, cache, [2, 3], random_ids(2, 3))),
            (r"embeddings: expected shape", lambda: insert_embeddings(model, cache, 0, torch.zeros(2, 1, 5))),
            ("embeddings: expected M >= 1", lambda: insert_embeddings(model, cache, 0, torch.zeros(2, 0, 48))),
            ("tokens_to_remove: expected -30 to 0, got -31", lambda: cache.crop(-31)),
            ("tokens_to_remove: expected -30 to 0, got 4", lambda: cache.crop(4)),
            ("capacity", lambda: WorkingContextCache(model, 0)),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        assert cache.lengths == [30, 30]
        assert torch.equal(cache.data, before)
