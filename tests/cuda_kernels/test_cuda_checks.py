"""What `context_attention` and `gist_encode` refuse, through the C ABI and without a device: a clear status, nothing
launched or written."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

Call = tuple[dict[str, Any], list[torch.Tensor]]


def valid_attention() -> Call:
    """One query of 2 heads on 5 slots of one KV head of 8 dimensions, fp32."""
    q, k, out, lse = torch.ones(2, 8), torch.ones(5, 8), torch.zeros(2, 8), torch.zeros(2)
    q_pos, kv_pos, freq = torch.tensor([4]), torch.arange(5), torch.ones(4, dtype=torch.float64)
    per_slot, mass = torch.zeros(5), torch.zeros(5)
    heads, slots = ((1, 2, 1, 8), (16, 8, 8, 1)), ((1, 1, 5, 8), (40, 40, 8, 1))
    call = {
        "q": (q.data_ptr(), 0, *heads), "k": (k.data_ptr(), 0, *slots), "v": (k.data_ptr(), 0, *slots),
        "q_pos": q_pos.data_ptr(), "kv_pos": kv_pos.data_ptr(), "inv_freq": freq.data_ptr(), "half": 4,
        "interleaved": False, "attention_scaling": 1.0, "sigma": 0, "kv_bias": per_slot.data_ptr(), "scale": 0.3,
        "out": (out.data_ptr(), 0, *heads), "lse": lse.data_ptr(), "mass": mass.data_ptr(),
    }  # fmt: skip
    return call, [q, k, out, lse, q_pos, kv_pos, freq, per_slot, mass]


def valid_encode() -> Call:
    """One window of 3 entries of 6 numbers through a layer of width 4, two heads, F 5."""
    shapes = {
        "mu": (6,), "w_in": (4, 6), "level_emb": (2, 4), "attn_norm": (1, 4), "qkv": (1, 12, 4), "attn_out": (1, 4, 4),
        "ffn_norm": (1, 4), "gate_up": (1, 10, 4), "down": (1, 4, 5), "final_norm": (4,), "pool_q": (1, 4),
        "w_out": (6, 4), "gain": (1,),
    }  # fmt: skip
    memory = [torch.ones(shape) for shape in (*shapes.values(), (1, 3, 6), (1, 1, 6))]
    views = [(x.data_ptr(), 0, tuple(x.shape), x.stride()) for x in memory]
    call = {
        "tensors": views[:-2], "n_heads": 2, "pool": 0, "rope_theta": 1e4, "target_rms": 0.1, "blocks": views[-2],
        "out": views[-1], "level": 1,
    }  # fmt: skip
    return call, memory


def changed(call: dict[str, Any], name: str, at: int | None, value: Any) -> None:
    """Argument `name`, or its part `at`, becomes `value`; a number for the name means a weight's part."""

    def with_part(view: tuple[Any, ...], part: int) -> tuple[Any, ...]:
        return (*view[:part], value, *view[part + 1 :])

    if at is None:
        call[name] = value
    elif name.isdigit():
        call["tensors"][int(name)] = with_part(call["tensors"][int(name)], at)
    else:
        call[name] = with_part(call[name], at)


