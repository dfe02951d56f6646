"""What `refocus` refuses, through the C ABI and without a device: a clear status, nothing launched or written."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

S, K, D = 12, 3, 4
SIZES = {
    "levels": 1, "born": 1, "index": 2, "slots": 2, "pos": 2, "bias": 1, "state": 2, "counts": 2, "pinned": 4,
    "store_keys": 2, "store_rows": 1, "scores": 2, "edits": 3, "inserted": 2, "moves": 2, "children": 1, "wanted": 2,
}  # fmt: skip


def view(x: torch.Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), 0, tuple(x.shape), x.stride()


def valid() -> tuple[dict[str, Any], list[torch.Tensor]]:
    """An empty context of 12 slots, 2 layers, one head; and the tensors that hold its memory."""
    cache = [torch.zeros(2, 1, rows, D) for rows in (S, S, 6, 6)]
    weights = [torch.zeros(2, 1, *shape) for shape in ((1, 2 * D), (1, K), (2 * D, 2 * D), (2 * D,))]
    arrays = {name: torch.zeros(4 * S * words, dtype=torch.uint8) for name, words in SIZES.items()}
    call = {
        **{name: view(x) for name, x in zip(("k", "v", "k_store", "v_store"), cache, strict=True)},
        "weights": [tuple(view(x) for x in weights)],
        "arrays": {name: x.data_ptr() for name, x in arrays.items()},
        "n_levels": 1, "n_pinned": 1, "n_store": 2, "n_wanted": 2, "block_size": K, "budget": S, "cooldown": 1,
        "max_edits": -1, "min_gain": 0.02, "hysteresis": 0.02, "gist_bias": 0.0,
    }  # fmt: skip
    return call, [*cache, *weights, *arrays.values()]


def changed(call: dict[str, Any], name: str, at: Any, value: Any) -> None:
    """Argument `name`, or its part `at`, becomes `value`."""
    if at is None:
        call[name] = value
    elif isinstance(at, str):
        call[name] = {**call[name], at: value}
    else:
        call[name] = (*call[name][:at], value, *call[name][at + 1 :])


W = [torch.zeros(2, 1, *shape) for shape in ((2, 2 * D), (2, K + 1), (2 * D, 2 * D), (2 * D,))]
TWO_GISTS = tuple(view(x) for x in (W[0], W[1][..., :K], W[2], W[3]))
OTHER_K = tuple(view(x) for x in (W[0][:, :, :1], W[1][:, :, :1], W[2], W[3]))
WRONG = {
    "dtype": ("v", 1, 2, TypeError, "v: expected dtype 0 as k, got 2"),
    "integer": ("k", 1, 4, TypeError, "k: expected dtype MC_F32, MC_F16 or MC_BF16, got 4"),
    "store dtype": ("k_store", 1, 2, TypeError, "k_store: expected dtype 0 as k, got 2"),
    "no k": ("k", 0, 0, ValueError, "k: expected an address, got NULL"),
    "no store": ("v_store", 0, 0, ValueError, "v_store: expected an address, got NULL"),
    "dims": ("k", 2, (2, 1, S), ValueError, "k: expected as many sizes as strides"),
    "shape": ("v", 2, (2, 1, S - 1, D), ValueError, r"v: expected shape \[2, 1, 1, 12, 4\], got"),
    "store shape": ("k_store", 2, (2, 2, 3, D), ValueError, r"k_store: expected shape \[2, 1, \*, 4\], got"),
    "stride": ("k", 3, (48, 48, 4, 2), ValueError, "k: expected a contiguous last dimension"),
    "overlap": ("v", 3, (24, 48, 4, 1), ValueError, "v: expected a view without overlap"),
    "no weights": ("weights", None, [], ValueError, r"n_weights: expected 1\.\.4, got 0"),
    "two gists": ("weights", None, [TWO_GISTS], ValueError, "weights.w: expected one gist a block, got shape"),
    "other K": ("weights", None, [OTHER_K], ValueError, "weights.b: expected K = block_size = 3, got shape"),
    "block_size": ("block_size", None, 1, ValueError, r"block_size: expected 2\.\.\d+, got 1"),
    "budget": ("budget", None, S + 1, ValueError, r"budget: expected 0\.\.12, got 13"),
    "cooldown": ("cooldown", None, -1, ValueError, r"cooldown: expected 0\.\.\d+, got -1"),
    "max_edits": ("max_edits", None, -2, ValueError, "max_edits: expected at least 0, or -1 for any, got -2"),
    "min_gain": ("min_gain", None, float("nan"), ValueError, "min_gain: expected nats between 0 and 1e9, got nan"),
    "hysteresis": ("hysteresis", None, -0.1, ValueError, "hysteresis: expected nats between 0 and 1e9"),
    "gist_bias": ("gist_bias", None, float("inf"), ValueError, "gist_bias: expected a finite number, got inf"),
    "n_levels": ("n_levels", None, -1, ValueError, "n_levels: expected at least 0, got -1"),
    "n_store": ("n_store", None, -1, ValueError, "n_store: expected at least 0, got -1"),
    **{
        f"no {name}": ("arrays", name, 0, ValueError, f"{name}: expected an array, got NULL")
        for name in SIZES
        if name != "bias"
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_and_nothing_happens(name: str, library: Any) -> None:
    argument, at, value, error, words = WRONG[name]
    call, memory = valid()
    changed(call, argument, at, value)
    before = [x.clone() for x in memory]
    for where in (library.Where(0, 0, 0), None):
        with pytest.raises(error, match=words):
            library.refocus(**call, where=where)
    assert all(torch.equal(x, y) for x, y in zip(memory, before, strict=True))


def test_the_store_is_apart_from_the_cache(library: Any) -> None:
    call, memory = valid()
    call["k_store"] = call["v"]
    with pytest.raises(ValueError, match="k_store: expected memory apart from k and v, got the same address"):
        library.refocus(**call | {"v_store": (*call["v_store"][:2], *call["v"][2:])}, where=None)
    assert memory


def test_sizes_beyond_32_bits(library: Any) -> None:
    call, memory = valid()
    slots = 1 << 31
    for name, base in (("k", 1 << 44), ("v", 1 << 45)):
        call[name] = (base, 0, (2, 1, slots, D), (D * slots, D * slots, D, 1))
    with pytest.raises(ValueError, match=f"k: expected at most {slots - 1}, got {slots}"):
        library.refocus(**call, where=library.Where(0, 0, 0))
    assert memory


def test_a_workspace_is_asked_for(library: Any) -> None:
    call, memory = valid()
    needed = library.refocus(**call, where=None)
    assert needed % 16 == 0
    assert needed >= 48 * S + 2 * (S // K) * 2 * D * 4
    space = torch.zeros(needed + 16, dtype=torch.uint8)
    start = (space.data_ptr() + 15) // 16 * 16
    for where, got in (((0, 0, 0), "NULL"), ((start, needed - 1, 0), f"{needed - 1} bytes")):
        words = f"workspace: expected {needed} bytes on a multiple of 16, got {got}"
        with pytest.raises(ValueError, match=words):
            library.refocus(**call, where=library.Where(*where))
    assert not any(x.any() for x in memory)


def test_a_valid_call_without_a_device_says_so(library: Any) -> None:
    if library.emulated or torch.cuda.is_available():
        pytest.skip("there is something to run on")
    call, memory = valid()
    space = torch.zeros(library.refocus(**call, where=None) + 16, dtype=torch.uint8)
    where = library.Where((space.data_ptr() + 15) // 16 * 16, space.numel() - 16, 0)
    with pytest.raises(RuntimeError, match=r"refocus \(plan\): .* at the launch of 1 blocks of 1024 threads"):
        library.refocus(**call, where=where)
    assert not any(x.any() for x in memory)


def test_null_through_the_plain_abi(library: Any) -> None:
    folder = Path(library.__file__).parent
    name = "libmc_kernels_cuda_emulated.so" if library.emulated else "libmc_kernels_cuda.so"
    abi = ctypes.CDLL(str(folder / name))
    abi.mc_cuda_last_error.restype = ctypes.c_char_p
    nothing = ctypes.create_string_buffer(4096)  # struct_size 0
    for call in (abi.mc_refocus_cuda, abi.mc_refocus_cuda_workspace):
        assert call(None, None, ctypes.c_int64(0), None) == 1
        assert abi.mc_cuda_last_error() == b"args: expected an address, got NULL"
    assert abi.mc_refocus_cuda(nothing, None, ctypes.c_int64(0), None) == 1
    assert abi.mc_cuda_last_error().startswith(b"struct_size: expected ")
    assert abi.mc_refocus_cuda_workspace(nothing, None) == 1
    assert abi.mc_cuda_last_error() == b"bytes: expected an address, got NULL"
