"""Errors, saved weights and counted cases of `gist_encode`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mc_kernels import BackendError, GistEncodeWeights, gist_encode
from mc_kernels.gist_encode.cases import CASES, SMALL
from mc_kernels.gist_encode.weights import SHAPES

BY_NAME = {case.name: case for case in SMALL}
GISTS, CLS = BY_NAME["small/gists"], BY_NAME["small/cls"]


def test_bad_arguments_are_named() -> None:
    blocks, w = GISTS.make(torch.float32)
    flat = w.with_tensors

    def swap(**fields: Any) -> GistEncodeWeights:
        return dataclasses.replace(w, **fields)

    bad: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "weights: expected GistEncodeWeights", lambda: gist_encode(blocks, w.mu)),  # type: ignore[arg-type]
        (TypeError, "blocks: expected a tensor", lambda: gist_encode([1.0], w)),  # type: ignore[arg-type]
        (TypeError, "blocks: expected dtype", lambda: gist_encode(blocks.int(), w)),
        (TypeError, "weights: expected device", lambda: gist_encode(blocks, w.to("meta"))),
        (ValueError, "blocks: expected shape", lambda: gist_encode(blocks[0], w)),
        (ValueError, "blocks: expected shape", lambda: gist_encode(blocks[..., :8], w)),
        (ValueError, "blocks: expected 1 <= K <= 128", lambda: gist_encode(blocks[:, :0], w)),
        (ValueError, "blocks: expected 1 <= K <= 8", lambda: gist_encode(blocks, swap(max_block_size=8))),
        (ValueError, "blocks: expected a contiguous", lambda: gist_encode(blocks.mT.contiguous().mT, w)),
        (ValueError, "level: expected at least 1", lambda: gist_encode(blocks, w, level=0)),
        (TypeError, "level: expected an int", lambda: gist_encode(blocks, w, level=1.5)),  # type: ignore[arg-type]
        (TypeError, "level: expected an int", lambda: gist_encode(blocks, w, level=True)),
        (ValueError, "pool: expected one of", lambda: swap(pool="max")),
        (ValueError, "weights.pool_q: expected G=1", lambda: swap(pool="mean")),
        (ValueError, "weights.pool_q: expected G=1", lambda: swap(pool="cls")),
        (ValueError, "n_heads: expected", lambda: swap(n_heads=3)),
        (ValueError, "n_heads: expected", lambda: swap(n_heads=32)),
        (ValueError, "target_rms: expected", lambda: swap(target_rms=0.0)),
        (ValueError, "rope_theta: expected", lambda: swap(rope_theta=float("nan"))),
        (ValueError, "max_block_size: expected", lambda: swap(max_block_size=0)),
        (ValueError, "mu: expected shape", lambda: GistEncodeWeights.init(8, 8, 1, 1, 8, mu=torch.zeros(7))),
        (BackendError, "backend", lambda: gist_encode(blocks, w, backend="abacus")),
    ]
    for i, name in enumerate(SHAPES):
        x = w.tensors()[i]
        wrongs: tuple[tuple[type[Exception], str, Tensor], ...] = (
            (ValueError, "expected shape", torch.cat((x, x), -1)),
            (TypeError, "expected dtype", x.half() if name != "mu" else x.int()),
            (TypeError, "expected device", x.to("meta")),
        )
        for kind, words, wrong in wrongs:
            tensors = [*w.tensors()[:i], wrong, *w.tensors()[i + 1 :]]
            # A lone odd one among the first fields is told by what it disagrees with.
            told = words if name in ("mu", "w_in", "down") else f"weights.{name}: {words}"
            bad.append((kind, told, lambda tensors=tensors: flat(*tensors)))
    for kind, words, fn in bad:
        with pytest.raises(kind) as caught:
            fn()
        assert words in str(caught.value), str(caught.value)


def test_weights_round_trip(tmp_path: Path) -> None:
    blocks, weights = CLS.make(torch.bfloat16)
    weights = dataclasses.replace(weights, rope_theta=500.0, max_block_size=64)
    path = tmp_path / "weights.safetensors"
    save_file(weights.state_dict("gist."), path, weights.metadata("gist."))
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    back = GistEncodeWeights.from_state_dict(load_file(path), metadata, "gist.")
    for a, b in zip(back.tensors(), weights.tensors(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert back.metadata() == weights.metadata()
    assert (back.pool, back.n_heads, back.rope_theta, back.max_block_size, back.target_rms) == ("cls", 2, 500, 64, 0.12)
    assert torch.equal(gist_encode(blocks, back, level=3), gist_encode(blocks, weights, level=3))
    with pytest.raises(ValueError, match="state: expected the entries"):
        GistEncodeWeights.from_state_dict({"gist.mu": back.mu}, metadata, "gist.")
    with pytest.raises(ValueError, match="metadata: expected n_heads"):
        GistEncodeWeights.from_state_dict(back.state_dict(), {})
    with pytest.raises(ValueError, match=r"weights\.qkv: expected shape"):
        GistEncodeWeights.from_state_dict(back.state_dict() | {"qkv": back.attn_out}, back.metadata())


def test_init_draws_the_same_numbers_for_every_dtype() -> None:
    def init(dtype: torch.dtype) -> GistEncodeWeights:
        return GistEncodeWeights.init(8, 8, 1, 2, 8, generator=torch.Generator().manual_seed(5), dtype=dtype)

    assert torch.equal(init(torch.float32).qkv.bfloat16(), init(torch.bfloat16).qkv)
    assert not init(torch.float32).w_out.any()


def test_cases_count_what_they_make() -> None:
    for case in SMALL:
        blocks, weights = case.make(torch.bfloat16)
        made = [blocks, *weights.tensors(), gist_encode(blocks, weights, level=case.level)]
        assert case.bytes(torch.bfloat16) == sum(x.numel() * x.element_size() for x in made)
    assert {f"{m}/N{n}" for m in ("SmolLM2-135M", "Llama-3-8B") for n in (1, 512)} < {case.name for case in CASES}
    assert CASES[3].flops() == 512 * CASES[0].flops() > 0
