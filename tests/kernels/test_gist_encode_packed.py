"""Packed weights of `gist_encode`: made once, anew when the weights change, gone with them; and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from splice_model import same_bits
from torch import Tensor

from mc_kernels import GistEncodeWeights, gist_encode, native
from mc_kernels.gist_encode import cpu
from mc_kernels.gist_encode.cases import SMALL
from mc_kernels.testing import Guarded, max_error, poison_

LEVELS = [f"cpu-{level}" for level in native.isa_levels()]
pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no native library: {native.available()}")
each_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)
GISTS = next(case for case in SMALL if case.name == "small/gists")


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The blocks' dtype of every packing from now on, in an empty store."""
    seen: list[torch.dtype] = []
    pack = cpu._PackedWeights._pack

    def counted(tensors: tuple[Tensor, ...], dtype: torch.dtype, *constants: Any) -> Tensor:
        seen.append(dtype)
        return pack(tensors, dtype, *constants)

    monkeypatch.setattr(cpu, "_packed", cpu._PackedWeights())
    monkeypatch.setattr(cpu._PackedWeights, "_pack", staticmethod(counted))
    return seen


def encode(blocks: Tensor, weights: GistEncodeWeights) -> Tensor:
    return gist_encode(blocks, weights, backend="cpu")


def test_weights_are_packed_once_and_again_when_they_change(packings: list[torch.dtype]) -> None:
    blocks, weights = GISTS.make(torch.float32)
    before = encode(blocks, weights)
    assert same_bits(encode(blocks, weights), before)
    encode(blocks, dataclasses.replace(weights, max_block_size=64))  # the same tensors in another object
    encode(blocks, weights.with_tensors(*(x.detach() for x in weights.tensors())))
    assert len(packings) == 1
    for i, x in enumerate(weights.tensors()):
        x.mul_(1.5)
        got = encode(blocks, weights)
        assert len(packings) == 2 + i
        assert max_error(got, gist_encode(blocks, weights, backend="ref")) < 1e-5
    assert len(cpu._packed._kept) == 1
    encode(blocks, dataclasses.replace(weights, rope_theta=100.0))
    encode(blocks.bfloat16(), weights)
    assert len(packings) == 16


def test_packed_weights_go_with_the_weights(packings: list[torch.dtype]) -> None:
    blocks, _ = GISTS.make(torch.float32)
    several = [GISTS.make(torch.float32, seed=i)[1] for i in range(cpu.KEPT + 2)]
    for weights in several:
        encode(blocks, weights)
    assert len(cpu._packed._kept) == cpu.KEPT
    del weights
    several.clear()
    gc.collect()
    assert not cpu._packed._kept


def test_weights_without_a_version_are_packed_every_time(packings: list[torch.dtype]) -> None:
    blocks, weights = GISTS.make(torch.float32)
    with torch.inference_mode():
        ours = weights.with_tensors(*(x.clone() for x in weights.tensors()))
        first = encode(blocks, ours)
        ours.final_norm.mul_(2)
        assert max_error(encode(blocks, ours), first) > 1e-3
    assert len(packings) == 2


def test_weights_of_any_stride(packings: list[torch.dtype]) -> None:
    blocks, weights = GISTS.make(torch.float32)
    strided = weights.with_tensors(*(x.repeat_interleave(2, -1)[..., ::2] for x in weights.tensors()))
    assert not strided.qkv.is_contiguous()
    assert same_bits(encode(blocks, strided), encode(blocks, weights))
    rows = weights.with_tensors(*(Guarded(x, gap=3).view for x in weights.tensors()))
    assert same_bits(encode(blocks, rows), encode(blocks, weights))


