"""How often kernels are compiled anew over calls of changing lengths: seldom, and never for a length itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from mc_kernels.context_attention.triton_backward import context_attention_backward_triton
from mc_kernels.context_attention.triton_kernel import context_attention_triton
from mc_kernels.context_attention.triton_launch import recording
from mc_kernels.lens_score.cases import Case
from mc_kernels.lens_score.triton_backward import backward_launches
from mc_kernels.lens_score.triton_kernel import _arguments, _weights
from mc_kernels.lens_score.triton_plan import forward_launches
from mc_kernels.triton_arena import Arena
from mc_kernels.triton_report import Compilation
from mc_kernels.triton_specialisation import specialise

BF16 = torch.bfloat16


def _attention(draw: random.Random) -> list[Compilation]:
    """A decode step, a few tokens or a chunk (with its backward) of SmolLM2-135M over a cache filled this far."""
    t = draw.choice((1, 1, 1, draw.randint(2, 40), draw.randint(64, 1024)))
    s = max(t, draw.randint(64, 9000))
    with torch.device("meta"):
        q, cache = torch.empty(1, 9, t, 64, dtype=BF16), torch.empty(1, 3, 16384, 64, dtype=BF16)
        q_pos, kv_pos = torch.empty(1, t, dtype=torch.int64), torch.empty(1, s, dtype=torch.int64)
        inv_freq, of_slots = torch.empty(32), torch.empty(1, s)
    k = cache[:, :, :s]
    rope = (inv_freq, False, 1.0, of_slots, of_slots, 0.125)
    with recording("") as launches:
        lse = context_attention_triton(q, k, k, q_pos, kv_pos, *rope, draw.random() < 0.5)[1]
        if t > 40:
            context_attention_backward_triton(q, q, k, k, q_pos, kv_pos, *rope, q, lse)
    return list(launches)


def _scores(draw: random.Random) -> list[Compilation]:
    """Scores of a working context of SmolLM2-135M and their backward."""
    case = Case("", draw.randint(40, 40000), 576)
    weights = _weights(case, BF16)
    args = _arguments(case, BF16, weights)
    forward = forward_launches(Arena(None), torch.empty(case.entries, 2, device="meta"), *args)
    backward = backward_launches(args[0], weights.w_in, case.queries, case.n_direct, case.n_heads, case.n_passes)
    return [launch.compilation("") for launch in (*forward, *backward)]


@pytest.mark.parametrize(
    ("calls", "most"), [(_attention, 28), (_scores, 36)], ids=("context_attention", "lens_score")
)  # before lengths were left unspecialised context_attention had 44
def test_few_compilations(calls: Callable[[random.Random], list[Compilation]], most: int) -> None:
    draw = random.Random(0)
    found = {
        (
            one.kernel.fn.__name__,
            repr((one.signature, one.constexprs, one.aligned, one.num_warps, one.num_stages, one.most_registers)),
        )
        for _ in range(40)
        for one in calls(draw)
    }
    assert len(found) <= most, Counter(name for name, _ in found)


def test_what_a_kernel_is_compiled_for() -> None:
    class Kernel:
        do_not_specialize = ("length",)
        do_not_specialize_on_alignment = ("positions",)

    x = torch.empty(1, device="meta")
    types = {torch.float32: "*fp32"}
    for length in (1, 16, 17):
        arguments = {"x": x, "positions": x, "y": None, "length": length, "row": 32, "one": 1, "scale": 1.0}
        signature, constants, aligned = specialise(Kernel, arguments, types)
        assert signature == {
            "x": "*fp32", "positions": "*fp32", "y": "constexpr", "length": "i32", "row": "i32", "one": "constexpr",
            "scale": "fp32",
        }  # fmt: skip
        assert constants == {"y": None, "one": 1}
        assert aligned == ("x", "row")
    assert specialise(Kernel, {"far": 2**31}, types)[0] == {"far": "i64"}
