"""The table of measured backends: its keys, what it does to the selection, and what a malformed one says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_kernels import for_graphs, preference, registry
from mc_kernels.context_attention.cases import SMALL as ATTENTION
from mc_kernels.kv_splice.cases import SMALL as SPLICES
from mc_kernels.preference import BUCKETS, at_least, key, load, table
from mc_kernels.registry import ENV_BACKEND, IMPLS, Impl, select

MEASURED = {"gpu": "a card", "date": "2030-01-01"}
Refusals = dict[str, str | None]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], Path]:
    """Write a page and let the registry read it in place of the package's table."""
    path = tmp_path / "preference.json"

    def write(page: object) -> Path:
        path.write_text(page if isinstance(page, str) else json.dumps(page))
        monkeypatch.setattr(preference, "table", lambda: load(path))
        return path

    monkeypatch.delenv(ENV_BACKEND, raising=False)
    return write


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op whose bucket is the size of its first argument, served by all backends."""
    name = "made_up"
    monkeypatch.setitem(BUCKETS, name, lambda x, *_: f"size={at_least(x.numel())}")
    serve(monkeypatch, name)
    return name


def serve(
    monkeypatch: pytest.MonkeyPatch, op: str, absent: Refusals | None = None, refuse: Refusals | None = None
) -> None:
    def impl(backend: str) -> Impl:
        return Impl(
            op, backend, lambda *_: backend,
            available=lambda: (absent or {}).get(backend), supports=lambda *_: (refuse or {}).get(backend),
        )  # fmt: skip

    monkeypatch.setitem(IMPLS, op, {name: impl(name) for name in ("ref", "triton", "cuda")})


def page(op: str, buckets: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """buckets: by name, the parts of each backend, or the device's seconds alone."""
    full: Any = buckets
    if isinstance(buckets, dict):
        full = {
            bucket: {b: {"device": x} if isinstance(x, float) else x for b, x in backends.items()}
            for bucket, backends in buckets.items()
        }
    return {"about": "", "measured": MEASURED, "seconds": {op: {dtype: full}}}


