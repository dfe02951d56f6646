"""`kv_splice_` refuses before it writes; the op itself: schema, compilation, backends."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splice_model import same_bits
from torch import Tensor

from mc_kernels import BackendError, Edit, PageTable, RopeSpec, SplicePlan, array, kv_splice_
from mc_kernels.checks import can_read
from mc_kernels.kv_splice import checks
from mc_kernels.kv_splice.op import pack_plans
from mc_kernels.memory import overlaps_itself, shares_memory
from mc_kernels.registry import IMPLS, Impl

R, H, S, D, M = 4, 2, 12, 8, 1
ROPE = RopeSpec.from_theta(100.0, D)
PLAN = SplicePlan.from_edits(10, [Edit(2, 3, 1)], capacity=S)
SLOTS = SplicePlan.from_edits(10, [Edit(2, 3, 1)], capacity=S, discipline="slots")
Args = dict[str, Any]


def arguments() -> Args:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(R, H, S, D, generator=generator) for _ in range(2))
    k_new, v_new = (torch.randn(R, H, M, D, generator=generator) for _ in range(2))
    return {"k": k, "v": v, "k_new": k_new, "v_new": v_new, "plan": PLAN, "rope": ROPE}


def paged(table: list[list[int]], page_size: int = 4) -> Args:
    """One layer, four sequences."""
    return {
        "k": torch.randn(15, H, 4, D), "v": torch.randn(15, H, 4, D), "rope": None,
        "pages": PageTable(torch.tensor(table), page_size),
    }  # fmt: skip


APART = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def shared_cache(offset: int) -> Args:
    """k and v as views of one buffer, v `offset` elements after k."""
    flat = torch.randn(2 * R * H * S * D)
    strides = (H * S * D, S * D, D, 1)
    k = flat.as_strided((R, H, S, D), strides, 0)
    return {"k": k, "v": flat.as_strided((R, H, S, D), strides, offset)}


def new_inside_the_cache() -> Args:
    cache = torch.randn(R, H, S, D)
    return {"k": cache, "k_new": cache[:, :, 11:]}


REFUSED: dict[str, tuple[Callable[[], Args], type[Exception], str]] = {
    "k list": (lambda: {"k": [1.0]}, TypeError, "k: expected a tensor"),
    "k int": (lambda: {"k": torch.zeros(R, H, S, D, dtype=torch.int32)}, TypeError, "k: expected dtype"),
    "k dims": (lambda: {"k": torch.zeros(R, S, D)}, ValueError, "k: expected shape"),
    "v shape": (lambda: {"v": torch.zeros(R, H, S - 1, D)}, ValueError, "v: expected shape"),
    "v dtype": (lambda: {"v": torch.zeros(R, H, S, D).half()}, TypeError, "v: expected dtype float32 as k"),
    "k_new dtype": (lambda: {"k_new": torch.zeros(R, H, M, D).double()}, TypeError, "k_new: expected dtype"),
    "k_new heads": (lambda: {"k_new": torch.zeros(R, 1, M, D)}, ValueError, "k_new: expected shape"),
    "k_new rows": (lambda: {"k_new": torch.zeros(1, H, M, D)}, ValueError, "k_new: expected shape"),
    "k_new count": (lambda: {x: torch.zeros(R, H, 2, D) for x in ("k_new", "v_new")}, ValueError, "k_new: expected M"),
    "v_new count": (lambda: {"v_new": torch.zeros(R, H, 2, D)}, ValueError, "v_new: expected shape"),
    "device": (lambda: {"v_new": torch.zeros(R, H, M, D, device="meta")}, TypeError, "v_new: expected device cpu"),
    "last stride": (
        lambda: {"v": torch.zeros(R, H, D, S).transpose(2, 3)}, ValueError, "v: expected a contiguous last",
    ),
    "gradient": (lambda: {"k_new": torch.zeros(R, H, M, D, requires_grad=True)}, ValueError, "requires no gradient"),
    "expanded": (lambda: {"k": torch.zeros(1, H, S, D).expand(R, H, S, D)}, ValueError, "k: expected a view without"),
    "k is v": (lambda: shared_cache(0), ValueError, "v: expected memory apart from k"),
    "k meets v": (lambda: shared_cache(R * H * S * D - D), ValueError, "v: expected memory apart from k"),
    "k_new in k": (new_inside_the_cache, ValueError, "k_new: expected memory apart from k"),
    "capacity": (
        lambda: {"plan": SplicePlan.from_edits(10, [Edit(2, 3, 1)], capacity=S + 1)}, ValueError,
        "plan: expected capacity <= 12",
    ),
    "not a plan": (lambda: {"plan": [PLAN, 3], "rows": [0] * R}, TypeError, "plan[1]: expected a SplicePlan"),
    "plan None": (lambda: {"plan": None}, TypeError, "plan: expected a SplicePlan, got NoneType"),
    "plan of arrays": (
        lambda: {"plan": PLAN.arrays}, TypeError, "plan: expected a SplicePlan, got a mc_kernels.array.SplicePlan",
    ),
    "rope of arrays": (
        lambda: {"rope": array.RopeSpec.from_theta(100.0, D)}, TypeError,
        "rope: expected a RopeSpec or None, got a mc_kernels.array.RopeSpec",
    ),
    "no plan": (lambda: {"plan": []}, ValueError, "plan: expected at least one"),
    "mixed": (lambda: {"plan": [PLAN, SLOTS], "rows": [0] * R}, ValueError, "plan[1]: expected discipline 'ordered'"),
    "rows missing": (lambda: {"plan": [PLAN, PLAN]}, ValueError, "rows: expected the plan of each of R=4"),
    "rows count": (lambda: {"rows": [0]}, ValueError, "rows: expected shape [R]"),
    "rows range": (lambda: {"rows": [0, 0, 1, 0]}, ValueError, "rows: expected indices in -1..0"),
    "rows negative": (lambda: {"rows": [0, 0, -2, 0]}, ValueError, "rows: expected indices in -1..0"),
    "rows dtype": (lambda: {"rows": torch.zeros(R)}, TypeError, "rows: expected dtype"),
    "rope type": (lambda: {"rope": ROPE.inv_freq}, TypeError, "rope: expected a RopeSpec"),
    "rope size": (lambda: {"rope": RopeSpec.from_theta(1e4, D + 2)}, ValueError, "rope: expected at most D/2 = 4"),
    "rope rows": (lambda: {"rope": RopeSpec(torch.ones(3, 4))}, ValueError, "rope: expected inv_freq"),
    "positions without rope": (
        lambda: {"rope": None, "positions": torch.arange(10)}, ValueError, "positions: expected None without rope",
    ),
    "positions count": (lambda: {"positions": torch.arange(9)}, ValueError, "positions: expected shape [10]"),
    "positions dtype": (lambda: {"positions": torch.arange(10).int()}, TypeError, "positions: expected dtype int64"),
    "positions negative": (
        lambda: {"new_positions": torch.arange(8) - 1}, ValueError, "new_positions: expected positions >= 0, got -1",
    ),
    "positions plans": (
        lambda: {"new_positions": [torch.arange(8)] * 2}, ValueError, "expected one tensor for each of 1 plans",
    ),
    "pages type": (lambda: {**paged(APART), "pages": torch.zeros(4, 3)}, TypeError, "pages: expected a PageTable"),
    "page size": (lambda: paged(APART, 5), ValueError, "k: expected shape [P, Hkv, 5, D]"),
    "page beyond": (lambda: paged([*APART[:3], [9, 10, 15]]), ValueError, "pages: expected table[3, 2] in 0..14"),
    "page negative": (lambda: paged([[0, -1, 2], *APART[1:]]), ValueError, "pages: expected table[0, 1] in 0..14"),
    "page shared": (lambda: paged([*APART[:3], [9, 1, 11]]), ValueError, "pages: expected page 1, written for"),
    "page twice": (lambda: paged([[0, 1, 0], *APART[1:]]), ValueError, "pages: expected page 0, written for"),
    "table rows": (lambda: paged(APART[:3]), ValueError, "k_new: expected shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_write_nothing(name: str) -> None:
    make, error, words = REFUSED[name]
    args = {**arguments(), **make()}
    tensors = {n: args[n] for n in ("k", "v", "k_new", "v_new") if isinstance(args[n], Tensor)}
    before = {n: x.clone() for n, x in tensors.items() if x.device.type == "cpu"}
    with pytest.raises(error) as caught:
        kv_splice_(**args)
    assert words in str(caught.value)
    for n, x in before.items():
        assert same_bits(tensors[n], x)


def test_the_base_arguments_are_accepted() -> None:
    """What the refusals start from works, so each refusal is due to its own change."""
    args = arguments()
    before = args["k"].clone()
    kv_splice_(**args)
    assert not same_bits(args["k"], before)
    kv_splice_(**{**arguments(), **paged(APART)})
    kv_splice_(**{**arguments(), **shared_cache(R * H * S * D)})
    kv_splice_(**{**arguments(), "rows": [0, 0, -1, 0], "plan": [PLAN, PLAN]})
    with torch.no_grad():
        kv_splice_(**{**arguments(), "k_new": torch.zeros(R, H, M, D, requires_grad=True)})


def test_values_on_a_gpu_are_not_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(is_meta=False, is_cuda=True)
    for captured in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captured=captured: captured)
        assert can_read(on_gpu) is not captured
        assert can_read(torch.ones(1), on_gpu) is not captured
        assert can_read(torch.ones(1))
        assert not can_read(torch.ones(1, device="meta"))


@pytest.mark.parametrize("given", ["positions", "pages"])
def test_what_cannot_be_read_is_taken_as_it_is(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong values, which are refused where they can be read."""
    args = paged([[0, 1, 99], *APART[1:]]) if given == "pages" else arguments()
    args |= {"k_new": torch.randn(R, H, M, D), "v_new": torch.randn(R, H, M, D), "plan": PLAN, "backend": "none"}
    if given == "positions":
        args["positions"] = torch.full((10,), -1)
    with pytest.raises(ValueError, match=given):
        kv_splice_(**args)
    monkeypatch.setattr(checks, "can_read", lambda *_: False)
    with pytest.raises(BackendError, match="got 'none'"):
        kv_splice_(**args)