ATTENTION = {
    "dtype": ("v", 1, 2, TypeError, "v: expected dtype 0 as q, got 2"),
    "integer": ("q", 1, 4, TypeError, "q: expected dtype MC_F32, MC_F16 or MC_BF16, got 4"),
    "no k": ("k", 0, 0, ValueError, "k: expected an address, got NULL"),
    "no out": ("out", 0, 0, ValueError, "out: expected an address, got NULL"),
    "shape": ("v", 2, (1, 1, 4, 8), ValueError, r"v: expected shape \[1, 1, 5, 8\], got"),
    "stride": ("k", 3, (40, 40, 8, 2), ValueError, "k: expected a contiguous last dimension, got stride 2"),
    "overlap": ("out", 3, (16, 4, 8, 1), ValueError, "out: expected a view without overlap"),
    "no q_pos": ("q_pos", None, 0, ValueError, "q_pos: expected an array"),
    "no kv_pos": ("kv_pos", None, 0, ValueError, "kv_pos: expected an array"),
    "no lse": ("lse", None, 0, ValueError, "lse: expected an array"),
    "half": ("half", None, 5, ValueError, r"half: expected 0\.\.4 \(D/2\), got 5"),
    "no inv_freq": ("inv_freq", None, 0, ValueError, r"half: expected 0\.\.0 without inv_freq, got 4"),
    "scale": ("scale", None, float("nan"), ValueError, "scale: expected a finite number"),
}
ENCODE = {
    "dtype": ("4", 1, 2, TypeError, "qkv: expected dtype 0 as w_in, got 2"),
    "no weight": ("1", 0, 0, ValueError, "w_in: expected an address, got NULL"),
    "shape": ("8", 2, (1, 4, 6), ValueError, r"gate_up: expected shape \[1, 12, 4\], got"),
    "stride": ("11", 3, (4, 2), ValueError, "w_out: expected a contiguous last dimension, got stride 2"),
    "heads": ("n_heads", None, 3, ValueError, "n_heads: expected heads of even width in Eg = 4, got 3"),
    "pool": ("pool", None, 7, ValueError, "pool: expected MC_POOL_SOFTMAX, MC_POOL_MEAN or MC_POOL_CLS, got 7"),
    "theta": ("rope_theta", None, 0.0, ValueError, "rope_theta: expected a positive number"),
    "width": ("blocks", 2, (1, 3, 5), ValueError, r"blocks: expected shape \[\*, \*, 6\], got"),
    "out dtype": ("out", 1, 2, TypeError, "out: expected dtype 0 as blocks, got 2"),
    "no blocks": ("blocks", 0, 0, ValueError, "blocks: expected an address, got NULL"),
    "level": ("level", None, 0, ValueError, "level: expected at least 1, got 0"),
    "long": ("blocks", 2, (1, 9000, 6), ValueError, "blocks: expected K < 5120, got 9000"),
}
WRONG = [("context_attention", valid_attention, *case) for case in ATTENTION.values()]
WRONG += [("gist_encode", valid_encode, *case) for case in ENCODE.values()]


@pytest.mark.parametrize("case", WRONG, ids=lambda c: f"{c[0]}: {c[-1]}")
def test_what_is_wrong_is_named_and_nothing_happens(case: tuple[Any, ...], library: Any) -> None:
    op, valid, name, at, value, error, words = case
    call, memory = valid()
    changed(call, name, at, value)
    before = [x.clone() for x in memory]
    for where in (library.Where(0, 0, 0), None):
        with pytest.raises(error, match=words):
            getattr(library, op)(**call, where=where)
    assert all(torch.equal(x, y) for x, y in zip(memory, before, strict=True))


def test_heads_too_large_for_a_device(library: Any) -> None:
    call, memory = valid_attention()
    for name, heads, rows in (("q", 2, 1), ("k", 1, 5), ("v", 1, 5), ("out", 2, 1)):
        call[name] = (*call[name][:2], (1, heads, rows, 264), (264 * heads * rows, 264 * rows, 264, 1))
    with pytest.raises(ValueError, match=r"q: expected at most D = 256, got shape \[1, 2, 1, 264\]"):
        library.context_attention(**call, where=None)
    assert memory

    call, memory = valid_encode()
    shapes = [
        (6,), (256, 6), (1, 256), (1, 256), (1, 768, 256), (1, 256, 256), (1, 256), (1, 2, 256), (1, 256, 1), (256,),
        (1, 256), (6, 256), (1,),
    ]  # fmt: skip
    big = [torch.ones(shape) for shape in shapes]
    call |= {"tensors": [(x.data_ptr(), 0, tuple(x.shape), x.stride()) for x in big], "n_heads": 1}
    with pytest.raises(ValueError, match="n_heads: expected heads of at most 128, got 256"):
        library.gist_encode(**call, where=None)
    assert memory


