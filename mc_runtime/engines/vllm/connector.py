"""Gists that are keys and values, through vLLM's KV connector interface (`KVConnectorBase_V1`).

A connector may say of a request that the keys and values of its first n entries are to be had outside, and fill them
into vLLM's pages before the request's first forward. Here they are those of a whole Working Context, gists of every
kind and tokens alike, as this package computed them: vLLM reads the rest of the prompt and decodes. A gist alone cannot
be handed over: vLLM takes a beginning of the prompt or nothing.

vLLM loads this file by name (`kv_transfer_config`, see docs/engines/vllm-engine.md) into its scheduler and into each of
its workers; the two meet in the file that a request names.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.model_executor.models.utils import extract_layer_index

from .transfer import PARAMETER

logger = logging.getLogger("mc_runtime")
NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


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
        if self._kv_transfer_config.kv_load_failure_policy != "fail":
            # vLLM would compute what could not be loaded from the prompt's ids, which are placeholders.
            raise ValueError("kv_load_failure_policy: expected fail, where a connector's file is all that is known")
        self._page = self._vllm_config.cache_config.block_size
        model = self._vllm_config.model_config
        self._layers, self._dtype = model.get_total_num_hidden_layers(), DTYPES[model.dtype]
        self._heads_and_dim = model.get_total_num_kv_heads(), model.get_head_size()
        self._counts: dict[str, int] = {}
        self._wanted: dict[str, tuple[str, int]] = {}
        self._said: dict[str, dict[str, Any]] = {}
        self._failed: set[int] = set()  # pages, in a worker

    # -- in the scheduler -------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        name = (request.kv_transfer_params or {}).get(PARAMETER)
        if name is None:
            return 0, False
        try:
            count = self._count(name)
            if count >= request.num_prompt_tokens:
                raise ValueError(f"{count} entries leave nothing to read of a prompt of {request.num_prompt_tokens}")
        except ValueError as error:
            # An exception would end the engine, for everyone who uses it. The answer says it, and is not used.
            self._said[request.request_id] = {"error": str(error)}
            return 0, False
        self._counts[request.request_id] = count
        return max(0, count - num_computed_tokens), False

    def _count(self, name: Any) -> int:
        """Entries in a file. Raises ValueError for one that is not what this model's workers can take."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"expected a name of 32 hex digits and .safetensors, got {name!r}")
        try:
            with safe_open(self._directory / name, "pt") as file:
                found = {(tuple(x.get_shape()), x.get_dtype()) for x in (file.get_slice(part) for part in "kv")}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name} cannot be read: {type(error).__name__}") from error
        (shape, dtype), heads, dim = found.pop(), *self._heads_and_dim
        if found or len(shape) != 4 or (*shape[:2], shape[3]) != (self._layers, heads, dim) or dtype != self._dtype:
            raise ValueError(
                f"{name}: expected k and v [{self._layers}, {heads}, n, {dim}] {self._dtype}, got {list(shape)} {dtype}"
            )
        return int(shape[2])

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
            count = self._counts[request]
            self._said[request] = {"entries": count}
            at = torch.arange(count - external, count)
            slots = torch.tensor(groups[0])[at // self._page] * self._page + at % self._page
            loads.requests.append(Load(name, count - external, slots))
        self._wanted.clear()
        return loads

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """What the answer says of the request's file (`transfer.check_read`)."""
        self._counts.pop(request.request_id, None)
        said = self._said.pop(request.request_id, None)
        return False, None if said is None else {PARAMETER: said}

    # -- in a worker ------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Writes go through each layer's own `do_kv_cache_update`: pages differ from backend to backend. A file that
        is gone since the scheduler looked at it, or broken, ends its request alone."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        layers = [
            (extract_layer_index(name), layer)
            for name, layer in forward_context.no_compile_layers.items()
            if isinstance(getattr(layer, "kv_cache", None), Tensor)
        ]
        for load in metadata.requests:
            try:
                with safe_open(self._directory / load.file, "pt") as file:
                    k, v = (file.get_tensor(name)[:, :, load.first :] for name in "kv")
            except (OSError, SafetensorError) as error:
                logger.error("%s cannot be read any more (%s); its request ends", load.file, type(error).__name__)
                self._failed.update((load.slots // self._page).tolist())
                continue
            for number, layer in layers:
                pages = layer.kv_cache
                mine = self._heads(layer.num_kv_heads, k.shape[1])
                key, value = (x[number, mine].transpose(0, 1).to(pages.device).contiguous() for x in (k, v))
                layer.impl.do_kv_cache_update(layer, key, value, pages, load.slots.to(pages.device))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were to be filled in this step and were not; vLLM ends the requests that they belong to."""
        failed, self._failed = self._failed, set()
        return failed

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
