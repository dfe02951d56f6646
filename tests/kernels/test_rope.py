"""`RopeSpec` and the rotation itself."""

from __future__ import annotations

import pytest
import torch
from splice_model import DTYPES, plain_turn, same_bits, turn
from torch import Tensor

from mc_kernels import RopeSpec
from mc_kernels.rope import apply_rope, phases, rotate
from mc_kernels.testing import assert_within_error_rule, max_error


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    """One pair, a quarter turn: (1, 2) -> (-2, 1). The two pairings differ in which dimensions meet."""
    quarter = RopeSpec(torch.tensor([torch.pi / 2, 0.0], dtype=torch.float64))
    x = torch.tensor([[1.0, 5.0, 2.0, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(apply_rope(x, torch.tensor([1]), quarter), torch.tensor([[-2.0, 5, 1, 6]]).double())
    inter = RopeSpec(quarter.inv_freq, interleaved=True)
    torch.testing.assert_close(apply_rope(x, torch.tensor([1]), inter), torch.tensor([[-5.0, 1, 2, 6]]).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 12])
def test_against_complex_numbers(rotary_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    spec = RopeSpec.from_theta(1e3, rotary_dim, interleaved=interleaved)
    x, positions = normal(2, 3, 9, 12).to(dtype), torch.arange(9) * 7
    got = apply_rope(x, positions, spec)
    assert got.dtype == dtype
    assert_within_error_rule(got, turn(x, positions, spec.inv_freq, interleaved), plain_turn(x, positions, spec))
    assert same_bits(got[..., rotary_dim:], x[..., rotary_dim:])


def test_rows_with_their_own_frequencies() -> None:
    freq = torch.stack([RopeSpec.from_theta(t, 8).inv_freq for t in (1e2, 1e4)])
    x, positions = normal(2, 3, 5, 8), torch.arange(5) + 3
    got = apply_rope(x, positions, RopeSpec(freq))
    for row in range(2):
        assert same_bits(got[row], apply_rope(x[row], positions, RopeSpec(freq[row])))
    assert max_error(got[0], got[1]) > 0.1


def test_positions_broadcast() -> None:
    spec, x = RopeSpec.from_theta(1e4, 8), normal(2, 3, 5, 8)
    positions = torch.randint(0, 100, (2, 1, 5), generator=torch.Generator().manual_seed(1))
    got = apply_rope(x, positions, spec)
    for b in range(2):
        assert same_bits(got[b], apply_rope(x[b], positions[b, 0], spec))


def test_zero_position_is_exact_and_rotations_add() -> None:
    spec, x = RopeSpec.from_theta(1e4, 8), normal(4, 8)
    assert same_bits(apply_rope(x, torch.zeros(4, dtype=torch.int64), spec), x)
    there = apply_rope(apply_rope(x.double(), torch.arange(4), spec), torch.arange(4) * 5, spec)
    torch.testing.assert_close(there, apply_rope(x.double(), torch.arange(4) * 6, spec))


def test_magnitude() -> None:
    plain = RopeSpec.from_theta(1e4, 8)
    scaled = RopeSpec(plain.inv_freq, attention_scaling=1.5)
    x, positions = normal(4, 8), torch.arange(4)
    torch.testing.assert_close(apply_rope(x, positions, scaled), 1.5 * apply_rope(x, positions, plain))
    partial = RopeSpec(plain.inv_freq[:2], attention_scaling=1.5)
    assert same_bits(apply_rope(x, positions, partial)[:, 4:], 1.5 * x[:, 4:])  # not rotated, and multiplied
    cos, sin = phases(positions, scaled.inv_freq)
    torch.testing.assert_close(rotate(x, cos, sin, False).norm(dim=-1), x.norm(dim=-1))  # a re-rotation has none


@pytest.mark.parametrize("position", [10_000_019, 2**31 + 7, -10_000_019])
def test_phases_of_large_positions(position: int) -> None:
    """Exact to fp32 rounding; the plain fp32 product is off by far more."""
    freq = RopeSpec.from_theta(1e4, 16).inv_freq
    cos, sin = phases(torch.tensor([position]), freq)
    angle = position * freq.double()
    assert cos.dtype == torch.float32
    assert max_error(cos[0], angle.cos()) < 5e-7
    assert max_error(sin[0], angle.sin()) < 5e-7
    assert max_error((torch.tensor(float(position)) * freq).cos(), angle.cos()) > 1e-2


def test_phases_shapes() -> None:
    positions = torch.arange(6).view(2, 3)
    assert phases(positions, torch.ones(4))[0].shape == (2, 3, 4)
    assert phases(positions, torch.ones(5, 4))[0].shape == (5, 2, 3, 4)
    assert phases(positions, torch.ones(4), torch.float64)[1].dtype == torch.float64
    assert phases(positions[:0], torch.ones(4))[0].shape == (0, 3, 4)


def test_from_theta() -> None:
    spec = RopeSpec.from_theta(100.0, 4)
    torch.testing.assert_close(spec.inv_freq, torch.tensor([1.0, 0.1]))
    assert spec.inv_freq.dtype == torch.float32
    assert spec.rotary_dim == 4
    assert RopeSpec.from_theta(100.0, 4, interleaved=True).interleaved
    for bad in (0, -2, 3):
        with pytest.raises(ValueError, match="rotary_dim: expected a positive even number"):
            RopeSpec.from_theta(1e4, bad)


def test_device_copies_are_kept() -> None:
    spec = RopeSpec.from_theta(1e4, 8)
    assert spec.inv_freq_on(torch.device("cpu")) is spec.inv_freq
    copy = spec.inv_freq_on(torch.device("meta"))
    assert copy.device.type == "meta"
    assert spec.inv_freq_on(torch.device("meta")) is copy


def test_refusals() -> None:
    with pytest.raises(TypeError, match="inv_freq: expected a tensor"):
        RopeSpec([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inv_freq: expected dtype float32, float64"):
        RopeSpec(torch.ones(4).half())
    with pytest.raises(ValueError, match="inv_freq: expected shape"):
        RopeSpec(torch.ones(1, 2, 4))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="attention_scaling: expected a positive number"):
            RopeSpec(torch.ones(4), attention_scaling=bad)
        with pytest.raises(ValueError, match="theta: expected a positive number"):
            RopeSpec.from_theta(bad, 8)
    with pytest.raises(ValueError, match="rope: expected at most D/2 = 3 frequencies, got 4"):
        apply_rope(torch.zeros(2, 6), torch.arange(2), RopeSpec(torch.ones(4)))
