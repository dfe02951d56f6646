"""A decode step on a GPU, or a chunk of a text that is read, as one CUDA graph.

A step is some hundred kernels of a few microseconds; the code that launches them takes several times as long, at every
step. Recorded once over a slot cache they are replayed by one call. The recorded step attends to the whole cache, of
which `pos` says what is in use, so that it serves whatever the number of entries. Of more than one row a step is
recorded where its store says that the like of it comes again (`KVStore.repeats`): recording takes as long as three of
them.

A graph holds addresses, not tensors: it is looked up by those that a call brings, so one whose memory has gone to
another cache of the same shape is right for that one too. The first step over a cache runs as usual, which compiles
what has to be compiled; the second is recorded.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mc_kernels import RopeSpec, for_graphs
from mc_kernels.decoder_layers import CacheSlots
from mc_kernels.registry import ENV_BACKEND
from mc_runtime.model.module_tree import HOOKED, OTHER, ModuleTree
from mc_runtime.model.stores import KVStore

logger = logging.getLogger(__name__)

# Graphs that are kept, the least recently used one goes first: each has some megabytes of its own.
MOST_GRAPHS = 8

# The stream after the layers, their masses, and the stream after the layer that is tapped.
Step = tuple[Tensor, Tensor | None, Tensor | None]


def graphs(x: Tensor, store: KVStore) -> bool:
    """Whether x [B, T, E] is a step on a GPU that comes again, without gradients and not part of a recording."""
    return (
        x.is_cuda
        and (x.shape[1] == 1 or getattr(store, "repeats", False))
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


@dataclass(frozen=True)
class _Recorded:
    """A graph with the memory that it reads its inputs from and leaves its results in."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    positions: Tensor
    slots: Tensor
    results: Step


class GraphedLayers:
    """The graphs of one decoder. A copy of a decoder, pickled or not, starts with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # several threads may run a decoder
        self._tree: ModuleTree | None = None
        self._rope: RopeSpec | None = None
        self._weights: tuple[nn.Parameter, ...] = ()
        self._addresses: list[int] = []
        # None: seen once. False: cannot be recorded.
        self._graphs: OrderedDict[Hashable, _Recorded | bool | None] = OrderedDict()

    def __len__(self) -> int:
        return sum(isinstance(one, _Recorded) for one in self._graphs.values())

    def __reduce__(self) -> tuple[type[GraphedLayers], tuple[()]]:
        return GraphedLayers, ()

    def run(
        self, layers: nn.ModuleList, x: Tensor, positions: Tensor, store: KVStore, rope: RopeSpec, n_layers: int,
        hidden_layer: int | None, return_mass: bool, norm: nn.Module | None,
    ) -> Step | None:  # fmt: skip
        """The stream after `n_layers` (normed, where `norm` is given), their masses and the stream after
        `hidden_layer`, as `Decoder.forward`; None where the step has to be run otherwise: over a store without slots,
        with hooks, for the first time."""
        whole_cache = getattr(store, "whole_cache", None)
        if whole_cache is None or getattr(store, "sigma", None) is not None or torch_module._has_any_global_hook():
            return None
        if norm is not None and (norm._forward_hooks or norm._forward_pre_hooks):
            return None
        with self._lock:
            if not self._unchanged(layers, rope):
                return None
            cache: CacheSlots = whole_cache()
            key = (
                x.shape, positions.dtype, return_mass, n_layers, hidden_layer, os.environ.get(ENV_BACKEND),
                None if norm is None else (id(norm), *(p.data_ptr() for p in norm.parameters())),
                torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
                *((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (cache.k, cache.v, cache.kv_pos)),
                None if cache.kv_bias is None else cache.kv_bias.data_ptr(),
            )  # fmt: skip
            if key not in self._graphs:
                self._graphs[key] = None
                if len(self._graphs) > MOST_GRAPHS:
                    self._graphs.popitem(last=False)
                return None
            self._graphs.move_to_end(key)
            one = self._graphs[key]
            if one is None:
                one = self._graphs[key] = self._record(
                    layers, x, positions, cache, rope, n_layers, hidden_layer, return_mass, norm
                )
            if not isinstance(one, _Recorded):
                return None
            one.x.copy_(x)
            one.positions.copy_(positions)
            one.slots.copy_(cache.slots)
            one.graph.replay()
            used = getattr(store, "used", cache.k.shape[3])
            hidden, mass, tapped = one.results
            mass = None if mass is None else mass[..., :used].clone()
            return hidden.clone(), mass, None if tapped is None else tapped.clone()

    def _unchanged(self, layers: nn.ModuleList, rope: RopeSpec) -> bool:
        """Whether the layers and where their weights lie are those of the graphs, which are dropped otherwise, and have
        no hooks."""
        tree = self._tree
        seen = OTHER if tree is None or rope is not self._rope else tree.look(layers)
        if tree is None or seen == OTHER or self._now() != self._addresses:
            self._tree = tree = ModuleTree(layers)
            seen = tree.look(layers)
            self._rope = rope
            self._weights = tuple(layers.parameters())
            self._addresses = self._now()
            self._graphs.clear()
        return seen != HOOKED

    def _now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._weights))

    def _record(
        self, layers: nn.ModuleList, x: Tensor, positions: Tensor, cache: CacheSlots, rope: RopeSpec, n_layers: int,
        hidden_layer: int | None, return_mass: bool, norm: nn.Module | None,
    ) -> _Recorded | bool:  # fmt: skip
        # Not tensors of inference mode, even where it is on: the next caller may be without it.
        with torch.inference_mode(False), torch.no_grad():
            inputs = [t.new_empty(t.shape).copy_(t) for t in (x, positions, cache.slots)]
        store = _CacheStore(cache._replace(slots=inputs[2]))

        def step() -> Step:
            stream, masses = inputs[0], list[Tensor]()
            tapped = stream if hidden_layer == 0 else None
            for number, layer in enumerate(layers[:n_layers], start=1):
                stream, mass = layer(stream, inputs[1], store, rope, return_mass, False)
                if mass is not None:
                    masses.append(mass)
                if number == hidden_layer:
                    tapped = stream
            return stream if norm is None else norm(stream), torch.stack(masses) if masses else None, tapped

        try:
            graph, results = capture(step, x.device)
        except RuntimeError as error:
            logger.warning("decode steps are not recorded as a CUDA graph: %s", str(error).partition("\n")[0])
            return False
        return _Recorded(graph, inputs[0], inputs[1], inputs[2], results)


def capture(step: Callable[[], Step], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Step]:
    """`step` as a graph, and what it returned: memory that every replay writes anew. What other threads do on the GPU
    meanwhile is theirs."""
    with torch.cuda.device(device), for_graphs():
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            step()  # compiles and allocates what is kept; what it writes, the replay writes again
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step()
    return graph, results


class _CacheStore:
    """All slots of a cache as a `KVStore`; nothing in it depends on values, which would be read back to the host."""

    def __init__(self, cache: CacheSlots) -> None:
        self._cache, self.kv_bias = cache, cache.kv_bias

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self._cache
        for kept, new in ((c.k[layer], k), (c.v[layer], v)):
            if kept.shape[0] == 1:
                kept[0].index_copy_(1, c.slots[0], new[0].to(kept.dtype))
            else:
                index = c.slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
                kept.scatter_(2, index, new.to(kept.dtype))
        return c.k[layer], c.v[layer], c.kv_pos
