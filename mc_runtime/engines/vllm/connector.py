"""Gists that are keys and values, through vLLM's KV connector interface (`KVConnectorBase_V1`).

A connector may say of a request that the keys and values of its first n entries are to be had outside, and fill them
into vLLM's pages before the request's first forward. Here they are those of a whole Working Context, gists of every
kind and tokens alike, as this package computed them: vLLM reads the rest of the prompt and decodes. A gist alone cannot
be handed over: vLLM takes a beginning of the prompt or nothing.

vLLM loads this file by name (`kv_transfer_config`, see docs/engines/vllm-engine.md) into its scheduler and into each of
its workers; the two meet in the file that a request names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.model_executor.models.utils import extract_layer_index

from .local import PARAMETER

NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


@dataclass
class Load:
    """file: of k and v [L, Hkv, n, D], keys rotated at their ranks. slots: of entries `first` and later, in pages."""

    file: str
    first: int
    slots: Tensor


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the workers about one step."""

    requests: list[Load] = field(default_factory=list)


class WorkingContextConnector(KVConnectorBase_V1):
    """Extra configuration: `directory`, the one folder that files are read from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._directory = Path(self._kv_transfer_config.get_from_extra_config("directory", ""))
        if not self._directory.is_dir():
            raise ValueError(f"directory: expected a folder in kv_connector_extra_config, got {self._directory}")
        self._page = self._vllm_config.cache_config.block_size
        self._wanted: dict[str, tuple[str, int]] = {}

    # -- in the scheduler -------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        name = (request.kv_transfer_params or {}).get(PARAMETER)
        if name is None:
            return 0, False
        count = self._count(name)
        if count >= request.num_tokens:
            raise ValueError(f"{name}: {count} entries leave nothing to read of a prompt of {request.num_tokens}")
        return max(0, count - num_computed_tokens), False

    def _count(self, name: str) -> int:
        with safe_open(self._path(name), "pt") as file:
            return int(file.get_slice("k").get_shape()[2])

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ValueError(f"{PARAMETER}: expected a name of 32 hex digits and .safetensors, got {name!r}")
        return self._directory / name

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._wanted[request.request_id] = (request.kv_transfer_params[PARAMETER], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """A request that was preempted comes back among the cached ones, with all its pages named anew."""
        cached = scheduler_output.scheduled_cached_reqs
        pages = {new.req_id: new.block_ids for new in scheduler_output.scheduled_new_reqs}
        pages |= dict(zip(cached.req_ids, cached.new_block_ids, strict=True))
        loads = Loads()
        for request, (name, external) in self._wanted.items():
            groups = pages[request]
            if groups is None or len(groups) != 1:
                raise NotImplementedError("models whose layers keep caches of several kinds are not supported")
            count = self._count(name)
            at = torch.arange(count - external, count)
            slots = torch.tensor(groups[0])[at // self._page] * self._page + at % self._page
            loads.requests.append(Load(name, count - external, slots))
        self._wanted.clear()
        return loads

    # -- in a worker ------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Writes go through each layer's own `do_kv_cache_update`: pages differ from backend to backend."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        layers = [
            (extract_layer_index(name), layer)
            for name, layer in forward_context.no_compile_layers.items()
            if isinstance(getattr(layer, "kv_cache", None), Tensor)
        ]
        for load in metadata.requests:
            with safe_open(self._path(load.file), "pt") as file:
                k, v = (file.get_tensor(name)[:, :, load.first :] for name in "kv")
            for number, layer in layers:
                pages = layer.kv_cache
                mine = self._heads(layer.num_kv_heads, k.shape[1])
                key, value = (x[number, mine].transpose(0, 1).to(pages.device).contiguous() for x in (k, v))
                layer.impl.do_kv_cache_update(layer, key, value, pages, load.slots.to(pages.device))

    @staticmethod
    def _heads(here: int, total: int) -> slice:
        """Which heads of the file are this worker's."""
        first = get_tensor_model_parallel_rank() * here if here < total else 0
        return slice(first, first + here)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is taken out of vLLM."""

    def wait_for_save(self) -> None:
        """See `save_kv_layer`."""
