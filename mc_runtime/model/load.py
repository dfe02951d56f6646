"""`load_model`: a name in, a decoder with its tokenizer and chat format out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mc_runtime.errors import ModelError
from mc_runtime.model.chat import ChatTemplate
from mc_runtime.model.config import ModelConfig
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.packing import load_packed
from mc_runtime.model.resolve import DEFAULT_MODEL, resolve_model
from mc_runtime.model.tokenizer import Tokenizer
from mc_runtime.model.weights import Checkpoint, load_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run. `fingerprint`: 16 hex digits that name its weights and shape, on any machine and
    in any precision; keys and values computed by models with different fingerprints do not mix."""

    decoder: Decoder
    tokenizer: Tokenizer
    chat: ChatTemplate
    config: ModelConfig
    fingerprint: str
    directory: Path


def load_model(
    name_or_path: str | Path = DEFAULT_MODEL,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadedModel:
    """Load a frozen model.

    name_or_path: `smollm2-135m`, a Hugging Face directory, a .gguf file, or a hub name (see `resolve`).
    dtype: of weights and activations; None: bf16 where the device computes in it, fp32 elsewhere.
    device: None: a GPU where there is one, else the CPU.
    Raises `ModelError` with what to do about it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype} is not supported; known: {', '.join(str(d) for d in DTYPES)}")
    place = torch.device(device) if device is not None else _best_device()
    directory = resolve_model(name_or_path)
    config = ModelConfig.from_directory(directory)
    checkpoint = Checkpoint(directory)
    tokenizer = Tokenizer.from_directory(directory, eos_ids=config.eos_ids)
    if tokenizer.vocab_size - len(tokenizer.special_ids) > config.vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size} rows: "
            "they do not belong together"
        )
    decoder = load_weights(checkpoint, config, dtype=dtype or best_dtype(place), device=place)
    load_packed(directory, decoder)
    return LoadedModel(
        decoder=decoder,
        tokenizer=tokenizer,
        chat=ChatTemplate.from_directory(directory, tokenizer),
        config=config,
        fingerprint=_fingerprint(config, checkpoint),
        directory=directory,
    )


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device has instructions for it (AVX512-BF16, AMX, most GPUs), else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return (
        torch.bfloat16 if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32
    )


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fingerprint(config: ModelConfig, checkpoint: Checkpoint) -> str:
    """Leaves out what does not change keys and values: the range of positions and the names of start and end."""
    shape = {k: v for k, v in config.to_dict().items() if k not in ("max_positions", "bos_id", "eos_ids")}
    described = json.dumps(shape, sort_keys=True) + checkpoint.fingerprint()
    return hashlib.sha256(described.encode("utf-8")).hexdigest()[:16]
