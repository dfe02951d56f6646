"""What a tree is made for: the shapes and fingerprints that every node of it shares.

The spec is stored in the catalogue when the tree is created and compared whenever it is opened, because nodes
that two models wrote cannot be told apart afterwards.
"""

import dataclasses
import enum
import json
import operator

import torch

from mc_runtime.errors import InputError, TreeError, TreeMismatchError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Storage dtypes of summaries, hidden states, keys and values."""

_SIZES = ("block_size", "embed_dim", "n_layers", "n_kv_heads", "head_dim", "vocab_size")
_FINGERPRINTS = ("model", "tokenizer", "gistnet")


class NodeFlag(enum.IntFlag):
    """What is stored for a node beside its summary."""

    KV = 1
    """Its key/value row is stored."""
    CONTEXTUAL = 2
    """It was made by contextual ingest (the base model read the text)."""
    HIDDEN = 4
    """Its hidden-state row is stored."""


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """Shapes, storage dtype and fingerprints of a tree. Raises `InputError` when a field cannot be used."""

    block_size: int
    """K, children per node; at least 2."""
    embed_dim: int
    """E, width of a summary and of a hidden state."""
    n_layers: int
    """L."""
    n_kv_heads: int
    """Hkv."""
    head_dim: int
    """D."""
    dtype: str
    """Storage dtype of summaries, hidden states, keys and values: "float32", "bfloat16" or "float16"."""
    vocab_size: int
    """Token ids lie in [0, vocab_size); at most 2**32."""
    model: str
    """Fingerprint of the base model; any string, compared for equality."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    gistnet: str
    """Fingerprint of the net that makes the summaries."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            try:
                size = operator.index(value)
            except TypeError:
                raise InputError(f"{name} must be an integer, not {value!r}") from None
            if size < 1 or isinstance(value, bool):
                raise InputError(f"{name} must be a positive integer, not {value!r}")
            object.__setattr__(self, name, size)
        if self.block_size < 2:
            raise InputError(f"block_size must be at least 2, not {self.block_size}")
        if self.vocab_size > 2**32:
            raise InputError(f"vocab_size must be at most 2**32 (ids are stored in 32 bits), not {self.vocab_size}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        for name in _FINGERPRINTS:
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a string, not {getattr(self, name)!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a `torch.dtype`."""
        return DTYPES[self.dtype]

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Shape of one node's keys (and of its values): (L, Hkv, D)."""
        return self.n_layers, self.n_kv_heads, self.head_dim

    def to_json(self) -> str:
        """Text form kept in the catalogue."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TreeSpec":
        """Inverse of `to_json`. Raises `TreeError` when the stored text is damaged."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise TreeError(
                f"the catalogue's description of the tree is damaged ({error}); restore a backup"
            ) from error

    def require(self, wanted: "TreeSpec", path: object) -> None:
        """Raise `TreeMismatchError`, naming each field, unless `wanted` equals this stored spec."""
        differing = [
            f"{field.name} is {getattr(self, field.name)!r} in the tree and {getattr(wanted, field.name)!r} was given"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(wanted, field.name)
        ]
        if differing:
            raise TreeMismatchError(
                f"the tree at {str(path)!r} was written for something else: {'; '.join(differing)}; "
                "open it with what it was written with, rebuild it from its tokens, or use another directory"
            )