def test_memory_of_views() -> None:
    cache = torch.zeros(3, 2, 2, 4, 5, 6)  # [L, 2, B, Hkv, S, D]
    k, v = cache[:, 0], cache[:, 1]
    assert not shares_memory(k, v)
    assert shares_memory(k, cache[1, 0, 1])
    assert not shares_memory(k, cache[1, 1, 1])
    assert not shares_memory(cache[..., :3], cache[..., 3:])
    assert shares_memory(cache[..., :4], cache[..., 3:])
    assert not shares_memory(cache[..., 0::2, :], cache[..., 1::2, :])
    assert not shares_memory(k, k[:0])
    assert not overlaps_itself(k.transpose(1, 3))
    assert not overlaps_itself(k[:, :, :, 2:3].expand(-1, -1, -1, 1, -1))
    assert overlaps_itself(k[:, :, :, 2:3].expand(-1, -1, -1, 2, -1))
    assert overlaps_itself(torch.zeros(10).as_strided((4, 4), (2, 1)))


def op_arguments(k: Tensor, v: Tensor, rope: RopeSpec | None = ROPE) -> tuple[Any, ...]:
    args = arguments()
    inv_freq = None if rope is None else rope.inv_freq
    return (
        k, v, args["k_new"], args["v_new"], None, None, True, *pack_plans([PLAN]), None, None, inv_freq, False, 1.0,
        None,
    )  # fmt: skip


