"""How far keys drift when every splice rotates them again: blocks collapse and open at random in front of them.

A cache of rotated keys re-rotates what stands behind an edit by the change of its position, and each rotation rounds.
Keys that are stored unrotated are not touched again. llama.cpp's K-shift does the same edits beside ours. The number of
blocks walks at random: the roundings of one shift back and forth would fall into a cycle of two and hide the drift.
"""

from __future__ import annotations

import functools
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_kernels import Edit, SplicePlan, kv_splice_
from mc_kernels.rope import RopeSpec, apply_rope

from ..peers import llama_cpp

STEPS = (1, 10, 100, 1000, 10_000)
SECONDS = 30.0
LAYERS, HEADS, HEAD_DIM, ENTRIES, THETA = 2, 2, 64, 256, 10_000.0
# 0 to BLOCKS blocks of SPAN entries are collapsed to one entry each; TAIL is the first entry behind all of them.
START, SPAN, BLOCKS = 16, 32, 6
TAIL = START + SPAN * BLOCKS
BF16, FP32, SLOTS, SHIFT = "rotated, bf16", "rotated, fp32", "unrotated slots, bf16", "llama.cpp K-shift, fp16"


class Cache(ABC):
    """A cache under splices. collapsed: how many blocks are, always the first ones."""

    def __init__(self) -> None:
        self.collapsed, self.random = 0, random.Random(0)

    def splice(self) -> None:
        """Collapse or open some blocks; the same walk for every cache."""
        after = self.random.choice([n for n in range(BLOCKS + 1) if n != self.collapsed])
        self.move(after)
        self.collapsed = after

    def shift(self, blocks: int) -> int:
        """Positions by which so many collapsed blocks bring the tail forward."""
        return (SPAN - 1) * blocks

    @abstractmethod
    def move(self, after: int) -> None:
        """From `collapsed` blocks to `after`."""

    @abstractmethod
    def error(self) -> float:
        """Of the keys behind the blocks: relative RMS, against fp64 keys at the present positions."""


