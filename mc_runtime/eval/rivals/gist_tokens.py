"""Gist Tokens (Mu et al. 2023) for a frozen model: G learned embeddings after each block, whose K/V are what stays.

The gist tokens of a block attend to all text up to the block's end, and to earlier gist tokens; what follows attends to
gist tokens only (the masked prefix). Mu et al. train the whole model; here the embeddings alone are trained, with the
loss that our pooled gists are trained with (`gist_tokens_task`). The text itself is read in full context, as for the
other arms. A block's gist tokens stand at its last token, so that they see none of the next block.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mc_runtime.errors import ModelError
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.stores import ConcatStore

from ..pasts import Kept, Past
from . import KeepingRival
from .compressive import span_centres

NAME = "gist_tokens"


def encode_blocks(decoder: Decoder, k: Tensor, v: Tensor, embeddings: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """K/V of the gist tokens of every block, differentiable in `embeddings`.

    k, v: [L, B, Hkv, N, D] of the text in full context, keys unrotated. embeddings: [G, E] -> [L, B, Hkv, N / size * G,
    D] each.
    """
    batch, tokens = k.shape[1], k.shape[3]
    blocks, gists = tokens // size, len(embeddings)
    x = embeddings.to(decoder.dtype).repeat(blocks, 1).expand(batch, blocks * gists, -1)
    ends = torch.arange(1, blocks + 1, device=k.device).repeat_interleave(gists) * size - 1
    store = ConcatStore(k, v, torch.arange(tokens, device=k.device).expand(batch, tokens))
    decoder(x, ends.expand(batch, -1), store)
    return store.keys[:, :, :, tokens:], store.values[:, :, :, tokens:]


class GistTokens(KeepingRival):
    """embeddings: [G, E]; slots must be far / size * G."""

    name = "gist tokens (frozen LM)"

    def __init__(self, embeddings: Tensor, size: int) -> None:
        self.embeddings, self.size = embeddings, size

    @property
    def ratio(self) -> float:
        return self.size / len(self.embeddings)

    @classmethod
    def load(cls, path: Path, decoder: Decoder) -> GistTokens:
        """Read what `save` wrote. Raises ModelError if it cannot be read or does not fit the model."""
        try:
            with safe_open(str(path), "pt") as file:
                embeddings = file.get_tensor(NAME).to(decoder.device)
                size = int((file.metadata() or {})["block_size"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"{path}: not a file of gist tokens ({error})") from error
        if embeddings.dim() != 2 or embeddings.shape[1] != decoder.config.embed_dim:
            raise ModelError(
                f"{path}: expected embeddings [G, {decoder.config.embed_dim}], got {list(embeddings.shape)}"
            )
        return cls(embeddings, size)

    def save(self, path: Path) -> None:
        save_file({NAME: self.embeddings.detach().float().contiguous().cpu()}, path, {"block_size": str(self.size)})

    def keep(self, past: Past, slots: int) -> Kept:
        k, v = encode_blocks(past.decoder, past.k, past.v, self.embeddings, self.size)
        if k.shape[3] != slots:
            raise ValueError(f"slots: expected as many as there are gist tokens, {k.shape[3]}, got {slots}")
        return Kept(k, v, span_centres(past.far, slots, past.ids.device).expand(past.batch, slots))
