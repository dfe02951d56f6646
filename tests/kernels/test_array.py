"""`mc_kernels.array` against the ops on torch's tensors: the same bits, from and to every kind of array."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_model import (
    DTYPES,
    EACH_DTYPE,
    EACH_KIND,
    as_numpy,
    check_result,
    encode_weights,
    lens_weights,
    maker,
    plan_of,
    pool_weights,
    rope_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splice_model import calls, memory, same_bits, seeded, to_pages
from torch import Tensor

import mc_kernels as mc
from mc_kernels import array, native
from mc_kernels.context_attention.cases import SMALL as ATTENTION
from mc_kernels.gist_encode.cases import EMPTY as NO_BLOCKS
from mc_kernels.gist_encode.cases import SMALL as ENCODE
from mc_kernels.gist_pool.cases import Case as Pool
from mc_kernels.gist_pool.collapse_cases import EMPTY as NO_COLLAPSE
from mc_kernels.gist_pool.collapse_cases import SMALL as COLLAPSE
from mc_kernels.lens_score.cases import EMPTY as NO_ENTRIES
from mc_kernels.lens_score.cases import SMALL as LENS

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")
WRITABLE = pytest.mark.parametrize("kind", ["numpy", "torch"])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls(), dtype=st.sampled_from(DTYPES))
def test_splice_of_drawn_calls(call: dict[str, Any], dtype: torch.dtype) -> None:
    """Plans of both disciplines, several a call, ropes, positions, pages, strides: the tensors' own path's bits."""
    cache, fresh = memory(call, dtype)
    more = {name: call[name] for name in ("rows", "positions", "new_positions") if name in call}
    several = isinstance(call["plan"], list)
    plans = [plan_of(p) for p in call["plan"]] if several else plan_of(call["plan"])
    given_pages: dict[str, Any] = {}
    pages: dict[str, Any] = {}
    if page := call["page_size"]:
        batch, per_row = cache[0].shape[1], max(-(-call["size"][2] // page), 1)
        table = torch.randperm(batch * per_row + 1, generator=seeded(5))[:-1].view(batch, per_row)
        cache = [to_pages(x, table, page) for x in cache]
        given_pages, pages = {"pages": mc.PageTable(table, page)}, {"pages": array.PageTable(table.int(), page)}
    if call["nhd"]:
        cache = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in cache]
    want = [x.clone() for x in cache]
    # NumPy has no bfloat16 of its own: there the tensors are handed over as they are, by DLPack.
    arrays = [x if dtype == torch.bfloat16 else as_numpy(x) for x in (*cache, *fresh)]
    mc.kv_splice_(*want, *fresh, call["plan"], call["rope"], **more, **given_pages, backend="cpu")
    array.kv_splice_(*arrays, plans, rope_of(call["rope"]), **more, **pages, n_threads=1 + call["seed"] % 3)
    for got, exact in zip(cache, want, strict=True):
        assert same_bits(got, exact)


@WRITABLE
@EACH_DTYPE
@pytest.mark.parametrize("case", [*COLLAPSE, *NO_COLLAPSE], ids=lambda c: c.name)
def test_collapse(kind: str, dtype: torch.dtype, case: Any) -> None:
    make = maker(kind, dtype)
    args, want = case.make(dtype), case.make(dtype)
    mc.collapse_(**want, backend="cpu")
    weights = pool_weights(args["weights"], make)
    indices = {name: args[name].numpy() for name in ("children", "slots", "moves")}
    array.collapse_(make(args["k"]), make(args["v"]), weights, **indices)
    for name in ("k", "v"):
        assert same_bits(args[name], want[name])


@EACH_KIND
@EACH_DTYPE
def test_pool(kind: str, dtype: torch.dtype) -> None:
    make = maker(kind, dtype)
    for case in (Pool("x", 2, 1, 3, 2, 32, 64), Pool("x", 2, 2, 2, 3, 5, 7, 2), Pool("empty", 1, 1, 2, 0, 4, 8)):
        k, v, weights = case.make(dtype)
        want = mc.gist_pool(k, v, weights, backend="cpu")
        got = array.gist_pool(make(k), make(v), pool_weights(weights, make))
        for a, b in zip(got, want, strict=True):
            check_result(a, b, kind)


@EACH_KIND
@EACH_DTYPE
@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: c.name)
def test_attention(kind: str, dtype: torch.dtype, case: Any) -> None:
    make = maker(kind, dtype)
    args = case.make(dtype)
    want = mc.context_attention(**args, return_lse=True, return_mass=True, backend="cpu")
    rope = rope_of(args.pop("rope"))
    got = array.context_attention(
        **{name: make(x) for name, x in args.items()}, rope=rope, return_lse=True, return_mass=True
    )
    for a, b in zip(got, want, strict=True):
        check_result(a, b, kind)
    alone = array.context_attention(*(make(args[name]) for name in ("q", "k", "v", "q_pos", "kv_pos")), None, scale=0.5)
    plain = mc.context_attention(*(args[n] for n in ("q", "k", "v", "q_pos", "kv_pos")), None, scale=0.5, backend="cpu")
    assert isinstance(plain, Tensor)
    check_result(alone, plain, kind)


@EACH_KIND
@EACH_DTYPE
@pytest.mark.parametrize("case", [*LENS, NO_ENTRIES], ids=lambda c: c.name)
def test_lens(kind: str, dtype: torch.dtype, case: Any) -> None:
    make = maker(kind, dtype)
    entries, features, queries, weights, legal = case.make(dtype)
    of_arrays = lens_weights(weights, make)
    for mask in (legal, None):
        want = mc.lens_score(entries, features, queries, weights, legal=mask, backend="cpu")
        got = array.lens_score(
            make(entries), make(features), make(queries), of_arrays, legal=None if mask is None else make(mask)
        )
        check_result(got, want, kind)


@EACH_KIND
@EACH_DTYPE
@pytest.mark.parametrize("case", [*ENCODE, NO_BLOCKS], ids=lambda c: c.name)
def test_encode(kind: str, dtype: torch.dtype, case: Any) -> None:
    make = maker(kind, dtype)
    blocks, weights = case.make(dtype)
    of_arrays = encode_weights(weights, make)
    want = mc.gist_encode(blocks, weights, level=case.level, backend="cpu")
    for _ in range(2):  # the second time from what was packed before
        check_result(array.gist_encode(make(blocks), of_arrays, level=case.level), want, kind)


def test_packed_weights_follow_the_instruction_set() -> None:
    blocks, weights = ENCODE[0].make(torch.bfloat16)
    of_arrays = encode_weights(weights, lambda x: x)
    try:
        for level in native.isa_levels():
            native.library().set_cpu_isa(level)
            want = mc.gist_encode(blocks, weights, backend="cpu")
            assert same_bits(array.gist_encode(blocks, of_arrays), want), level
    finally:
        native.library().set_cpu_isa(None)


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6, 8.5e5])
def test_frequencies_are_the_same(theta: float) -> None:
    for dim in (2, 64, 96, 128, 256):
        want = mc.RopeSpec.from_theta(theta, dim).inv_freq
        assert np.array_equal(array.RopeSpec.from_theta(theta, dim).inv_freq.astype(np.float32), want.numpy())


def environment_without_torch(folder: Path) -> Path:
    """The interpreter of a virtual environment that holds NumPy and nothing else."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, text=True, capture_output=True, check=True).stdout.strip())
    for name in ("numpy", "numpy.libs"):
        if (installed := Path(np.__file__).parents[1] / name).exists():
            (packages / name).symlink_to(installed)
    return python


