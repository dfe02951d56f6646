"""Weights of the nets go to a device or a dtype as tensors do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mc_kernels import GistEncodeWeights, GistPoolWeights, LensScoreWeights
from mc_kernels.gist_encode.cases import SMALL as ENCODE
from mc_kernels.lens_score.cases import SMALL as SCORE

Weights = GistPoolWeights | GistEncodeWeights | LensScoreWeights


@pytest.fixture(params=["gist_pool", "gist_encode", "lens_score"])
def weights(request: pytest.FixtureRequest) -> Weights:
    if request.param == "gist_pool":
        return GistPoolWeights.zeros(2, 3, 1, 4, 8)
    return (ENCODE if request.param == "gist_encode" else SCORE)[0].untrained()


@pytest.mark.parametrize(
    ("args", "kwargs", "dtype", "device"),
    [
        ((torch.bfloat16,), {}, torch.bfloat16, "cpu"), (("meta",), {}, torch.float32, "meta"),
        (("meta", torch.float16), {}, torch.float16, "meta"), ((), {"dtype": torch.float16}, torch.float16, "cpu"),
        ((), {"device": torch.device("meta")}, torch.float32, "meta"),
    ],
)  # fmt: skip
def test_as_a_tensor_goes(
    weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    moved = weights.to(*args, **kwargs)
    assert type(moved) is type(weights)
    assert all(x.dtype is dtype and x.device.type == device for x in moved.tensors())


def test_what_fits_is_shared(weights: Weights) -> None:
    for a, b in zip(weights.to("cpu", torch.float32).tensors(), weights.tensors(), strict=True):
        assert a is b