def served(op: str, size: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Any:
    return select(op, None, device, (torch.empty(size, dtype=dtype),))()


def test_sizes_fall_into_powers_of_four() -> None:
    buckets = {n: at_least(n) for n in (0, 1, 3, 4, 15, 16, 4095, 4096, 16383, 16384)}
    assert list(buckets.values()) == ["0", "1+", "1+", "4+", "4+", "16+", "1024+", "4096+", "4096+", "16384+"]


def test_the_faster_backend_serves_its_bucket(op: str, use: Callable[[object], Path]) -> None:
    use(page(op, {"size=1+": {"triton": 2e-6, "cuda": 1e-6}, "size=4+": {"cuda": 3e-6, "triton": 2e-6}}))
    assert [served(op, n) for n in (1, 3, 4, 15)] == ["cuda", "cuda", "triton", "triton"]
    # What was not measured, another dtype and another device: the fallback order.
    assert served(op, 16) == "triton"
    assert served(op, 1, torch.bfloat16) == "triton"
    assert served(op, 1, device="cpu") == "ref"
    assert select(op, "triton", "cuda", (torch.empty(1),))() == "triton", "a name wins"


def test_the_slower_of_host_and_device_counts_but_in_graphs(op: str, use: Callable[[object], Path]) -> None:
    triton, cuda = {"device": 1e-6, "host": 9e-6}, {"device": 2e-6, "host": 3e-6}
    use(page(op, {"size=1+": {"triton": triton, "cuda": cuda}}))
    assert served(op, 1) == "cuda"
    with for_graphs():
        assert served(op, 1) == "triton"
        with for_graphs():
            assert served(op, 1) == "triton"
        assert served(op, 1) == "triton"
        with ThreadPoolExecutor(1) as others:
            assert others.submit(served, op, 1).result() == "cuda", "another thread's calls are its own"
        assert served(op, 16) == "triton", "not measured: the fallback order"
        assert select(op, "cuda", "cuda", (torch.empty(1),))() == "cuda", "a name wins"
    with pytest.raises(ZeroDivisionError), for_graphs():
        raise ZeroDivisionError
    assert served(op, 1) == "cuda"
    use(page(op, {"size=1+": {"triton": {"device": 2.5e-6}, "cuda": cuda}}))
    assert served(op, 1) == "triton", "without a host's part the device's is all"


def test_other_ops_keep_the_fallback_order(
    op: str, use: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, "made_up_backward")
    use(page(op, {"size=1+": {"triton": 2e-6, "cuda": 1e-6}}))
    assert served("made_up_backward", 1) == "triton"


@pytest.mark.parametrize("how", ["absent", "refuse"])
def test_a_preferred_backend_that_cannot_serve_is_replaced(
    how: str, op: str, use: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(page(op, {"size=1+": {"triton": 2e-6, "cuda": 1e-6}}))
    reason = f"{how} in this test"
    serve(monkeypatch, op, **{how: {"cuda": reason}})
    with caplog.at_level(logging.WARNING, logger="mc_kernels"):
        assert [served(op, 1), served(op, 1)] == ["triton", "triton"]
    assert [r.getMessage() for r in caplog.records] == [f"{op}: cuda cannot serve ({reason}); using triton"]
    serve(monkeypatch, op, **{how: {"cuda": reason, "triton": reason}})
    assert served(op, 1) == "ref"


def test_a_backend_that_was_not_measured_comes_behind(
    op: str, use: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(page(op, {"size=1+": {"cuda": 1e-6}}))
    assert served(op, 1) == "cuda"
    serve(monkeypatch, op, absent={"cuda": "gone"})
    assert served(op, 1) == "triton"


def test_the_key_of_a_splice() -> None:
    """Its kind, the head's width, and the keys that it writes."""
    case = next(c for c in SPLICES if c.name == "small-ordered-rope-1collapse")
    seen: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        impl = Impl("kv_splice_", "ref", lambda *args: seen.append(args))
        patch.setitem(IMPLS["kv_splice_"], "ref", impl)
        from mc_kernels import kv_splice_

        inputs = case.make(torch.bfloat16)
        kv_splice_(**inputs, backend="ref")
        kv_splice_(**inputs | {"rope": None}, backend="ref")
    # Two rows of two heads: 17 entries move and one is inserted; with rotation those before them are looked at too.
    assert case.plan.moves.shape[0] == 17
    assert int(case.plan.stays[:, 2].sum()) == 20
    assert key("kv_splice_", seen[0]) == ("kv_splice_", "bfloat16", f"ordered rope D=8 vectors={at_least(4 * 38)}")
    assert key("kv_splice_", seen[1]) == ("kv_splice_", "bfloat16", f"ordered D=8 vectors={at_least(4 * 18)}")


def test_the_key_of_an_attention() -> None:
    args = ATTENTION[0].make(torch.float16)
    want = "D=16 groups=4+ rows=1+ slots=16+"
    assert key("context_attention", [args["q"], args["k"], args["v"]]) == ("context_attention", "float16", want)
    fp8 = args["k"].to(torch.float8_e4m3fn)
    assert key("context_attention", [args["q"], fp8, fp8]) == ("context_attention", "float16", f"fp8 {want}")


def test_the_table_that_comes_with_the_package() -> None:
    """No GPU has measured anything: it is empty and says so, and the fallback order serves."""
    found = table()
    assert found.measured is None
    assert found.orders == {}
    said = json.loads(preference.FILE.read_text())["about"]
    assert said == preference.ABOUT
    assert "nothing has been measured yet" in said
    fallback = registry.PREFERENCE["cuda"]
    assert all(found.order(op, (), fallback) is fallback for op in BUCKETS)


GOOD = {"triton": 2e-6, "cuda": 1e-6}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("{", "expected a JSON table of measured backends"),
        ([], "preference.json: expected an object, got []"),
        ({"measured": None, "seconds": {}, "more": 1}, "expected some of about, measured, seconds, got more"),
        ({"measured": None}, "seconds: expected an object, got null"),
        (page("kv_splice", {}), "seconds: expected some of kv_splice_, .*, got kv_splice"),
        (page("lens_score", []), "seconds.lens_score.float32: expected an object, got []"),  # type: ignore[arg-type]
        (page("lens_score", {"a": {}}), "seconds.lens_score.float32.a: expected the seconds of at least one backend"),
        (page("lens_score", {"a": {"cpu": 1.0}}), "float32.a: expected some of triton, cuda, got cpu"),
        (page("lens_score", {"a": {"cuda": 1}}), "a.cuda: expected an object, got 1"),
        (page("lens_score", {"a": {"cuda": {"device": 0}}}), "a.cuda.device: expected seconds above 0, got 0"),
        (page("lens_score", {"a": {"cuda": float("nan")}}), "a.cuda.device: expected seconds above 0, got NaN"),
        (page("lens_score", {"a": {"cuda": {"device": 1.0, "host": True}}}), "a.cuda.host: expected .* got true"),
        (page("lens_score", {"a": {"cuda": {"host": 1.0}}}), "a.cuda.device: expected seconds above 0, got none"),
        (page("lens_score", {"a": {"cuda": {"wall": 1.0}}}), "a.cuda: expected some of device, host, got wall"),
        (page("lens_score", {"a": GOOD}) | {"measured": None}, "measured: expected what .* were measured on, got null"),
        (page("lens_score", {"a": GOOD}) | {"measured": {"gpu": 1}}, "measured.gpu: expected a text, got 1"),
    ],
)  # fmt: skip
def test_a_malformed_table_says_what_is_wrong(
    broken: object, words: str, op: str, use: Callable[[object], Path]
) -> None:
    path = use(broken)
    with pytest.raises(ValueError, match=words.replace("[", r"\[")) as caught:
        served(op, 1)
    assert str(path) in str(caught.value)
    assert select(op, "triton", "cuda", (torch.empty(1),))() == "triton", "a named backend needs no table"


def test_a_table_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.json: expected a JSON table"):
        load(tmp_path / "gone.json")