def many_windows(n: int, gists: int = 1, rows_off: int = 0) -> dict[str, Any]:
    """n windows of 32 in bf16 through two layers of width 64, at addresses that nothing is at."""
    shapes = [
        (96,), (64, 96), (4, 64), (2, 64), (2, 192, 64), (2, 64, 64), (2, 64), (2, 320, 64), (2, 64, 160), (64,),
        (gists, 64), (96, 64), (1,), (n, 32, 96), (n, gists, 96),
    ]  # fmt: skip
    views = []
    for i, shape in enumerate(shapes):
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        views.append(((1 << 40) + (i << 36) + rows_off, 2, shape, tuple(strides)))
    return {
        "tensors": views[:-2], "n_heads": 4, "pool": 0, "rope_theta": 1e4, "target_rms": 0.1, "blocks": views[-2],
        "out": views[-1], "level": 1,
    }  # fmt: skip


def test_workspace_of_many_windows(library: Any) -> None:
    """It is known without a device, grows with N until windows come in chunks, and has to be where it is said to be."""
    needs = [library.gist_encode(**many_windows(n), where=None) for n in (0, 9, 1024, 4096, 5000, 1 << 20)]
    assert needs[0] == 0
    assert needs[1] < needs[2] == needs[3] == needs[4] == needs[5] < 1 << 30
    # Off 16 bytes, which tensor cores do not take: activations in fp32.
    off = [library.gist_encode(**many_windows(n, rows_off=2), where=None) for n in (1024, 4096)]
    assert off[0] == off[1] > needs[2]
    call = many_windows(4096)
    space = 1 << 44
    for where, got in (
        (library.Where(space + 8, needs[3], 0), f"{needs[3]} bytes"),
        (library.Where(space, needs[3] - 16, 0), f"{needs[3] - 16} bytes"),
        (library.Where(0, 0, 0), "NULL"),
    ):
        with pytest.raises(ValueError, match=f"workspace: expected {needs[3]} bytes on a multiple of 16, got {got}"):
            library.gist_encode(**call, where=where)


def test_more_gists_than_a_device_counts(library: Any) -> None:
    with pytest.raises(ValueError, match="blocks: expected at most 2147483647, got "):
        library.gist_encode(**many_windows(4096, gists=1 << 14), where=None)


@pytest.mark.parametrize(
    ("op", "valid"), [("context_attention", valid_attention), ("gist_encode", valid_encode)], ids=["attend", "encode"]
)
def test_a_valid_call_without_a_device_says_so(op: str, valid: Any, library: Any) -> None:
    if library.emulated or torch.cuda.is_available():
        pytest.skip("there is something to run on")
    call, memory = valid()
    before = [x.clone() for x in memory]
    space = torch.zeros(1 << 16, dtype=torch.uint8)
    where = library.Where((space.data_ptr() + 15) // 16 * 16, space.numel() - 16, 0)
    with pytest.raises(RuntimeError, match=r"(the current device|at the launch of)"):
        getattr(library, op)(**call, where=where)
    assert all(torch.equal(x, y) for x, y in zip(memory, before, strict=True))


def test_null_through_the_plain_abi(library: Any) -> None:
    folder = Path(library.__file__).parent
    name = "libmc_kernels_cuda_emulated.so" if library.emulated else "libmc_kernels_cuda.so"
    abi = ctypes.CDLL(str(folder / name))
    abi.mc_cuda_last_error.restype = ctypes.c_char_p
    nothing, no_bytes = ctypes.create_string_buffer(4096), ctypes.c_int64(0)
    assert abi.mc_context_attention_cuda(None, None, no_bytes, None) == 1
    assert abi.mc_cuda_last_error() == b"args: expected an address, got NULL"
    assert abi.mc_context_attention_cuda(nothing, None, no_bytes, None) == 1
    assert abi.mc_cuda_last_error().startswith(b"struct_size: expected ")
    assert abi.mc_gist_encode_cuda(None, nothing, None, no_bytes, None) == 1
    assert abi.mc_cuda_last_error() == b"weights: expected an address, got NULL"
    assert abi.mc_gist_encode_cuda(nothing, nothing, None, no_bytes, None) == 1
    assert abi.mc_cuda_last_error().startswith(b"struct_size: expected ")
    assert abi.mc_gist_encode_cuda_workspace(nothing, nothing, None) == 1
    assert abi.mc_cuda_last_error() == b"bytes: expected an address, got NULL"