@pytest.mark.parametrize("rope", [None, ROPE], ids=["plain", "rope"])
def test_opcheck(rope: RopeSpec | None) -> None:
    k, v = (torch.randn(1, R, H, S, D) for _ in range(2))
    torch.library.opcheck(torch.ops.mc.kv_splice_.default, op_arguments(k, v, rope))


def test_compiled_with_the_plan_as_input() -> None:
    """The raw op under fullgraph with every plan tensor an input: one graph serves another plan's values."""

    def step(k: Tensor, v: Tensor, new: Tensor, *plan: Tensor) -> Tensor:
        torch.ops.mc.kv_splice_(
            k, v, new, new, None, None, True, *plan, None, None, ROPE.inv_freq, False, 1.0, None
        )  # fmt: skip
        return k * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for start in (2, 4):
        p = SplicePlan.from_edits(10, [Edit(start, 3, 1)], capacity=S)
        args = arguments()
        want_k, want_v = args["k"].clone(), args["v"].clone()
        kv_splice_(want_k, want_v, args["k_new"], args["k_new"], p, ROPE)
        k, v = args["k"][None], args["v"][None]
        out = compiled(k, v, args["k_new"], *pack_plans([p]))
        assert same_bits(k[0], want_k)
        assert same_bits(v[0], want_v)
        assert torch.equal(out, k * 2)


