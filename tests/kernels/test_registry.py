"""The selection of an implementation: preference, names, the environment, reasons, one log line a fallback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mc_kernels import BackendError, availability, context_attention, registry
from mc_kernels.registry import ENV_BACKEND, IMPLS, register, select


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh op name; whatever is registered under it goes away. The environment names no backend."""
    monkeypatch.delenv(ENV_BACKEND, raising=False)
    name = f"op_of_{request.node.name}"
    yield name
    IMPLS.pop(name, None)


def add(op: str, backend: str, **kwargs: Any) -> None:
    register(op, backend, **kwargs)(lambda *_: backend)


@pytest.mark.parametrize(
    ("have", "device", "want"),
    [
        (("ref",), "cpu", "ref"),
        (("ref", "cpu"), "cpu", "cpu"),
        (("ref", "cpu", "triton", "cuda"), "cpu", "cpu"),
        (("ref", "triton"), "cpu", "ref"),
        (("ref", "cpu", "triton", "cuda"), "cuda", "triton"),
        (("ref", "cpu", "cuda"), "cuda", "cuda"),
        (("ref", "cpu", "triton"), "cuda", "triton"),
        (("ref", "cpu"), "cuda", "ref"),
        (("ref", "cuda"), "meta", "ref"),
    ],
)
def test_preference(op: str, have: tuple[str, ...], device: str, want: str) -> None:
    for backend in have:
        add(op, backend)
    assert select(op, None, device)() == want


def test_a_name_wins_over_the_environment(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("ref", "cpu", "triton"):
        add(op, backend)
    monkeypatch.setenv(ENV_BACKEND, "ref")
    assert select(op, None, "cpu")() == "ref"
    assert select(op, "triton", "cpu")() == "triton"
    monkeypatch.setenv(ENV_BACKEND, "")
    assert select(op, None, "cpu")() == "cpu"


@pytest.mark.parametrize("through", ["argument", "environment"])
@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("gpu", "backend: expected one of ref, cpu, triton, cuda, got 'gpu'"),
        ("cuda", "backend 'cuda' cannot serve: not implemented (have: cpu, ref, triton)"),
        ("cpu", "backend 'cpu' cannot serve: no AVX2 here"),
        ("triton", "backend 'triton' cannot serve: D=7 is odd"),
    ],
)
def test_a_named_backend_gives_its_reason(
    op: str, named: str, words: str, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(op, "ref")
    add(op, "cpu", available=lambda: "no AVX2 here")
    add(op, "triton", supports=lambda d: f"D={d} is odd" if d % 2 else None)
    if through == "environment":
        monkeypatch.setenv(ENV_BACKEND, named)
    with pytest.raises(BackendError) as caught:
        select(op, named if through == "argument" else None, "cpu", (7,))
    assert words in str(caught.value)


def test_supports_sees_the_arguments(op: str) -> None:
    add(op, "ref")
    add(op, "cpu", supports=lambda d: f"D={d} is odd" if d % 2 else None)
    assert select(op, None, "cpu", (8,))() == "cpu"
    assert select(op, None, "cpu", (7,))() == "ref"
    assert select(op, "cpu", "cpu", (8,))() == "cpu"


def test_an_unavailable_backend_is_not_asked_for_support(op: str) -> None:
    def supports(*_: Any) -> str | None:
        raise AssertionError("asked")

    add(op, "ref")
    add(op, "cpu", available=lambda: "not built", supports=supports)
    assert select(op, None, "cpu")() == "ref"


def test_a_fallback_is_logged_once(op: str, caplog: pytest.LogCaptureFixture) -> None:
    add(op, "ref")
    add(op, "triton", available=lambda: "no driver")
    add(op, "cuda", supports=lambda d: f"D={d}")
    with caplog.at_level(logging.WARNING, logger="mc_kernels"):
        for _ in range(3):
            select(op, None, "cuda", (7,))
        assert [r.getMessage() for r in caplog.records] == [
            f"{op}: triton cannot serve (no driver); using ref",
            f"{op}: cuda cannot serve (D=7); using ref",
        ]
        select(op, None, "cuda", (9,))  # another reason is news
    assert len(caplog.records) == 3


def test_a_preferred_backend_that_serves_is_not_logged(op: str, caplog: pytest.LogCaptureFixture) -> None:
    add(op, "ref")
    add(op, "cpu")
    with caplog.at_level(logging.WARNING, logger="mc_kernels"):
        select(op, None, "cpu")
        select(op, "ref", "cpu")
    assert not caplog.records


def test_nothing_can_serve(op: str) -> None:
    with pytest.raises(BackendError, match="no backend can serve on cpu: nothing is registered"):
        select(op, None, "cpu")
    add(op, "ref", supports=lambda: "never")
    with pytest.raises(BackendError, match="no backend can serve on cpu: ref: never"):
        select(op, None, "cpu")
    with pytest.raises(BackendError, match=r"not implemented \(have: none\)"):
        select(op + "_other", "ref", "cpu")


def test_register(op: str) -> None:
    with pytest.raises(ValueError, match="backend: expected one of ref, cpu, triton, cuda, got 'tpu'"):
        register(op, "tpu")
    assert op not in IMPLS
    add(op, "ref", available=lambda: "first")
    add(op, "ref")  # replaces
    assert availability()[op] == {"ref": None}
    add(op, "cpu", available=lambda: "not built")
    assert availability()[op] == {"ref": None, "cpu": "not built"}


def test_backends_are_listed_oracle_first(op: str) -> None:
    for backend in ("cuda", "cpu", "ref", "triton"):
        add(op, backend)
    assert list(IMPLS[op]) == list(registry.BACKENDS)


def test_every_op_has_its_oracle() -> None:
    for name in ("context_attention", "context_attention_backward", "kv_splice_"):
        assert availability()[name]["ref"] is None
    assert registry.PREFERENCE["cpu"][-1] == registry.PREFERENCE["cuda"][-1] == "ref"


def test_the_selector_is_below_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A public call reaches whatever is registered; the environment decides at the time of the call."""
    served = []

    def counting(*args: Any) -> Any:
        served.append(args[0].shape)
        return IMPLS["context_attention"]["ref"].fn(*args)

    table = dict(IMPLS["context_attention"])
    table["cuda"] = registry.Impl("context_attention", "cuda", counting)
    monkeypatch.setitem(IMPLS, "context_attention", table)
    monkeypatch.delenv(ENV_BACKEND, raising=False)
    q, pos = torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)
    context_attention(q, q, q, pos, pos, None)
    assert not served
    monkeypatch.setenv(ENV_BACKEND, "cuda")
    context_attention(q, q, q, pos, pos, None)
    assert served == [q.shape]
    context_attention(q, q, q, pos, pos, None, backend="ref")
    assert len(served) == 1
