"""What `mc_kernels.array` refuses, before it writes, and how it says so."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mc_kernels import array, extension, native
from mc_kernels.array import Edit, GistPoolWeights, PageTable, RopeSpec, SplicePlan
from mc_kernels.array.views import array as array_of
from mc_kernels.array.views import empty, hand_over

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")


def numbers(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class OnGpu:
    """What an array of CuPy's says of itself; its memory must not be asked for."""

    shape = (2, 1, 6, 4)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("exported before its device was looked at")


class BeforeDlpack1:
    """An array whose library does not know of versions: the capsule cannot say that it may be written."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.x.__dlpack__()


class NotExported(BeforeDlpack1):
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("quantised")


PLAN = SplicePlan.from_edits(5, [Edit(1, 2, 1)], capacity=6)


def frozen(x: Any) -> Any:
    x.flags.writeable = False
    return x


REFUSED: dict[str, tuple[dict[str, Callable[[dict[str, Any]], Any]], type[Exception], str]] = {
    "a list": ({"k": lambda a: a["k"].tolist()}, TypeError, "k: expected an array (NumPy's, or one with __dlpack__)"),
    "on a GPU": (
        {"v": lambda a: OnGpu()}, TypeError,
        "v: expected an array in CPU memory, or CuPy's on a CUDA device, got OnGpu on cuda:1 (cupy.from_dlpack shares",
    ),
    "fp64": ({"k": lambda a: a["k"].astype(np.float64)}, TypeError, "k: expected dtype float32, bfloat16, float16"),
    "another dtype": ({"v": lambda a: a["v"].astype(np.float16)}, TypeError, "v: expected dtype float32 as k, got"),
    "big-endian": ({"k": lambda a: a["k"].astype(">f4")}, TypeError, "k: expected elements in the machine's byte"),
    "read-only": ({"k": lambda a: frozen(a["k"])}, TypeError, "k: expected an array that may be written, got float32"),
    "unversioned": ({"v": lambda a: BeforeDlpack1(a["v"])}, TypeError, "(DLPack before version 1)"),
    "not exported": (
        {"k": lambda a: NotExported(a["k"])}, TypeError, "k: expected an array that DLPack can share, got NotExported",
    ),
    "with a gradient": (
        {"k": lambda a: torch.from_numpy(a["k"]).requires_grad_()}, TypeError, "k: expected an array that DLPack can",
    ),
    "shape": ({"v": lambda a: a["v"][:, :, :5]}, ValueError, "v: expected shape [R, Hkv, S, D] with R=2, Hkv"),
    "new shape": ({"k_new": lambda a: a["k_new"][:1]}, ValueError, "k_new: expected shape [R, Hkv, M, D]"),
    "last stride": (
        {"k": lambda a: numbers(2, 1, 4, 6).transpose(0, 1, 3, 2)}, ValueError, "k: expected a contiguous last dim",
    ),
    "negative stride": ({"k": lambda a: a["k"][:, :, ::-1]}, ValueError, "k: expected strides >= 0"),
    "overlap": (
        {"k": lambda a: np.lib.stride_tricks.as_strided(numbers(99), (2, 1, 6, 4), (96, 96, 8, 4))}, ValueError,
        "k: expected a view without overlap",
    ),
    "v is k": ({"v": lambda a: a["k"]}, ValueError, "v: expected memory apart from k, got views that share elements"),
    "new in k": ({"k_new": lambda a: a["k"][:, :, :1]}, ValueError, "k_new: expected memory apart from k"),
    "torch's plan": (
        {"plan": lambda a: __import__("mc_kernels").SplicePlan.from_edits(5, [], capacity=6)}, TypeError,
        "expected a SplicePlan, got a mc_kernels.SplicePlan",
    ),
    "capacity": (
        {"plan": lambda a: SplicePlan.from_edits(5, [Edit(1, 2, 1)], capacity=7)}, ValueError, "plan: expected cap",
    ),
    "rope": ({"rope": lambda a: 1e4}, TypeError, "rope: expected a mc_kernels.array.RopeSpec or None, got float"),
    "rope's width": ({"rope": lambda a: RopeSpec.from_theta(1e4, 6)}, ValueError, "rope: expected at most D/2 = 2"),
    "rows": ({"rows": lambda a: [0, 1]}, ValueError, "rows: expected indices in -1..0, got 0..1"),
    "row dtype": ({"rows": lambda a: [0.0, 0.0]}, TypeError, "rows: expected integers, got dtype float64"),
    "positions alone": ({"positions": lambda a: range(5)}, ValueError, "positions: expected None without rope"),
    "positions": (
        {"rope": lambda a: RopeSpec.from_theta(1e4, 4), "new_positions": lambda a: np.arange(5)}, ValueError,
        "new_positions: expected shape [4], got shape [5]",
    ),
    "pages": ({"pages": lambda a: [[0]]}, TypeError, "pages: expected a mc_kernels.array.PageTable, got list"),
    "page": (
        {"pages": lambda a: PageTable([[9]], 6), "k_new": lambda a: a["k_new"][:1], "v_new": lambda a: a["v_new"][:1]},
        ValueError, "pages: expected table[0, 0] in 0..1, got 9",
    ),
    "threads": ({"n_threads": lambda a: -1}, ValueError, "n_threads: expected at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_splice_is_refused_before_anything_is_written(name: str) -> None:
    args: dict[str, Any] = {
        "k": numbers(2, 1, 6, 4), "v": numbers(2, 1, 6, 4), "k_new": numbers(2, 1, 1, 4), "v_new": numbers(2, 1, 1, 4),
        "plan": PLAN,
    }  # fmt: skip
    before = {name: x.copy() for name, x in args.items() if name != "plan"}
    changes, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        array.kv_splice_(**(args | {n: change(args) for n, change in changes.items()}))
    assert words in str(caught.value)
    assert all(np.array_equal(args[n], x) for n, x in before.items())


def test_the_call_that_the_refusals_change_is_accepted() -> None:
    k, v, new = numbers(2, 1, 6, 4), numbers(2, 1, 6, 4, seed=1), numbers(2, 1, 1, 4)
    old = v.copy()
    array.kv_splice_(k, v, new, new, PLAN)
    assert np.array_equal(v[:, :, 2:4], old[:, :, 3:5])
    assert np.array_equal(v[:, :, 1:2], new)


def test_jax_arrays_are_read_and_not_written() -> None:
    jnp = pytest.importorskip("jax.numpy")
    k, v, new = (jnp.asarray(numbers(*shape)) for shape in ((2, 1, 6, 4), (2, 1, 6, 4), (2, 1, 1, 4)))
    with pytest.raises(TypeError, match=r"k: expected an array that may be written, .* JAX's arrays are immutable"):
        array.kv_splice_(k, v, new, new, PLAN)
    mine = np.array(k), np.array(v)
    array.kv_splice_(*mine, new, new, PLAN)  # what is inserted is only read
    assert np.array_equal(mine[1][:, :, 1:2], np.asarray(new))


def test_jax_tracers_are_refused() -> None:
    jax = pytest.importorskip("jax")
    weights = GistPoolWeights.zeros(1, 1, 1, 2, 4)
    with pytest.raises(TypeError, match="k: expected an array"):
        jax.jit(lambda x: array.gist_pool(x, x, weights))(numbers(1, 1, 1, 2, 4))


def weights() -> GistPoolWeights:
    return GistPoolWeights.zeros(2, 1, 1, 2, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"slots": [[0], [0]]}, ValueError, "slots: expected each slot once, got 0 twice"),
        ({"slots": [[0], [6]]}, ValueError, "slots: expected slots in 0..5, got 0..6"),
        ({"slots": [[0]]}, ValueError, "slots: expected one row for each of 2 blocks, got 1"),
        ({"children": [[0, 1, 2]]}, ValueError, "children: expected shape [n, 2], got shape [1, 3]"),
        ({"moves": [[4, 5, 2]]}, ValueError, "moves[0]: expected slots within 6, got 4 to 5, 2 of them"),
        ({"moves": [4, 5, 2]}, ValueError, "moves: expected shape [*, 3], got shape [3]"),
        ({"weights": None}, TypeError, "weights: expected a mc_kernels.array.GistPoolWeights, got NoneType"),
        ({"k": frozen(numbers(2, 1, 6, 4))}, TypeError, "k: expected an array that may be written"),
        ({"v": numbers(2, 1, 7, 4)}, ValueError, "v: expected shape [R, Hkv, S, D] with Hkv=1, D=4, R=2, S=6"),
    ],
)
def test_a_collapse_is_refused_before_anything_is_written(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    args: dict[str, Any] = {"k": numbers(2, 1, 6, 4), "v": numbers(2, 1, 6, 4, seed=1), "weights": weights()}
    args |= {"children": [[0, 1], [2, 3]], "slots": [[0], [1]]}
    before = args["k"].copy()
    with pytest.raises(error) as caught:
        array.collapse_(**(args | change))
    assert words in str(caught.value)
    assert np.array_equal(args["k"], before)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: RopeSpec(numbers(2, 2, 2)), ValueError, "inv_freq: expected shape [D_rot/2] or [R, D_rot/2]"),
        (lambda: RopeSpec([1.0]), TypeError, "inv_freq: expected an array"),
        (lambda: RopeSpec(numbers(2), attention_scaling=0.0), ValueError, "attention_scaling: expected a positive"),
        (lambda: RopeSpec.from_theta(1e4, 3), ValueError, "rotary_dim: expected a positive even number, got 3"),
        (lambda: PageTable([0], 4), ValueError, "table: expected shape [B, max_pages], got shape [1]"),
        (lambda: RopeSpec.from_theta(-1.0, 4), ValueError, "theta: expected a positive number, got -1.0"),
        (lambda: PageTable([[0]], 2.0), TypeError, "page_size: expected an int, got float 2.0"),
        (lambda: PageTable([[0]], 0), ValueError, "page_size: expected at least 1, got 0"),
        (lambda: PageTable([[0.5]], 1), TypeError, "table: expected integers, got dtype float64"),
        (lambda: GistPoolWeights(*([numbers(2, 1, 1, 8)] * 4)), ValueError, "weights.m: expected shape"),
        (lambda: array.GistEncodeWeights({}, n_heads=1, target_rms=1.0), ValueError, "arrays: expected mu, w_in,"),
        (lambda: array.LensScoreWeights({"w_in": 0}, n_heads=1), ValueError, "arrays: expected w_in, read_norm,"),
        (lambda: array.lens_score(0, 0, 0, None), TypeError, "weights: expected a mc_kernels.array.LensScoreWeights"),
        (lambda: array.gist_encode(0, None), TypeError, "weights: expected a mc_kernels.array.GistEncodeWeights"),
        (
            lambda: array.gist_pool(numbers(3, 1, 1, 2, 4), numbers(3, 1, 1, 2, 4), weights()), ValueError,
            "k: expected R that is a multiple of the weights' L=2, got R=3",
        ),
        (
            lambda: array.context_attention(
                numbers(1, 3, 1, 4), numbers(1, 2, 5, 4), numbers(1, 2, 5, 4), [[0]], [range(5)], None
            ), ValueError, "k: expected a number of heads that divides Hq=3, got Hkv=2",
        ),
        (
            lambda: array.context_attention(
                numbers(1, 2, 1, 4), numbers(1, 2, 5, 4), numbers(1, 2, 5, 4), [[0]], [range(4)], None
            ), ValueError, "kv_pos: expected shape [1, 5], got shape [1, 4]",
        ),
    ],
)  # fmt: skip
def test_what_else_is_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_memory_is_freed_with_the_result() -> None:
    """What another library has taken over lives as long as its array, and no longer."""
    memory = empty((4, 8), "bfloat16", array_of("x", torch.zeros(1), ("float32",)))
    memory.numpy()  # a view that is gone again
    alive = weakref.ref(memory.held)
    result = hand_over(memory)
    assert isinstance(result, torch.Tensor)
    assert result.data_ptr() == memory.address
    del memory
    gc.collect()
    assert alive() is not None
    result.fill_(3)
    assert result.float().sum() == 96
    del result
    gc.collect()
    assert alive() is None


def test_memory_that_nobody_takes_over_is_freed() -> None:
    memory = empty((4,), "float32")
    alive = weakref.ref(memory.held)
    capsule = extension.library().write_dlpack(memory.address, 2, 32, memory.shape, memory.held)
    assert extension.library().read_dlpack(capsule)[0] == memory.address
    del memory
    assert alive() is not None
    del capsule
    assert alive() is None
