"""What a Llama-family decoder is made of, read from a Hugging Face `config.json`.

Architectures: Llama (SmolLM2 is one), Mistral, Qwen2 (biases on q, k, v), Qwen3 (RMS norm on every query and key
head). Whatever the decoder would compute wrongly (another activation, an unknown RoPE schedule, quantised weights) is
refused with a `ModelError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_kernels.rope import RopeSpec
from mc_runtime.errors import ModelError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "factors")


@dataclass(frozen=True)
class RopeConfig:
    """A RoPE schedule: base frequencies theta ** (-2b / D_rot), then one of the known stretches of the context.

    kind: `default`; `linear` (all divided by `factor`); `llama3` (low ones divided, a smooth ramp between); `yarn`
        (Peng et al. 2023: the same idea by number of rotations, plus a magnitude); `factors` (one divisor per
        frequency, which is how GGUF files store `llama3`).
    """

    theta: float = 10_000.0
    kind: str = "default"
    partial_factor: float = 1.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_scaling: float = 1.0
    factors: tuple[float, ...] = ()

    def inv_freq(self, head_dim: int) -> Tensor:
        """[D_rot/2] fp32, radians per position; the operations are those of `transformers`, in fp32 as there."""
        rotary_dim = int(head_dim * self.partial_factor)
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        base: Tensor = self.theta**exponent
        plain = 1.0 / base
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "factors":
            if len(self.factors) != plain.numel():
                raise ModelError(f"RoPE: expected {plain.numel()} frequency factors, the model has {len(self.factors)}")
            return plain / torch.tensor(self.factors)
        if self.kind == "llama3":
            turns = self.original_max_positions * plain / (2 * math.pi)
            ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            share = ramp.clamp(0.0, 1.0)
            return share * plain + (1 - share) * plain / self.factor
        if self.kind == "yarn":
            share = 1 - self._yarn_ramp(rotary_dim)
            return share * plain + (1 - share) / (self.factor * base)
        return plain

    def _yarn_ramp(self, rotary_dim: int) -> Tensor:
        """[D_rot/2]: 0 where a pair turns more than `beta_fast` times in the trained range, 1 below `beta_slow`."""

        def dimension_of(turns: float) -> float:
            return (
                rotary_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            )

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        high += 0.001 if low == high else 0.0
        return ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; see the module. `max_positions` is the range in which full attention is what the model
    was trained with: a sliding window, where there is one, ends it."""

    architecture: str
    vocab_size: int
    embed_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "embed_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_positions")
        for name in sizes:
            if getattr(self, name) <= 0:
                raise ModelError(f"the model's {name} is {getattr(self, name)}, expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads evenly")
        if self.rope.kind not in ROPE_KINDS:
            raise ModelError(f"RoPE scaling {self.rope.kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
        if self.rope.attention_scaling != 1.0 and self.rope.partial_factor < 1.0:
            # Such models scale the rotated dimensions alone; `RopeSpec` scales all.
            raise ModelError(f"partial rotation ({self.rope.partial_factor:g}) with YaRN's magnitude is not supported")

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read `config.json` (and the end tokens of `generation_config.json`)."""
        raw = read_json(directory / "config.json")
        if (directory / "generation_config.json").is_file():
            more = as_ids(read_json(directory / "generation_config.json").get("eos_token_id"))
            raw["eos_token_id"] = [*as_ids(raw.get("eos_token_id")), *more]
        return cls.from_hf(raw)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """From the contents of a `config.json`. Raises `ModelError` for what cannot be run faithfully."""
        names = raw.get("architectures") or [raw.get("model_type")]
        family = ARCHITECTURES.get(names[0], names[0])
        if family not in ARCHITECTURES.values():
            raise ModelError(f"architecture {names[0]!r} is not supported; known: {', '.join(ARCHITECTURES)}")
        _refuse_unknown(raw)
        try:
            heads = int(raw["num_attention_heads"])
            positions = int(raw.get("max_position_embeddings") or 2048)
            bias = bool(raw.get("attention_bias", False)) and family != "mistral"
            default_head_dim = 128 if family == "qwen3" else int(raw["hidden_size"]) // heads
            return cls(
                architecture=family,
                vocab_size=int(raw["vocab_size"]),
                embed_dim=int(raw["hidden_size"]),
                n_layers=int(raw["num_hidden_layers"]),
                n_heads=heads,
                n_kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or default_head_dim),
                ffn_dim=int(raw["intermediate_size"]),
                norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope=_rope_from_hf(raw, positions),
                max_positions=min(positions, _sliding_window(raw, family) or positions),
                qkv_bias=bias or family == "qwen2",
                out_bias=bias and family != "qwen2",
                qk_norm=family == "qwen3",
                tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
                bos_id=next(iter(as_ids(raw.get("bos_token_id"))), None),
                eos_ids=as_ids(raw.get("eos_token_id")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"config.json: {type(error).__name__}: {error}") from error

    def rope_spec(self) -> RopeSpec:
        """How attention has to rotate this model's queries and keys (half-split pairs, the Hugging Face layout)."""
        return RopeSpec(self.rope.inv_freq(self.head_dim), attention_scaling=self.rope.attention_scaling)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for fingerprints and for the catalogue of a tree."""
        return asdict(self)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `ModelError` when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: not a Hugging Face model directory") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def as_ids(value: Any) -> tuple[int, ...]:
    """A token id field of a config (none, one or a list) as distinct ids in order."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(int(v) for v in values if v is not None))


def _refuse_unknown(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise ModelError(f"activation {activation!r} is not supported, only silu (SwiGLU)")
    if raw.get("mlp_bias"):
        raise ModelError("biases in the feed-forward layers (mlp_bias) are not supported")
    if raw.get("quantization_config"):
        raise ModelError("quantised safetensors are not supported: use the unquantised model or a GGUF file")


def _sliding_window(raw: Mapping[str, Any], family: str) -> int | None:
    if family.startswith("qwen") and not raw.get("use_sliding_window"):
        return None
    return int(raw["sliding_window"]) if raw.get("sliding_window") else None


def _rope_from_hf(raw: Mapping[str, Any], positions: int) -> RopeConfig:
    """Both layouts: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before)."""
    given: dict[str, Any] = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = str(given.get("rope_type") or given.get("type") or "default")
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    partial = float(given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0)
    original = int(given.get("original_max_position_embeddings") or positions)
    factor = float(given.get("factor") or (positions / original if kind == "yarn" else 1.0))
    return RopeConfig(
        theta=theta,
        kind=kind,
        partial_factor=partial,
        factor=factor,
        original_max_positions=original,
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_scaling=_yarn_magnitude(given, factor) if kind == "yarn" else 1.0,
        factors=tuple(float(f) for f in given.get("factors", ())),
    )


def _yarn_magnitude(given: Mapping[str, Any], factor: float) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return magnitude(float(given["mscale"])) / magnitude(float(given["mscale_all_dim"]))
    return magnitude(1.0)