def measure(
    device: torch.device | None = None,
    steps: Sequence[int] = STEPS,
    *,
    entries: int = ENTRIES,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Errors against fp64 keys at their positions after each of `steps` splices; llama.cpp runs on the CPU.

    Returns a JSON-ready dict: `series` (name -> steps and errors; a cache that takes longer than `seconds` ends early)
    and `skipped` (name -> why it is missing).
    """
    # Exact in bf16 and, but for the tiniest, in fp16: what is stored unrotated has no error to begin with.
    raw = torch.randn(LAYERS, HEADS, entries, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = raw.to(device or "cpu")
    caches: dict[str, Callable[[], Cache]] = {
        BF16: lambda: OrderedCache(ours, torch.bfloat16),
        FP32: lambda: OrderedCache(ours, torch.float32),
        SLOTS: lambda: SlotCache(ours),
    }
    skipped = {}
    if (reason := llama_cpp.missing(torch.device("cpu"))) is None:
        caches[SHIFT] = lambda: ShiftedCache(raw)
    else:
        skipped[SHIFT] = reason
    series = {name: _errors(make(), sorted(steps), seconds) for name, make in caches.items()}
    return {"series": series, "skipped": skipped}


def _errors(cache: Cache, steps: Sequence[int], seconds: float) -> dict[str, list[float]]:
    done, errors, begin = 0, [], time.perf_counter()
    for step in steps:
        while done < step and time.perf_counter() - begin < seconds:
            cache.splice()
            done += 1
        if done == step:
            errors.append(cache.error())
    return {"steps": list(steps[: len(errors)]), "error": errors}


def relative_error(keys: Tensor, raw: Tensor, positions: Tensor, rope: RopeSpec) -> float:
    """RMS error of rotated keys over their RMS; raw [..., n, D] unrotated, positions [n]."""
    exact = apply_rope(raw.double(), positions, rope)
    return float((keys.double() - exact).norm() / exact.norm())


def _edits(before: int, after: int) -> list[Edit]:
    """From `before` collapsed blocks to `after`."""
    if after < before:
        return [Edit(START + i, 1, SPAN) for i in range(after, before)]
    return [Edit(START + before + i * SPAN, SPAN, 1) for i in range(after - before)]


class OrderedCache(Cache):
    """Keys stored rotated, in timeline order, at packed positions."""

    def __init__(self, raw: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.raw, self.rope = raw, RopeSpec.from_theta(THETA, HEAD_DIM)
        self.keys = apply_rope(raw.to(dtype), torch.arange(raw.shape[-2], device=raw.device), self.rope)
        self.values, self.new = torch.zeros_like(self.keys), torch.zeros_like(self.keys)
        self.plan = functools.cache(self._plan)

    def _plan(self, before: int, after: int) -> SplicePlan:
        n = self.raw.shape[-2]
        return SplicePlan.from_edits(n - self.shift(before), _edits(before, after), capacity=n)

    def move(self, after: int) -> None:
        plan = self.plan(self.collapsed, after)
        new = self.new[..., : plan.n_insert, :]
        kv_splice_(self.keys, self.values, new, new, plan, self.rope)

    def error(self) -> float:
        positions = torch.arange(TAIL, self.raw.shape[-2], device=self.raw.device) - self.shift(self.collapsed)
        return relative_error(self.keys[..., positions, :], self.raw[..., TAIL:, :], positions, self.rope)


class SlotCache(Cache):
    """Keys stored unrotated, in slots: a bit that changes is an error, a position is none."""

    def __init__(self, raw: Tensor) -> None:
        super().__init__()
        self.raw, self.keys, self.values = raw, raw.clone(), raw.clone()
        self.slots, self.new = torch.arange(raw.shape[-2]), torch.zeros_like(raw)

    def move(self, after: int) -> None:
        plan = SplicePlan.from_edits(
            self.slots.shape[0], _edits(self.collapsed, after), capacity=self.raw.shape[-2], discipline="slots",
            slots=self.slots,
        )  # fmt: skip
        new = self.new[..., : plan.n_insert, :]
        kv_splice_(self.keys, self.values, new, new, plan)
        self.slots = plan.new_slots

    def error(self) -> float:
        slots = self.slots[TAIL - self.shift(self.collapsed) :].to(self.raw.device)
        exact = self.raw[..., TAIL:, :].double()
        return float((self.keys[..., slots, :].double() - exact).norm() / exact.norm())


class ShiftedCache(Cache):
    """llama.cpp's cache: the blocks are removed and `llama_memory_seq_add` moves the tail."""

    def __init__(self, raw: Tensor) -> None:
        super().__init__()
        self.raw, self.rope = raw, RopeSpec.from_theta(THETA, HEAD_DIM, interleaved=True)
        keys = apply_rope(raw.float(), torch.arange(raw.shape[-2]), self.rope).transpose(1, 2)
        self.cache = llama_cpp.KeyCache(
            llama_cpp.synthetic_model(LAYERS, HEADS, HEAD_DIM, THETA), keys, raw.transpose(1, 2), torch.float16,
            capacity=raw.shape[-2], removable=TAIL - START, n_threads=1,
        )  # fmt: skip
        self.cache.remove(START, TAIL)

    def move(self, after: int) -> None:
        self.cache.shift(TAIL - self.shift(self.collapsed), self.shift(self.collapsed) - self.shift(after))
        self.cache.apply()

    def error(self) -> float:
        positions, keys = self.cache.keys(range(LAYERS))
        return relative_error(
            keys.transpose(1, 2)[..., START:, :], self.raw[..., TAIL:, :], positions[START:], self.rope
        )


def draw(data: dict[str, Any], path: Path) -> None:
    """Write a PNG of what `measure` returned; errors of exactly 0 lie on the lower edge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from .roofline import DPI, FONT, INK, WIDTH

    looks = {BF16: ("#D55E00", "o"), FP32: ("#0072B2", "s"), SLOTS: ("#009E73", "D"), SHIFT: (INK, "^")}
    positive = [e for line in data["series"].values() for e in line["error"] if e > 0]
    floor = min(positive, default=1e-8) / 10
    with plt.rc_context({"font.size": FONT, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axis = plt.subplots(figsize=(WIDTH, 6.4), layout="constrained")
        for name, line in data["series"].items():
            colour, marker = looks.get(name, (INK, "P"))
            zero = not any(line["error"])
            axis.plot(
                line["steps"], [max(e, floor) for e in line["error"]], marker=marker, color=colour, markersize=9,
                linewidth=1.8, linestyle="--" if zero else "-", label=f"{name}: exactly 0" if zero else name,
                clip_on=False,
            )  # fmt: skip
        for name, reason in data["skipped"].items():
            axis.plot([], [], " ", label=f"{name}: not measured ({reason})")
        axis.set(
            xscale="log", yscale="log", xlabel=f"splices (up to {BLOCKS} blocks collapse 32:1 or open again)",
            ylabel="relative RMS error of the keys\nbehind the blocks", ylim=(floor, None),
        )  # fmt: skip
        axis.grid(which="major", color="#dddddd", linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=1 if data["skipped"] else 2, frameon=False)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
