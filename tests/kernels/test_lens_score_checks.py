"""Errors, saved weights, counted cases and the signed fold of `lens_score`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mc_kernels import BackendError, LensScoreWeights, lens_score, signed_score
from mc_kernels.lens_score.cases import CASES, SMALL

BY_NAME = {case.name: case for case in SMALL}
ONE, TWO = BY_NAME["small/one-pass"], BY_NAME["small/two-passes"]


def test_signed_score() -> None:
    scores = torch.tensor([[0.5, 0.2], [0.0, 0.0], [0.0, -0.3], [0.1, -0.4], [-0.2, 0.3]])
    assert torch.equal(signed_score(scores), torch.tensor([0.5, 0.0, -0.3, -0.4, 0.0]))
    legal = torch.tensor([[True, True], [False, False], [False, True], [True, False], [True, True]])
    priced = signed_score(scores, legal, price=0.25)
    assert torch.allclose(priced, torch.tensor([0.25, 0.0, -0.55, 0.0, 0.0]))
    assert torch.allclose(signed_score(scores, price=0.4)[1:2], torch.tensor([-0.4]))
    assert signed_score(scores[:0]).shape == (0,)
    assert torch.autograd.gradcheck(lambda s: signed_score(s, legal, price=0.25), scores.double().requires_grad_())


def test_bad_arguments_are_named() -> None:
    entries, features, queries, w, legal = ONE.make(torch.float32)

    def score(**given: Any) -> Tensor:
        defaults = {"entries": entries, "features": features, "queries": queries, "weights": w, "legal": legal}
        return lens_score(**{**defaults, **given})

    def swap(**fields: Any) -> LensScoreWeights:
        return dataclasses.replace(w, **fields)

    bad: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "weights: expected LensScoreWeights", lambda: score(weights=w.w_in)),
        (TypeError, "entries: expected a tensor", lambda: score(entries=None)),
        (TypeError, "entries: expected dtype", lambda: score(entries=entries.int())),
        (TypeError, "features: expected dtype float32", lambda: score(features=features.half())),
        (TypeError, "queries: expected dtype float32 as entries", lambda: score(queries=queries.half())),
        (TypeError, "legal: expected dtype bool", lambda: score(legal=legal.int())),
        (TypeError, "features: expected device", lambda: score(features=features.to("meta"))),
        (TypeError, "legal: expected device", lambda: score(legal=legal.to("meta"))),
        (TypeError, "weights: expected device", lambda: score(weights=w.to("meta"))),
        (ValueError, "entries: expected shape", lambda: score(entries=entries[:, :8])),
        (ValueError, "features: expected shape", lambda: score(features=features[1:])),
        (ValueError, "features: expected shape", lambda: score(features=features[:, 1:])),
        (ValueError, "queries: expected shape", lambda: score(queries=queries[0])),
        (ValueError, "legal: expected shape", lambda: score(legal=legal[:, 0])),
        (ValueError, "queries: expected 1 <= Q <= 16", lambda: score(queries=queries[:0])),
        (ValueError, "queries: expected 1 <= Q <= 16", lambda: score(queries=queries.repeat(3, 1))),
        (ValueError, "entries: expected a contiguous", lambda: score(entries=entries.T.contiguous().T)),
        (ValueError, "features: expected a contiguous", lambda: score(features=features.T.contiguous().T)),
        (ValueError, "queries: expected a contiguous", lambda: score(queries=queries.T.contiguous().T)),
        (BackendError, "backend", lambda: score(backend="abacus")),
        (ValueError, "n_heads: expected", lambda: swap(n_heads=3)),
        (ValueError, "n_heads: expected", lambda: swap(n_heads=0)),
        (ValueError, "weights.direct: expected at most 16", lambda: swap(direct=torch.zeros(17, 48))),
        (ValueError, "weights.head_in: expected at least", lambda: swap(head_in=w.head_in[:, :20])),
        (TypeError, "weights.read_k: expected dtype", lambda: swap(read_k=w.read_k.half())),
        (TypeError, "weights.head_out: expected device", lambda: swap(head_out=w.head_out.to("meta"))),
        (ValueError, "weights.score_q: expected shape", lambda: swap(score_q=w.score_q[:, :9])),
        (ValueError, "weights.mlp_gate_up: expected shape", lambda: swap(mlp_gate_up=w.mlp_gate_up[:, :9])),
        (ValueError, "weights.head_out: expected shape", lambda: swap(head_out=w.head_out[:1])),
        (ValueError, "weights: expected P >= 1", lambda: LensScoreWeights.init(8, 2, n_passes=0)),
        (TypeError, "scores: expected a tensor", lambda: signed_score(0.5)),  # type: ignore[arg-type]
        (ValueError, "scores: expected shape", lambda: signed_score(entries)),
        (ValueError, "price: expected", lambda: signed_score(torch.zeros(3, 2), price=math.inf)),
        (ValueError, "legal: expected shape", lambda: signed_score(torch.zeros(3, 2), legal)),
    ]
    for kind, words, fn in bad:
        with pytest.raises(kind) as caught:
            fn()
        assert words in str(caught.value), str(caught.value)


def test_weights_round_trip(tmp_path: Path) -> None:
    entries, features, queries, weights, legal = TWO.make(torch.bfloat16)
    path = tmp_path / "weights.safetensors"
    save_file(weights.state_dict("lens."), path, weights.metadata("lens."))
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    back = LensScoreWeights.from_state_dict(load_file(path), metadata, "lens.")
    for a, b in zip(back.tensors(), weights.tensors(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert (back.n_heads, back.n_passes, back.n_features, back.width, back.embed_dim) == (3, 2, 3, 24, 33)
    expected = lens_score(entries, features, queries, weights, legal=legal)
    assert torch.equal(lens_score(entries, features, queries, back, legal=legal), expected)
    with pytest.raises(ValueError, match="state: expected the entries"):
        LensScoreWeights.from_state_dict({"lens.w_in": back.w_in}, metadata, "lens.")
    with pytest.raises(ValueError, match="metadata: expected n_heads"):
        LensScoreWeights.from_state_dict(back.state_dict(), {})
    with pytest.raises(ValueError, match=r"weights\.read_q: expected shape"):
        LensScoreWeights.from_state_dict(back.state_dict() | {"read_q": back.read_k}, back.metadata())


def test_cases_count_what_they_make() -> None:
    for case in SMALL:
        entries, features, queries, weights, legal = case.make(torch.bfloat16)
        made = [*[entries] * (case.n_passes + 1), features, queries, *weights.tensors(), legal]
        made.append(lens_score(entries, features, queries, weights, legal=legal, backend="ref"))
        assert case.bytes(torch.bfloat16) == sum(x.numel() * x.element_size() for x in made)
    assert {f"{m}/N{n}k" for m in ("SmolLM2-135M", "Llama-3-8B") for n in (2, 8, 32)} < {case.name for case in CASES}
    assert CASES[2].flops() > CASES[1].flops() > CASES[0].flops() > 0
