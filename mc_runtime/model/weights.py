"""Weights of a Hugging Face directory: safetensors only, sharded or not. Pickled weights are never opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mc_runtime.errors import ModelError
from mc_runtime.model.config import ModelConfig, read_json
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.layers import Layer

INDEX = "model.safetensors.index.json"
SAMPLE_BYTES = 256
"""How much of a tensor's head and of its middle enters the fingerprint."""


class Checkpoint:
    """The tensors of a directory, by name, read when asked for. Raises `ModelError` for what cannot be read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _weight_files(directory)
        self.headers = {path: _read_header(path) for path in self.files}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one at a time, on the CPU."""
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (not a dict)
                        yield name, shard.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {error}") from error

    def fingerprint(self) -> str:
        """Hex digest of every tensor's name, dtype and shape and of a sample of its bytes.

        Does not depend on sharding or on the machine, reads about 100 KB of a small model, and tells fine-tunes of
        one architecture apart.
        """
        lines: list[bytes] = []
        for path, header in self.headers.items():
            with path.open("rb") as file:
                base = 8 + int.from_bytes(file.read(8), "little")
                for name, entry in header.items():
                    start, end = entry["data_offsets"]
                    sample = b"".join(
                        os.pread(file.fileno(), min(SAMPLE_BYTES, end - offset), base + offset)
                        for offset in (start, (start + end) // 2)
                    )
                    shape = f"{name} {entry['dtype']} {entry['shape']} ".encode()
                    lines.append(shape + hashlib.sha256(sample).hexdigest().encode())
        return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()


def load_weights(checkpoint: Checkpoint, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Build the decoder and copy the weights in, converted to `dtype`, q/k/v and gate/up side by side.

    Raises `ModelError` when a tensor is missing, has the wrong shape, or has no place in the decoder.
    """
    decoder = Decoder(config, dtype=dtype, device=device)
    places = tensor_places(decoder)
    missing, unknown = set(places), []
    for name, tensor in checkpoint.tensors():
        if name in places:
            if places[name].shape != tensor.shape:
                raise ModelError(
                    f"{name}: expected shape {tuple(places[name].shape)} by config.json, got {tuple(tensor.shape)}"
                )
            places[name].copy_(tensor)
            missing.discard(name)
        elif not (name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")):
            unknown.append(name)
    if missing:
        raise ModelError(f"{checkpoint.directory} lacks {len(missing)} tensors, first {min(missing)}")
    if unknown:
        raise ModelError(f"{checkpoint.directory} has {len(unknown)} tensors without a place, first {min(unknown)}")
    return decoder


def tensor_places(decoder: Decoder) -> dict[str, Tensor]:
    """Hugging Face's tensor names -> the (views of) parameters that they fill."""
    config = decoder.config
    places: dict[str, Tensor] = {
        "model.embed_tokens.weight": decoder.embedding,
        "model.norm.weight": decoder.norm.weight,
    }
    if not config.tied_embeddings:
        places["lm_head.weight"] = decoder.head
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    for number, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{number}."
        assert isinstance(layer, Layer)
        attention, ffn = layer.attention, layer.ffn
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = getattr(attention.qkv, kind).split((q, kv, kv))
            for letter, part in zip("qkv", parts, strict=True):
                places[f"{prefix}self_attn.{letter}_proj.{kind}"] = part
        places[prefix + "self_attn.o_proj.weight"] = attention.out.weight
        if attention.out.bias is not None:
            places[prefix + "self_attn.o_proj.bias"] = attention.out.bias
        if attention.q_norm is not None and attention.k_norm is not None:
            places[prefix + "self_attn.q_norm.weight"] = attention.q_norm.weight
            places[prefix + "self_attn.k_norm.weight"] = attention.k_norm.weight
        gate, up = ffn.gate_up.weight.chunk(2)
        places[prefix + "mlp.gate_proj.weight"], places[prefix + "mlp.up_proj.weight"] = gate, up
        places[prefix + "mlp.down_proj.weight"] = ffn.down.weight
        places[prefix + "input_layernorm.weight"] = layer.attention_norm.weight
        places[prefix + "post_attention_layernorm.weight"] = layer.ffn_norm.weight
    return places


def _weight_files(directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{directory / INDEX} has no weight_map")
        names = {str(name) for name in weight_map.values()}
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{directory / INDEX} names files outside its directory")
        files = sorted(directory / name for name in names)
    else:
        files = [directory / "model.safetensors"]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt*"))
        hint = "; pickled weights are not read: convert them to safetensors" if pickled else ""
        raise ModelError(f"{directory} has no {absent[0]}{hint}")
    return files


def _read_header(path: Path) -> dict[str, Any]:
    """The table of a safetensors file: name -> dtype, shape, data_offsets; checked against the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is torn")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes where its header promises {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from error
    return header