def test_compiled_public_function() -> None:
    def step(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, plan: SplicePlan) -> Tensor:
        kv_splice_(k, v, k_new, v_new, plan, ROPE)
        return k.sum()

    torch._dynamo.reset()
    args, want = arguments(), arguments()
    cache = torch.stack((args["k"], args["v"]))
    kv_splice_(**want)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    total = compiled(cache[0], cache[1], args["k_new"], args["v_new"], PLAN)
    assert same_bits(cache[0], want["k"])
    assert same_bits(cache[1], want["v"])
    assert total == want["k"].sum()


def test_fake_tensors_write_nothing_and_return_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        k, v = (torch.empty(1, R, H, S, D) for _ in range(2))
        args = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in op_arguments(k, v)[2:]]
        assert torch.ops.mc.kv_splice_(k, v, *args) is None


def test_backend_that_cannot_serve() -> None:
    args = arguments()
    before = args["k"].clone()
    with pytest.raises(BackendError, match="kv_splice_: backend 'cuda' cannot serve"):
        kv_splice_(**args, backend="cuda")
    with pytest.raises(BackendError, match="expected one of ref, cpu, triton, cuda, got 'gpu'"):
        kv_splice_(**args, backend="gpu")
    assert same_bits(args["k"], before)


def test_autograd_sees_the_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that a graph saved must not be spliced unnoticed, also by an implementation that writes by address."""
    table = {"ref": Impl("kv_splice_", "ref", lambda *_: None)}
    monkeypatch.setitem(IMPLS, "kv_splice_", table)
    args = arguments()
    weight = torch.ones(D, requires_grad=True)
    loss = (args["k"] * weight).sum() + (args["v"] * weight).sum()
    versions = args["k"]._version, args["v"]._version
    kv_splice_(**args, backend="ref")
    assert args["k"]._version > versions[0]
    assert args["v"]._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), distance=st.integers(-150, 150))
def test_views_of_one_layout_share_what_they_name(data: st.DataObject, shape: list[int], distance: int) -> None:
    """Nested strides with gaps, dimensions in any order, one view shifted: against element numbers."""
    dims, step = [], 1
    for n in shape:
        step += data.draw(st.integers(0, 3))
        dims.append((n, step))
        step *= n
    sizes, strides = zip(*data.draw(st.permutations(dims)), strict=True)
    numbers = torch.arange(4096)
    views = [numbers.as_strided(sizes, strides, start) for start in (1024, 1024 + distance)]
    named = [set(view.flatten().tolist()) for view in views]
    assert shares_memory(*views) is bool(named[0] & named[1])
