"""Centred mean embedding: the mean of a span's input embeddings less the vocabulary's mean, at the embeddings' RMS,
run through the model as one entry. It is what our embedding gists are before training (an untrained `gist_encode`)."""

from __future__ import annotations

from mc_runtime.gistnet import GistNet
from mc_runtime.model.decoder import Decoder

from .gists import EmbeddingGists


def centred_mean(decoder: Decoder, ratio: int, size: int) -> EmbeddingGists:
    """ratio: tokens per slot, at most `size` or a power of it."""
    level = 1
    while size**level < ratio:
        level += 1
    span = ratio if level == 1 else size
    if span**level != ratio:
        raise ValueError(f"ratio: expected at most {size} or a power of it, got {ratio}")
    net = GistNet.untrained(decoder, span)
    return EmbeddingGists("centred mean embedding", net, span, level, ours=False)
