"""LensNet: the weights that say, per leaf of the Working Context, what expanding gains and collapsing costs.

The network is the op `lens_score`; its inputs are those of `mc_runtime.focus.features`. Untrained, every score is
exactly 0. Files are safetensors and name the features that they were trained for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from mc_kernels import LensScoreWeights, lens_score

from .errors import ModelError
from .focus.features import FEATURES, FEATURES_HASH

if TYPE_CHECKING:
    from .model import Decoder

PREFIX = "lens/"
# Smaller than the op's defaults: 2,048 leaves are scored in less than 10 ms on one CPU core.
SIZES = {"width": 256, "n_heads": 2, "head_value_dim": 16}


@dataclass(frozen=True)
class LensNet:
    """Weights for the features `FEATURES` over one model's embeddings.

    weights: fp32 when trained or loaded (files may hold bf16), on the model's device. mu: [E] fp32, the mean of the
    model's embeddings, on which pooled tokens are centred; it belongs to the model and is not saved.
    """

    weights: LensScoreWeights
    mu: Tensor

    @classmethod
    def untrained(cls, decoder: Decoder, *, generator: torch.Generator | None = None, **sizes: int) -> LensNet:
        """Scores of exactly 0; the same numbers every time unless a generator is given. sizes: see
        `LensScoreWeights.init`."""
        weights = LensScoreWeights.init(
            decoder.config.embed_dim,
            len(FEATURES),
            generator=generator or torch.Generator().manual_seed(0),
            device=decoder.device,
            **(SIZES | sizes),  # type: ignore[arg-type]
        )
        return cls(weights, _mean_embedding(decoder))

    @classmethod
    def load(cls, path: Path | str, decoder: Decoder) -> LensNet:
        """Read a safetensors file written by `save`.

        Raises ModelError if it cannot be read, or was made for other features or another width of embedding.
        """
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
        features = metadata.get(PREFIX + "features")
        if features is None:
            raise ModelError(f"{path}: not LensNet weights: the file does not name the features it was trained for")
        if features != FEATURES_HASH:
            raise ModelError(
                f"{path}: trained for other features ({features}) than this version computes ({FEATURES_HASH}); "
                "train it again, or use the version that it was made with"
            )
        try:
            weights = LensScoreWeights.from_state_dict(tensors, metadata, PREFIX)
            if weights.embed_dim != decoder.config.embed_dim:
                raise ValueError(
                    f"expected embeddings of width {decoder.config.embed_dim}, the file has {weights.embed_dim}"
                )
            if weights.n_features != len(FEATURES):
                raise ValueError(f"expected {len(FEATURES)} features, the file has {weights.n_features}")
            for name, x in weights.state_dict().items():
                if not bool(x.isfinite().all()):
                    raise ValueError(f"{name}: expected finite numbers, got others")
        except (TypeError, ValueError) as error:
            raise ModelError(f"{path}: not LensNet weights for this model: {error}") from error
        return cls(weights.to(decoder.device, torch.float32), _mean_embedding(decoder))

    def save(self, path: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write weights, in `dtype` or as they are, and the name of the features. Raises ModelError if the file cannot
        be written."""
        metadata = self.weights.metadata(PREFIX) | {PREFIX + "features": FEATURES_HASH}
        try:
            save_file({name: x.to(dtype or x.dtype) for name, x in self._state().items()}, str(path), metadata)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: the weights could not be written ({error})") from error

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight and with the features."""
        content = save(self._state()) + f"{self.weights.n_heads} {FEATURES_HASH}".encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def score(self, entries: Tensor, features: Tensor, queries: Tensor, legal: Tensor | None) -> Tensor:
        """`lens_score` of `LensInputs.tensors()`: [N, 2] fp32, nats, of expanding (gain) and of collapsing (cost); 0
        where not legal. Differentiable in weights and inputs. Raises ValueError or TypeError as the op does."""
        return lens_score(entries, features, queries, self.weights, legal=legal)

    def _state(self) -> dict[str, Tensor]:
        return {name: x.cpu() for name, x in self.weights.state_dict(PREFIX).items()}


def _mean_embedding(decoder: Decoder) -> Tensor:
    with torch.no_grad():
        return decoder.embedding.float().mean(0)
