"""NVIDIA kvpress: `KeyRerotationPress.rerotate_keys` gathers the keys that are kept and turns them to packed positions.

It knows removal only. Where entries move to the right, rows that the new entries will overwrite stand in for them;
the new entries themselves and the values are torch's part. Layer by layer, as its hooks run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ..workloads import Candidate, Workload
from ..workloads.kv_splice import KvSplice, plain_rotate

NAME = "kvpress"
MODULE = "kvpress.presses.key_rerotation_press"


def missing(device: torch.device) -> str | None:
    for package in ("kvpress", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"package {package} is not installed"
    return None


@functools.cache
def press() -> Any:
    """The class `KeyRerotationPress`.

    The package's `__init__` imports every press and with them datasets, peft and others, and it replaces attention
    functions of transformers. Where that is not wanted or fails, empty parent packages let the one module be imported
    with what it needs; they are taken away again.
    """
    spec = importlib.util.find_spec("kvpress")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = spec.submodule_search_locations[0]
    before = set(sys.modules)
    try:
        for name, folder in (("kvpress", root), ("kvpress.presses", f"{root}/presses")):
            package = ModuleType(name)
            package.__path__ = [folder]
            sys.modules[name] = package
        return importlib.import_module(MODULE).KeyRerotationPress
    finally:
        for name in [m for m in sys.modules if m.partition(".")[0] == "kvpress" and m not in before]:
            del sys.modules[name]


def offers(workload: Workload) -> list[Candidate]:
    if not isinstance(workload, KvSplice) or workload.case.discipline != "ordered" or workload.case.rope is False:
        return []
    rerotate_keys = press().rerotate_keys

    def prepare(inputs: dict[str, Any]) -> SimpleNamespace:
        k, v, plan, rope = (inputs[name] for name in ("k", "v", "plan", "rope"))
        batch, heads, _, dim = k.shape[1:]
        module = SimpleNamespace(rotary_emb=SimpleNamespace(inv_freq=rope.inv_freq_on(k.device)), head_dim=dim)
        moves = []
        for source, destination, count in plan.segments.tolist():
            first, shift = min(source, destination), destination - source
            kept = torch.arange(count) - min(shift, 0)
            indices = torch.cat((torch.zeros(max(shift, 0), dtype=torch.int64), kept)).to(k.device)
            whole = slice(first, max(source, destination) + count)
            target = slice(destination, destination + count)
            moves.append((whole, target, indices.expand(batch, heads, -1), max(shift, 0)))
        new = (inputs[name].unflatten(0, k.shape[:2]) for name in ("k_new", "v_new"))
        slots = plan.insert_slots.to(k.device)
        return SimpleNamespace(
            layers=list(zip(k, v, *new, strict=True)), moves=moves, module=module, slots=slots, rope=rope, k=k, v=v
        )

    def run(s: SimpleNamespace) -> None:
        for k, v, k_new, v_new in s.layers:
            for whole, target, indices, skip in s.moves:
                k[:, :, target] = rerotate_keys(s.module, indices, k[:, :, whole])[:, :, skip:]
                rows = indices[:, :, skip:, None].expand(-1, -1, -1, v.shape[-1])
                v[:, :, target] = v[:, :, whole].gather(2, rows)
            k.index_copy_(2, s.slots, plain_rotate(k_new, s.slots, s.rope))
            v.index_copy_(2, s.slots, v_new)

    return [Candidate(NAME, run, prepare, lambda s, _: workload.by_slot(s.k, s.v))]
