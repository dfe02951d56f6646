"""A Working Context's keys and values, handed to a vLLM that runs `connector.py`."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mc_kernels.rope import apply_rope
from mc_runtime.context import WorkingContext
from mc_runtime.errors import InputError
from mc_runtime.sampling import SamplingParams

from .local import VLLMEngine
from .server import VLLMServerEngine


def transfer_config(directory: Path | str) -> dict[str, Any]:
    """`kv_transfer_config` of an LLM or server that takes Working Contexts from files in `directory`."""
    return {
        "kv_connector": "WorkingContextConnector",
        "kv_connector_module_path": "mc_runtime.engines.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"directory": str(directory)},
    }


@torch.inference_mode()
def complete_from_cache(
    engine: VLLMEngine | VLLMServerEngine,
    context: WorkingContext,
    directory: Path | str,
    params: SamplingParams,
    *,
    count: int,
    eos_ids: Collection[int] = (),
) -> list[int]:
    """Continue a Working Context whose gists are of any kind, without reading it: vLLM runs its last token and decodes.

    context: at least two entries, the last a token; all alike in weight. directory: that of the connector, which this
    process and vLLM's share; the file in it, [L, Hkv, N - 1, D] keys and values in the model's dtype, is gone when this
    returns. Returns up to `count` token ids; see `Engine.complete`. Raises InputError, and ModelError where vLLM has
    not read the file.
    """
    if context.used < 2 or context.entries.levels[-1] > 0:
        raise InputError(f"context: expected at least two entries, the last a token, got {context.used}")
    if context.config.gist_bias:
        raise InputError(f"context: vLLM weighs all entries alike, got gist_bias={context.config.gist_bias}")
    engine.check_room(context.used, count)
    if isinstance(engine, VLLMEngine):
        _check_connector(engine, directory)
    k, v = context.cache.gather(context.slots[:-1])
    k = apply_rope(k, torch.arange(k.shape[2], device=k.device), context.decoder.rope)
    # The last token's id for all: no token is read where keys and values are given.
    ids = [int(context.ids(context.entries.index[-1:])[0])] * context.used
    file = Path(directory) / f"{uuid.uuid4().hex}.safetensors"
    try:
        save_file({"k": k.cpu().contiguous(), "v": v.cpu().contiguous()}, str(file))
        return engine.continue_from(ids, file.name, params, count=count, eos_ids=eos_ids)
    finally:
        file.unlink(missing_ok=True)


def _check_connector(engine: VLLMEngine, directory: Path | str) -> None:
    transfer, wanted = engine.llm.llm_engine.vllm_config.kv_transfer_config, transfer_config(directory)
    if transfer is None or any(getattr(transfer, name) != value for name, value in wanted.items()):
        raise InputError("directory: expected that of an LLM made with kv_transfer_config=transfer_config(directory)")