def test_compiled(packings: list[torch.dtype]) -> None:
    blocks, weights = GISTS.make(torch.float32)
    compiled = torch.compile(lambda x: encode(x, weights) * 2, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert same_bits(compiled(blocks), encode(blocks, weights) * 2)
    assert len(packings) == 1


class Call:
    """A valid call: 3 windows into guarded, strided memory."""

    def __init__(self) -> None:
        self.blocks, weights = GISTS.make(torch.float32)
        self.tensors = [list(native.view(x)) for x in weights.tensors()]
        self.kept: Any = weights
        self.constants: dict[str, Any] = {"n_heads": 2, "pool": 0, "rope_theta": 1e4, "target_rms": 0.12}
        self.out = Guarded(poison_(torch.empty(3, 3, 40)), gap=2)
        self.args: dict[str, Any] = {
            "blocks": list(native.view(self.blocks)), "out": list(native.view(self.out.view)), "level": 1,
            "n_threads": 1, "dtype": native.dtype_code(torch.float32), "move": 0, "size": 0, "pack": True,
        }  # fmt: skip

    def run(self) -> None:
        library, a = native.library(), self.args
        tensors = [tuple(x) for x in self.tensors]
        size = library.gist_encode_packed_bytes(tensors, **self.constants, dtype=a["dtype"])
        memory = torch.zeros(size + 128, dtype=torch.uint8)
        at = memory.data_ptr() + -memory.data_ptr() % 64 + a["move"]
        if a["pack"]:
            library.gist_encode_pack(
                tensors, **self.constants, dtype=a["dtype"], packed=at, bytes=size + a["size"], n_threads=1
            )
        library.gist_encode(at, size, tuple(a["blocks"]), tuple(a["out"]), a["level"], a["n_threads"])


def change(i: int, part: int, value: Any) -> Callable[[Call], None]:
    return lambda c: c.tensors[i].__setitem__(part, value)


def argument(name: str, part: int, value: Any) -> Callable[[Call], None]:
    return lambda c: c.args[name].__setitem__(part, value)


REFUSED: dict[str, tuple[Callable[[Call], None], type[Exception], str]] = {
    "tensors": (lambda c: c.tensors.pop(), ValueError, "weights: expected 13 tensors"),
    "weight dims": (change(1, 2, (32,)), ValueError, "w_in: expected as many sizes as strides"),
    "weight dtype": (change(4, 1, 1), TypeError, "qkv: expected dtype 0 as w_in, got 1"),
    "weight shape": (change(5, 2, (2, 31, 32)), ValueError, "attn_out: expected shape [2, 32, 32], got [2, 31, 32]"),
    "last stride": (change(8, 3, (1536, 96, 2)), ValueError, "down: expected a contiguous last dimension"),
    "no address": (change(0, 0, 0), ValueError, "mu: expected an address, got NULL"),
    "heads": (lambda c: c.constants.update(n_heads=3), ValueError, "n_heads: expected heads of even width in Eg = 32"),
    "pool": (lambda c: c.constants.update(pool=3), ValueError, "pool: expected MC_POOL_SOFTMAX"),
    "gists": (lambda c: c.constants.update(pool=1), ValueError, "pool_q: expected G = 1 for this pool"),
    "theta": (lambda c: c.constants.update(rope_theta=0.0), ValueError, "rope_theta: expected a positive number"),
    "rms": (lambda c: c.constants.update(target_rms=float("inf")), ValueError, "target_rms: expected a positive"),
    "not packed": (lambda c: c.args.update(pack=False), ValueError, "packed: expected what mc_gist_encode_pack_cpu"),
    "odd address": (lambda c: c.args.update(move=8), ValueError, "packed: expected an address that is a multiple of"),
    "size": (lambda c: c.args.update(size=-1), ValueError, "bytes: expected"),
    "blocks dims": (argument("blocks", 2, (3, 16)), ValueError, "blocks: expected as many sizes as strides"),
    "blocks dtype": (argument("blocks", 1, 3), TypeError, "blocks: expected dtype MC_F32, MC_F16 or MC_BF16"),
    "blocks width": (argument("blocks", 2, (3, 16, 39)), ValueError, "blocks: expected shape [*, *, 40]"),
    "no entries": (argument("blocks", 2, (3, 0, 40)), ValueError, "blocks: expected K >= 1"),
    "out dtype": (argument("out", 1, 2), TypeError, "out: expected dtype 0 as blocks, got 2"),
    "out shape": (argument("out", 2, (2, 3, 40)), ValueError, "out: expected shape [3, 3, 40]"),
    "overlap": (argument("out", 3, (0, 42, 1)), ValueError, "out: expected a view without overlap"),
    "aliased": (lambda c: c.args["out"].__setitem__(0, c.args["blocks"][0]), ValueError, "out: expected memory apart"),
    "level": (lambda c: c.args.update(level=0), ValueError, "level: expected at least 1, got 0"),
    "threads": (lambda c: c.args.update(n_threads=-1), ValueError, "n_threads: expected at least 0, got -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_library_refuses_before_it_writes(name: str) -> None:
    spoil, error, words = REFUSED[name]
    call = Call()
    spoil(call)
    with pytest.raises(error) as caught:
        call.run()
    assert words in str(caught.value)
    assert call.out.view.isnan().all()
    call.out.check()


@each_level
def test_strided_output_between_guards(backend: str) -> None:
    call = Call()
    call.run()
    call.out.check()
    assert same_bits(call.out.view, gist_encode(call.blocks, call.kept, backend=backend))


def test_weights_packed_for_products_that_are_not_there() -> None:
    """bf16 products at a level that has none: an error, not another result."""
    library = native.library()
    blocks, weights = GISTS.make(torch.bfloat16)
    views, constants = [native.view(x) for x in weights.tensors()], (2, 0, 1e4, 0.12)
    try:
        library.set_cpu_isa("amx-emulated")
        packed = cpu._PackedWeights._pack(weights.tensors(), torch.bfloat16, *constants)
        library.set_cpu_isa("scalar")
        assert library.gist_encode_packed_bytes(views, *constants, native.dtype_code(torch.bfloat16)) > len(packed)
        out = torch.empty(3, 3, 40, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="packed: expected weights for products that level scalar has, got bf16"):
            library.gist_encode(packed.data_ptr(), len(packed), native.view(blocks), native.view(out), 1, 1)
    finally:
        library.set_cpu_isa(None)


def test_weights_that_are_trained_are_packed_anew() -> None:
    """A checkpoint or a finite difference writes to them behind the version counter."""
    blocks, weights = GISTS.make(torch.float32)
    trained = weights.with_tensors(*(x.requires_grad_() for x in weights.tensors()))
    with torch.no_grad():
        before = gist_encode(blocks, trained, backend="cpu")
        trained.w_in.data.mul_(1.5)
        after = gist_encode(blocks, trained, backend="cpu")
        torch.testing.assert_close(after, gist_encode(blocks, trained, backend="ref"), rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, after)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_a_thread_that_it_has_not() -> None:
    blocks, weights = GISTS.make(torch.bfloat16)
    want = gist_encode(blocks, weights, backend="cpu")
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with cpu._packed._lock:
            held.set()
            go_on.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        got = gist_encode(blocks, weights, backend="cpu")
        os._exit(0 if (got.view(torch.int16).numpy() == want.view(torch.int16).numpy()).all() else 3)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
