"""`collapse_` against a pooling and a splice of their own, in place over its inputs; errors, compilation, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splice_model import BACKENDS, DTYPES, same_bits
from torch import Tensor

from mc_kernels import BackendError, Edit, GistPoolWeights, SplicePlan, collapse_, gist_pool, kv_splice_, native
from mc_kernels.gist_pool.collapse_cases import CASES, EMPTY, SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
LEVELS = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "ref"], indirect=True)
needs_library = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")


def composed(case: Case, args: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """k and v after the entries were gathered and pooled by `gist_pool` and put in by `kv_splice_`."""
    k, v = args["k"].clone(), args["v"].clone()
    blocks = [
        x[:, :, :, case.plan.removed_slots].flatten(0, 1).unflatten(2, (case.blocks, case.block_size)) for x in (k, v)
    ]
    gists = gist_pool(*blocks, args["weights"], backend=backend)
    kv_splice_(k, v, *(x.flatten(2, 3) for x in gists), case.plan, backend=backend)
    return k, v


def in_use(case: Case, x: Tensor) -> Tensor:
    return x[..., : case.plan.new_length, :]


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL + EMPTY, ids=lambda c: c.name)
def test_it_is_a_pooling_and_a_splice(backend: str, case: Case, dtype: torch.dtype) -> None:
    args = case.make(dtype)
    want = composed(case, args, backend)
    before = args["k"].clone(), args["v"].clone()
    with poisoned_empty():
        collapse_(**args, backend=backend)
    for got, exact, old in zip((args["k"], args["v"]), want, before, strict=True):
        assert same_bits(in_use(case, got), in_use(case, exact))
        # Slots beyond the new length are sources or nothing: as they were.
        assert same_bits(got[..., case.plan.new_length :, :], old[..., case.plan.new_length :, :])


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_error_rule(backend: str, case: Case, dtype: torch.dtype) -> None:
    args = case.make(dtype, seed=3)
    wide = {
        **args,
        "k": args["k"].double(),
        "v": args["v"].double(),
        "weights": args["weights"].to(dtype=torch.float64),
    }
    plain = {**args, "k": args["k"].clone(), "v": args["v"].clone()}
    collapse_(**wide, backend="ref")
    collapse_(**plain, backend="ref")
    collapse_(**args, backend=backend)
    for name in ("k", "v"):
        assert_within_error_rule(args[name], wide[name], plain[name], what=name)


@EACH_BACKEND
def test_without_moves_only_the_named_slots_change(backend: str) -> None:
    case = SMALL[0]
    args = case.make(torch.float32) | {"moves": None}
    args["slots"] = args["children"][:, 3:4]
    before = args["k"].clone()
    collapse_(**args, backend=backend)
    changed = (args["k"] != before).any(-1).any(0).any(0).any(0)
    assert changed.nonzero().flatten().tolist() == args["slots"].flatten().tolist()


@EACH_BACKEND
def test_gists_over_the_children_of_other_blocks(backend: str) -> None:
    """Every slot that is written is read for another block, in an order that would show."""
    args = Case("x", 2, 2, 24, 128, 2).make(torch.float32)
    children = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64].view(2, 32)
    args |= {"children": children, "slots": torch.stack((children[1, :1], children[0, -1:])), "moves": None}
    k, v = args["k"].clone(), args["v"].clone()
    collapse_(**args, backend=backend)
    want = gist_pool(*(x[:, 0][:, :, children] for x in (k, v)), args["weights"], backend=backend)
    for x, old, gists in zip((args["k"], args["v"]), (k, v), want, strict=True):
        old[:, 0][:, :, args["slots"].flatten()] = gists[:, :, :, 0]
        assert max_error(x, old) < 1e-6  # sums of the oracle depend on strides


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    k, g, n = draw(st.integers(1, 20)), draw(st.integers(1, 3)), draw(st.integers(0, 4))
    length = n * k + draw(st.integers(1, 30))
    starts, rank = [], 0
    for gap in draw(st.lists(st.integers(0, max(length - n * k, 0) // max(n, 1)), min_size=n, max_size=n)):
        starts.append(rank + gap)
        rank += gap + k
    slots = torch.randperm(length, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    plan = SplicePlan.from_edits(
        length, [Edit(s, k, g) for s in starts], capacity=length + n * max(g - k, 0), discipline="slots", slots=slots
    )
    return {
        "plan": plan, "size": (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        "dim": draw(st.sampled_from([1, 3, 8, 16, 31, 33, 64, 80, 128])), "k": k, "g": g,
        "gap": draw(st.sampled_from([0, 1])), "nhd": draw(st.booleans()), "seed": draw(st.integers(0, 99)),
        "wide_weights": draw(st.booleans()),
    }  # fmt: skip


@needs_library
@LEVELS
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls(), dtype=st.sampled_from(DTYPES))
def test_drawn_calls_against_the_oracle(backend: str, call: dict[str, Any], dtype: torch.dtype) -> None:
    plan, (layers, batch, heads), dim = call["plan"], call["size"], call["dim"]
    made = Case("x", layers, heads, dim, plan.capacity, 0, batch=batch, block_size=call["k"], n_gists=call["g"])
    weights = made.weights(torch.float32 if call["wide_weights"] else dtype, "cpu", call["seed"])
    gen = torch.Generator().manual_seed(call["seed"])
    source = [torch.randn(layers, batch, heads, plan.capacity, dim, generator=gen).to(dtype) for _ in range(2)]
    guards = [Guarded(x.transpose(2, 3) if call["nhd"] else x, gap=call["gap"]) for x in source]
    views = [x.view.transpose(2, 3) if call["nhd"] else x.view for x in guards]
    more = {"children": plan.removed_slots.view(-1, call["k"]), "slots": plan.insert_slots.view(-1, call["g"])}
    exact = [x.double() for x in source]
    collapse_(*exact, weights.to(dtype=torch.float64), **more, moves=plan.segments, backend="ref")
    collapse_(*views, weights, **more, moves=plan.segments, backend=backend)
    written = torch.zeros(plan.capacity, dtype=torch.bool)
    written[plan.insert_slots] = True
    for got, e, guard in zip(views, exact, guards, strict=True):
        guard.check()
        assert same_bits(got[..., ~written, :], e.to(dtype)[..., ~written, :])
        # What is pooled itself is test_gist_pool_cpu's business.
        assert max_error(got, e) <= 2 * torch.finfo(dtype).eps * float(e.abs().max()) + 1e-5


@needs_library
@LEVELS
def test_threads_do_not_change_the_result(backend: str) -> None:
    case = Case("x", 12, 3, 64, 700, 9)
    threads = torch.get_num_threads()

    def run(seed: int) -> Tensor:
        args = case.make(torch.bfloat16, seed=seed)
        collapse_(**args, backend=backend)
        return args["k"]

    try:
        torch.set_num_threads(1)
        alone = [run(i) for i in range(3)]
        torch.set_num_threads(3)
        together = [run(i) for i in range(3)]
        with ThreadPoolExecutor(3) as pool:
            beside = list(pool.map(run, [0, 1, 2]))
    finally:
        torch.set_num_threads(threads)
    for want, *others in zip(alone, together, beside, strict=True):
        assert all(same_bits(x, want) for x in others)


def test_flattened_rows_are_the_same() -> None:
    args = SMALL[4].make(torch.float32)
    flat = {**args, "k": args["k"].flatten(0, 1).clone(), "v": args["v"].flatten(0, 1).clone()}
    collapse_(**args, backend="ref")
    version = flat["k"]._version
    collapse_(**flat, backend="ref")
    assert same_bits(flat["k"], args["k"].flatten(0, 1))
    assert flat["k"]._version > version


@EACH_BACKEND
def test_opcheck_and_compile(backend: str) -> None:
    case = SMALL[2]
    args = case.make(torch.float32)
    k, v = args["k"].clone(), args["v"].clone()
    flat = (k, v, *args["weights"].tensors(), args["children"], args["slots"], args["moves"])
    torch.library.opcheck(torch.ops.mc.collapse_.default, (*flat, backend))

    def call(k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        collapse_(k, v, GistPoolWeights(*weights), args["children"], args["slots"], moves=args["moves"])
        return k.sum()

    torch.compile(call, fullgraph=True, backend="aot_eager")(k, v, *args["weights"].tensors())
    collapse_(**args, backend=backend)
    assert max_error(k, args["k"]) < 1e-5
    assert max_error(v, args["v"]) < 1e-5


def test_bad_arguments_are_named_before_anything_is_written() -> None:
    case = SMALL[0]
    args = case.make(torch.float32)
    k, v, w, children, slots = (args[n] for n in ("k", "v", "weights", "children", "slots"))
    old = k.clone(), v.clone()
    flat, same = (k[:1].flatten(0, 1), v[:1].flatten(0, 1)), k[:, :, :1].expand(k.shape)
    trained = GistPoolWeights(w.w, w.b, w.m, w.c.clone().requires_grad_())
    far, twice = torch.tensor([[40]]), torch.tensor([[3], [3]])
    bad: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "weights: expected GistPoolWeights", lambda: collapse_(k, v, w.w, children, slots)),  # type: ignore[arg-type]
        (TypeError, "k: expected a tensor", lambda: collapse_(None, v, w, children, slots)),  # type: ignore[arg-type]
        (TypeError, "v: expected dtype float32 as k", lambda: collapse_(k, v.half(), w, children, slots)),
        (TypeError, "weights: expected device", lambda: collapse_(k, v, w.to("meta"), children, slots)),
        (ValueError, "k: expected shape", lambda: collapse_(k[:1], v[:1], w, children, slots)),
        (ValueError, "k: expected shape", lambda: collapse_(k[0, 0], v[0, 0], w, children, slots)),
        (ValueError, "k: expected R that", lambda: collapse_(*flat, w, children, slots)),
        (ValueError, "v: expected shape", lambda: collapse_(k, v[..., :9, :], w, children, slots)),
        (ValueError, "v: expected memory apart", lambda: collapse_(k, k, w, children, slots)),
        (ValueError, "k: expected a view without", lambda: collapse_(same, v, w, children, slots)),
        (ValueError, "k: expected a contiguous", lambda: collapse_(k.mT.contiguous().mT, v, w, children, slots)),
        (ValueError, "weights: expected no gradient", lambda: collapse_(k, v, trained, children, slots)),
        (ValueError, "k: expected no gradient", lambda: collapse_(k.clone().requires_grad_(), v, w, children, slots)),
        (TypeError, "children: expected dtype", lambda: collapse_(k, v, w, children.float(), slots)),
        (ValueError, "children: expected shape", lambda: collapse_(k, v, w, children[:, :5], slots)),
        (ValueError, "children: expected slots in 0..39", lambda: collapse_(k, v, w, children - 99, slots)),
        (ValueError, "slots: expected shape", lambda: collapse_(k, v, w, children, slots[:0])),
        (ValueError, "slots: expected slots in 0..39", lambda: collapse_(k, v, w, children, far)),
        (ValueError, "slots: expected each slot once", lambda: collapse_(k, v, w, children.repeat(2, 1), twice)),
        (ValueError, "moves: expected shape", lambda: collapse_(k, v, w, children, slots, moves=slots)),
        (ValueError, "moves[0]: expected slots within 40",
         lambda: collapse_(k, v, w, children, slots, moves=torch.tensor([[30, 2, 11]]))),
        (BackendError, "backend", lambda: collapse_(k, v, w, children, slots, backend="abacus")),
    ]  # fmt: skip
    for kind, words, fn in bad:
        with pytest.raises(kind) as caught:
            fn()
        assert words in str(caught.value), str(caught.value)
    assert same_bits(k, old[0])
    assert same_bits(v, old[1])


def test_cases_count_what_they_touch() -> None:
    last = next(c for c in CASES if c.name == "SmolLM2-135M/2k/1-last")
    spread = next(c for c in CASES if c.name == "SmolLM2-135M/2k/1")
    assert last.plan.moves.shape[0] == 0
    assert spread.plan.moves.shape[0] == 31
    assert spread.bytes(torch.bfloat16) - last.bytes(torch.bfloat16) == 31 * 30 * 3 * 2 * 64 * 2 * 2
    assert spread.flops() == last.flops()