# Reads inputs, runs the ops where torch is not installed, writes results.
ALONE = """
import importlib.util, json, sys
assert importlib.util.find_spec("torch") is None
import numpy as np
from mc_kernels import array
folder, (edits, encode, lens) = sys.argv[1], json.loads(sys.argv[2])
with np.load(folder + "/in.npz") as f:
    given = {name: f[name] for name in f.files}
rope = array.RopeSpec(given["inv_freq"])
weights = array.GistPoolWeights(*(given[n] for n in "wbmc"))
k, v = given["k"], given["v"]
plan = array.SplicePlan.from_edits(k.shape[2], [array.Edit(*e) for e in edits], capacity=k.shape[2])
blocks = [x[:, :, 8:40].reshape(*x.shape[:2], 1, 32, x.shape[3]) for x in (k, v)]
gists = array.gist_pool(*blocks, weights)
array.kv_splice_(k, v, *(x[:, :, 0] for x in gists), plan, rope)
out = array.context_attention(given["q"], k, v, given["q_pos"], given["kv_pos"], rope)
linear = array.fused_linear(given["q"], given["weight"], swiglu=True)
signed = array.signed_score(given["scores"], price=0.25)

def named(prefix):
    return {name.removeprefix(prefix): x for name, x in given.items() if name.startswith(prefix)}

gist = array.gist_encode(given["blocks"], array.GistEncodeWeights(named("encode."), **encode))
net = array.LensScoreWeights(named("lens."), **lens)
scores = array.lens_score(*(given[n] for n in ("entries", "features", "queries")), net, legal=given["legal"])
of_cache = named("collapse.")
pooled = array.GistPoolWeights(*(of_cache.pop(n) for n in "wbmc"))
cache = [of_cache.pop(n) for n in "kv"]
array.collapse_(*cache, pooled, **of_cache)
results = dict(k=k, v=v, out=out, linear=linear, signed=signed, gist=gist, lens=scores)
np.savez(folder + "/out.npz", **results, collapsed_k=cache[0], collapsed_v=cache[1])
print("alone")
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_where_torch_is_not_installed(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = seeded(3)
    k, v = (torch.randn(2, 3, 64, 64, generator=generator).to(dtype) for _ in range(2))
    weights = Pool("x", 2, 1, 3, 1, 32, 64).make(torch.float32)[2]
    q = torch.randn(2, 6, 1, 64, generator=generator).to(dtype)
    q_pos, kv_pos = torch.full((2, 1), 40), torch.arange(64).expand(2, -1).contiguous()
    rope = mc.RopeSpec.from_theta(1e4, 64)
    edits = [[8, 32, 1]]
    named = {"k": k, "v": v, "q": q, "q_pos": q_pos, "kv_pos": kv_pos, "inv_freq": rope.inv_freq}
    named |= dict(zip("wbmc", weights.tensors(), strict=True))
    named |= {"weight": torch.randn(32, 64, generator=generator).to(dtype), "scores": torch.randn(9, 2)}
    blocks, encode = ENCODE[0].make(dtype)
    *scored, lens, legal = LENS[0].make(dtype)
    collapsed = COLLAPSE[0].make(dtype)
    named |= {"blocks": blocks, "legal": legal, **dict(zip(("entries", "features", "queries"), scored, strict=True))}
    named |= {f"encode.{name}": x for name, x in encode.state_dict().items()}
    named |= {f"lens.{name}": x for name, x in lens.state_dict().items()}
    named |= dict(zip((f"collapse.{n}" for n in "wbmc"), collapsed["weights"].tensors(), strict=True))
    named |= {f"collapse.{name}": x for name, x in collapsed.items() if isinstance(x, Tensor)}
    fields = ("n_heads", "target_rms", "max_block_size", "pool", "rope_theta")
    told = [edits, {name: getattr(encode, name) for name in fields}, {"n_heads": lens.n_heads}]
    np.savez(tmp_path / "in.npz", **{name: x.numpy() for name, x in named.items()})
    # Torch may be installed beside the package.
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "mc_kernels").symlink_to(Path(mc.__file__).parent)
    done = subprocess.run(
        [environment_without_torch(tmp_path / "venv"), "-c", ALONE, str(tmp_path), json.dumps(told)], text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "packages")}, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "alone", done.stderr
    gists = mc.gist_pool(*(x[:, :, 8:40].unflatten(2, (1, 32)) for x in (k, v)), weights, backend="cpu")
    plan = mc.SplicePlan.from_edits(64, [mc.Edit(*e) for e in edits], capacity=64)
    mc.kv_splice_(k, v, *(x[:, :, 0] for x in gists), plan, rope, backend="cpu")
    mc.collapse_(**collapsed, backend="cpu")
    wanted = {
        "k": k,
        "v": v,
        "out": mc.context_attention(q, k, v, q_pos, kv_pos, rope, backend="cpu"),
        "linear": mc.fused_linear(q, named["weight"], swiglu=True, backend="cpu"),
        "signed": mc.signed_score(named["scores"], price=0.25),
        "gist": mc.gist_encode(blocks, encode, backend="cpu"),
        "lens": mc.lens_score(*scored, lens, legal=legal, backend="cpu"),
        "collapsed_k": collapsed["k"],
        "collapsed_v": collapsed["v"],
    }
    with np.load(tmp_path / "out.npz") as found:
        assert set(found.files) == set(wanted)
        for name, want in wanted.items():
            assert isinstance(want, Tensor)
            assert same_bits(torch.from_numpy(found[name]), want), name
