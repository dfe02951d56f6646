"""What the CPU kernels have to reach on two threads, and how a row is judged by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ..peers.llama_cpp import bytes_touched
from ..rows import Row
from ..workloads import CASES

OURS = "cpu"


class Measure(Enum):
    """What a bound is held against, of one public call on cold inputs.

    LIMIT: share of the measured limit, bandwidth or matrix rate, at least. COPY, READ: the same of the rate at which
    torch copies or reads memory, whatever the arithmetic costs. FASTER: a rival's time over ours, at least. PER_BYTE:
    the same, each time over the bytes that it reads and writes. SHARE: our time over that of another case, at most.
    """

    LIMIT = "of the limit"
    COPY = "of copy bandwidth"
    READ = "of read bandwidth"
    FASTER = "times faster than"
    PER_BYTE = "times faster per byte than"
    SHARE = "of the time of"


@dataclass(frozen=True)
class Target:
    """against: the rival or the other case of FASTER, PER_BYTE and SHARE."""

    op: str
    case: str
    dtype: torch.dtype
    measure: Measure
    bound: float
    against: str = ""

    def met(self, measured: float | None) -> bool:
        """None: it could not be measured."""
        if measured is None:
            return False
        return measured <= self.bound if self.measure is Measure.SHARE else measured >= self.bound

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.removesuffix('_')} {self.case} {dtype}: {self.measure.value} {self.against}".rstrip()


def case_of(op: str, name: str) -> Any:
    return next(case for case in CASES[op] if case.name == name)


def measure(target: Target, rows: Sequence[Row], limits: Mapping[str, Any]) -> float | None:
    """The figure that a target is about, or None where a row that it needs has no time (absent, wrong, not begun).

    limits: as `Limits.describe` gives them.
    """

    def found(case: str, backend: str) -> Row | None:
        key = target.op.removesuffix("_"), case, backend, str(target.dtype).removeprefix("torch.")
        one = next((r for r in rows if (r.op, r.case, r.backend, r.dtype) == key), None)
        return None if one is None or one.median_s is None else one

    ours = found(target.case, OURS)
    if ours is None or ours.median_s is None:
        return None
    if target.measure is Measure.LIMIT:
        return ours.fraction_of_limit
    if target.measure is Measure.READ:
        return ours.bytes / ours.median_s / float(limits["read_bandwidth"])
    if target.measure is Measure.COPY:
        # Rounds were held against the faster of a copy and a rewrite in place.
        faster = max(limits["copy_bandwidth"], limits["update_bandwidth"])
        return None if ours.fraction_of_limit is None else ours.fraction_of_limit * faster / limits["copy_bandwidth"]
    if target.measure is Measure.SHARE:
        other = found(target.against, OURS)
        return None if other is None or other.median_s is None else ours.median_s / other.median_s
    rival = found(target.case, target.against)
    if rival is None or rival.median_s is None:
        return None
    faster = rival.median_s / ours.median_s
    if target.measure is Measure.PER_BYTE:
        faster *= ours.bytes / bytes_touched(case_of(target.op, target.case), target.dtype)
    return faster


MODELS = ("SmolLM2-135M", "Llama-3-8B")
BF16, FP32 = torch.bfloat16, torch.float32
EDITS = ("1-collapse", "8-mixed")


def _splice(model: str, dtype: torch.dtype) -> list[Target]:
    out = []
    for edits in EDITS:
        ordered = f"{model}/8k/ordered-rope/{edits}"
        out += [
            Target("kv_splice_", ordered, dtype, Measure.COPY, 0.85),
            Target("kv_splice_", ordered, dtype, Measure.FASTER, 12.0, "torch"),
        ]
        slots, tail = f"{model}/32k/slots/{edits}", f"{model}/32k/ordered-rope/{edits}"
        out.append(Target("kv_splice_", slots, dtype, Measure.SHARE, 0.02, tail))
    first = f"{model}/8k/ordered-rope/{EDITS[0]}"
    out.append(Target("kv_splice_", first, dtype, Measure.FASTER, 5.0, "torch.compile"))
    out.append(Target("kv_splice_", first, dtype, Measure.PER_BYTE, 1.5, "llama.cpp"))
    return out


def _attention(model: str) -> list[Target]:
    out = []
    for slots in ("2k", "8k", "32k"):
        decode = f"{model}/{slots}/decode"
        out += [
            Target("context_attention", decode, BF16, Measure.READ, 0.8),
            Target("context_attention", decode, BF16, Measure.FASTER, 1.1, "SDPA, keys rotated before"),
            Target("context_attention", decode, BF16, Measure.FASTER, 4.0, "SDPA"),
        ]
    prefill = f"{model}/2k/prefill512"
    out.append(Target("context_attention", prefill, BF16, Measure.FASTER, 1.0, "SDPA, keys rotated before"))
    return out


def _pool(model: str, dtype: torch.dtype) -> list[Target]:
    return [
        Target("collapse_", f"{model}/2k/1-last", dtype, Measure.READ, 1 / 1.2),
        Target("gist_pool", f"{model}/N1", dtype, Measure.READ, 0.8),
        Target("gist_pool", f"{model}/N256", dtype, Measure.READ, 0.8),
    ]


def _lens(model: str) -> list[Target]:
    out = []
    for entries in ("2k", "8k", "32k"):
        case = f"{model}/N{entries}"
        out += [
            Target("lens_score", case, BF16, Measure.READ, 0.8),
            Target("lens_score", case, BF16, Measure.FASTER, 20.0, "torch"),
        ]
    out.append(Target("lens_score", f"{model}/N2k", BF16, Measure.FASTER, 10.0, "torch.compile"))
    return out


def _encode(model: str) -> list[Target]:
    one, many = f"{model}/N1", f"{model}/N512"
    return [
        Target("gist_encode", one, BF16, Measure.READ, 1 / 1.3),
        Target("gist_encode", one, BF16, Measure.FASTER, 1.6, "torch"),
        Target("gist_encode", one, BF16, Measure.FASTER, 1.6, "torch.compile"),
        Target("gist_encode", many, BF16, Measure.LIMIT, 0.6),
        Target("gist_encode", many, BF16, Measure.FASTER, 3.5, "torch"),
        Target("gist_encode", many, BF16, Measure.FASTER, 1.7, "torch.compile"),
    ]


TARGETS: tuple[Target, ...] = tuple(
    target
    for model in MODELS
    for group in (
        *(_splice(model, dtype) for dtype in (BF16, FP32)),
        _attention(model),
        *(_pool(model, dtype) for dtype in (BF16, FP32)),
        _lens(model),
        _encode(model),
    )
    for target in group
)
