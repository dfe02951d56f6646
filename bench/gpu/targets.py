"""What the kernels have to reach on an H100 or H200, and how a measurement is judged by it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Measure(Enum):
    """What a bound is held against, of one public call on cold inputs.

    LIMIT: share of the measured limit, at least, in calls that follow each other without a gap. CALL: seconds of a call
    from an idle device on, host code included, at most. DEVICE: seconds that its kernels run, at most. GRAPH: seconds
    per replay of a CUDA graph of the call, at most. ROPE: time with rotation on read over the time without, at most.
    TIMES: its kernels' time over what the measured limit allows, at most.
    """

    LIMIT = "of limit"
    CALL = "call"
    DEVICE = "device"
    GRAPH = "graph"
    ROPE = "with rope / without"
    TIMES = "device / limit"


@dataclass(frozen=True)
class Target:
    op: str
    case: str
    backend: str
    measure: Measure
    bound: float

    def met(self, measured: float | None) -> bool:
        """None: it could not be measured."""
        if measured is None:
            return False
        return measured >= self.bound if self.measure is Measure.LIMIT else measured <= self.bound

    @property
    def name(self) -> str:
        return f"{self.op.removesuffix('_')} {self.case} ({self.backend}), {self.measure.value}"


US = 1e-6
_TRITON = (
    ("kv_splice_", "Llama-3-8B/8k/ordered-rope/1-collapse", Measure.LIMIT, 0.8),
    ("kv_splice_", "Llama-3-8B/32k/ordered-rope/1-collapse", Measure.LIMIT, 0.8),
    ("kv_splice_", "Llama-3-8B/2k/slots/8-mixed", Measure.DEVICE, 20 * US),
    ("kv_splice_", "Llama-3-8B/32k/slots/8-mixed", Measure.DEVICE, 20 * US),
    ("collapse_", "Llama-3-8B/2k/8", Measure.DEVICE, 30 * US),
    ("lens_score", "Llama-3-8B/N8k", Measure.DEVICE, 40 * US),
    ("context_attention", "Llama-3-8B/8k/decode", Measure.LIMIT, 0.8),
    ("context_attention", "Llama-3-8B/32k/decode", Measure.LIMIT, 0.8),
    ("context_attention", "Llama-3-8B/32k/decode", Measure.ROPE, 1.06),
    ("gist_encode", "SmolLM2-135M/N4096", Measure.LIMIT, 0.6),
    ("gist_encode", "SmolLM2-135M/N1", Measure.CALL, 150 * US),
    ("gist_encode", "SmolLM2-135M/N1", Measure.GRAPH, 60 * US),
)
# gist_encode of one window is a read of the weights.
_CUDA = (
    ("kv_splice_", "Llama-3-8B/8k/ordered-rope/1-collapse", Measure.LIMIT, 0.9),
    ("kv_splice_", "Llama-3-8B/32k/ordered-rope/1-collapse", Measure.LIMIT, 0.9),
    ("kv_splice_", "Llama-3-8B/2k/slots/8-mixed", Measure.DEVICE, 8 * US),
    ("kv_splice_", "Llama-3-8B/32k/slots/8-mixed", Measure.DEVICE, 8 * US),
    ("lens_score", "Llama-3-8B/N8k", Measure.DEVICE, 25 * US),
    ("gist_encode", "SmolLM2-135M/N1", Measure.TIMES, 1.5),
    ("refocus_", "Llama-3-8B/8k/4-open-8-close", Measure.DEVICE, 150 * US),
)
TARGETS: tuple[Target, ...] = tuple(
    Target(op, case, backend, measure, bound)
    for backend, asked in (("triton", _TRITON), ("cuda", _CUDA))
    for op, case, measure, bound in asked
)
# Timed beside them, so that every op has a row and the table of `mc_kernels.preference` the shapes of both models;
# nothing is asked of these.
ALSO: tuple[tuple[str, str], ...] = (
    ("gist_pool", "SmolLM2-135M/N256"),
    ("gist_pool", "Llama-3-8B/N1"),
    ("context_attention", "SmolLM2-135M/2k/prefill512"),
    ("lens_score", "SmolLM2-135M/N32k"),
    ("kv_splice_", "SmolLM2-135M/8k/ordered-rope/1-collapse"),
    ("kv_splice_", "SmolLM2-135M/8k/slots/8-mixed"),
    ("context_attention", "SmolLM2-135M/2k/decode"),
    ("context_attention", "SmolLM2-135M/8k/decode"),
    ("context_attention", "Llama-3-8B/2k/decode"),
    ("context_attention", "Llama-3-8B/8k/decode-fp8"),
    ("context_attention", "Llama-3-8B/32k/decode-fp8"),
    ("lens_score", "SmolLM2-135M/N2k"),
    ("lens_score", "SmolLM2-135M/N8k"),
    ("gist_encode", "SmolLM2-135M/N8"),
    ("gist_encode", "Llama-3-8B/N1"),
    ("gist_pool", "SmolLM2-135M/N1"),
    ("collapse_", "SmolLM2-135M/2k/1-last"),
    ("collapse_", "SmolLM2-135M/2k/8"),
)
