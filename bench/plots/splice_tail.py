"""What a splice costs by the length of what stands behind it: one collapse near the front of a cache.

In the ordered discipline the tail moves, in slots not. SmolLM2-135M's shape; all layers in one call, cold caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mc_kernels import Edit, SplicePlan
from mc_kernels.kv_splice.cases import Case

from ..limits import Limits, flusher
from ..machine import describe, last_level_cache
from ..suite import Options, plan_cache
from ..timing import Burst, interleave
from ..workloads.base import Candidate
from ..workloads.kv_splice import KvSplice

# The edit: 32 entries become one, behind a system prompt.
START = 64
LENGTHS = (2048, 4096, 8192, 16384, 32768)
VARIANTS = {
    "ordered, keys rotated": ("ordered", True),
    "ordered": ("ordered", False),
    "slots": ("slots", False),
}
PLAIN = "torch"


@dataclass(frozen=True)
class FrontCollapse(Case):
    """One collapse at rank START of `length` entries."""

    @cached_property
    def plan(self) -> SplicePlan:
        edits = [Edit(START, self.span, 1)]
        return SplicePlan.from_edits(self.length, edits, capacity=self.capacity, discipline=self.discipline)

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """As `Case.make`, but all layers hold the numbers of one: drawing them all takes longer than the splices."""
        one = Case.make(replace(self, layers=1), dtype, device, seed)
        cache = torch.stack([one[x].expand(self.layers, -1, -1, -1, -1) for x in ("k", "v")], dim=1)
        new = {x: one[x].repeat(self.layers, 1, 1, 1) for x in ("k_new", "v_new")}
        return {"k": cache[:, 0], "v": cache[:, 1], **new, "plan": self.plan, "rope": one["rope"]}


def measure(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    lengths: Sequence[int] = LENGTHS,
    *,
    layers: int = 30,
    seconds: float = 0.2,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Time every available backend and plain PyTorch on tails of `lengths` entries; `seconds` per point.

    Returns a JSON-ready dict: `series` (variant, backend, and one tail, median_s and spread a point), `floor` (variant,
    tail, seconds: the least traffic over the copy bandwidth) and `skipped` (backend: why it is not among the series). A
    backend that the oracle rejects on the shortest tail is skipped.
    """
    limits = limits or Limits(device, seconds=0.2)
    bandwidth = limits.rate(limits.copy.name)
    series: dict[tuple[str, str], dict[str, Any]] = {}
    floor: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for variant, (discipline, rope) in VARIANTS.items():
        bound: dict[str, Any] = {"variant": variant, "tail": [], "seconds": []}
        floor.append(bound)
        for tail in sorted(lengths):
            case = FrontCollapse(
                f"front/{variant}/{tail}", layers, 3, 64, START + 32 + tail, discipline=discipline, rope=rope,
                theta=100_000.0,
            )  # fmt: skip
            cache = plan_cache(KvSplice.op, case, Options(device, dtype))
            work = KvSplice(case, dtype, device, cache.copies)
            candidates = _candidates(work, skipped)
            if tail == min(lengths):
                candidates = _right(work, candidates, variant, skipped)
            else:
                candidates = [c for c in candidates if (variant, c.name) in series]
            flush = flusher(device, last_level_cache(device)) if cache.flush else None
            bursts = [Burst(c.run, [c.prepare(x) for x in work.inputs]) for c in candidates]
            timed = interleave(bursts, device, seconds=seconds * len(bursts), min_rounds=2, flush=flush)
            bound["tail"].append(tail)
            bound["seconds"].append(work.bytes / bandwidth)
            for candidate, t in zip(candidates, timed, strict=True):
                line = series.setdefault(
                    (variant, candidate.name),
                    {"variant": variant, "backend": candidate.name, "tail": [], "median_s": [], "spread": []},
                )
                line["tail"].append(tail)
                line["median_s"].append(t.median)
                line["spread"].append(t.spread)
    return {
        "machine": describe(device), "dtype": str(dtype).removeprefix("torch."), "layers": layers,
        "edit": {"start": START, "remove": 32, "insert": 1}, "copy_bandwidth": bandwidth,
        "series": list(series.values()), "floor": floor, "skipped": skipped,
    }  # fmt: skip


def _candidates(work: KvSplice, skipped: dict[str, str]) -> list[Candidate]:
    """Our backends that can run here, and plain PyTorch."""
    found = [Candidate(PLAIN, work.plain, result=work.result)]
    for name, candidate in work.backends():
        if isinstance(candidate, str):
            skipped[name] = candidate
        else:
            found.append(candidate)
    return found


def _right(work: KvSplice, candidates: Sequence[Candidate], variant: str, skipped: dict[str, str]) -> list[Candidate]:
    """Those whose result the oracle accepts."""
    right = []
    for candidate in candidates:
        try:
            reason = work.check(candidate).reason()
        except Exception as error:  # one broken backend must not end the run: the picture's data say why it is missing
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            right.append(candidate)
        else:
            skipped[f"{candidate.name}, {variant}"] = reason
    return right


def _style(backend: str, markers: dict[str, str]) -> dict[str, Any]:
    if backend == PLAIN:
        return {"linestyle": ":", "marker": "o", "fillstyle": "none"}
    return {"linestyle": "-", "marker": markers.get(backend, "P")}


def draw(data: dict[str, Any], path: Path) -> None:
    """Write a PNG of what `measure` returned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    from .roofline import DPI, FONT, INK, MARKERS, WIDTH, where

    colours = dict(zip(VARIANTS, ("#D55E00", "#0072B2", "#009E73"), strict=True))
    with plt.rc_context({"font.size": FONT, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axis = plt.subplots(figsize=(WIDTH, 7.2), layout="constrained")
        for line in data["series"]:
            axis.plot(
                line["tail"], [1e3 * s for s in line["median_s"]], linewidth=1.6, markersize=8,
                color=colours.get(line["variant"], INK), **_style(line["backend"], MARKERS),
            )  # fmt: skip
        for bound in data["floor"]:
            # Rotation adds no traffic: the floors of both ordered variants are one line.
            colour = colours.get(bound["variant"], INK) if bound["variant"] == "slots" else INK
            axis.plot(bound["tail"], [1e3 * s for s in bound["seconds"]], "--", linewidth=1.2, color=colour)
        axis.set(xscale="log", yscale="log", xlabel="entries behind the edit", ylabel="ms per splice, all layers")
        ticks = sorted({tail for line in [*data["series"], *data["floor"]] for tail in line["tail"]})
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.grid(which="major", color="#dddddd", linewidth=0.6)
        axis.set_title(
            f"One 32:1 collapse near the front of {data['layers']} layers, {data['dtype']}\n"
            + where(data["machine"]),
            fontsize=FONT - 1, loc="left",
        )  # fmt: skip
        backends = dict.fromkeys(line["backend"] for line in data["series"])
        handles = [Line2D([], [], linewidth=4, color=c, label=v) for v, c in colours.items()]
        handles += [Line2D([], [], color=INK, label=b, **_style(b, MARKERS)) for b in backends]
        handles.append(Line2D([], [], linestyle="--", color=INK, label="least traffic / copy bandwidth"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT - 1)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
