"""Entries that are run through the model at a rank of the Working Context: gists of kind `embedding`, and tokens that
an edit has left stale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...checks import check_same_device, check_shape, check_tensor
from ...kv_splice import Edit
from .attach import attachment_of
from .cache import WorkingContextCache
from .probe import embedding_weight


@torch.no_grad()
def recompute(model: PreTrainedModel, cache: WorkingContextCache, ranks: Sequence[int], inputs: Tensor) -> Any:
    """Run entries again where they stand: each sees the context up to its own rank, and its keys and values are
    written over the old ones, in one forward.

    ranks: [T] sorted, of every row. inputs: [B, T] token ids (int64) or [B, T, E] vectors in the model's dtype.
    Returns the model's output over these entries. Raises ValueError and TypeError before anything changes.
    """
    argument = attachment_of(model).cache_argument
    embeddings = embedding_weight(model)
    shape: tuple[int | str, ...] = (cache.batch_size, len(ranks))
    if inputs.dtype.is_floating_point:
        _check_vectors("inputs", inputs, (*shape, embeddings.shape[1]), embeddings)
    else:
        check_tensor("inputs", inputs, (torch.int64,))
        check_shape("inputs", inputs, shape, {})
    name = "inputs_embeds" if inputs.dtype.is_floating_point else "input_ids"
    with cache.at(ranks):
        return model(**{name: inputs, argument: cache})


@torch.no_grad()
def insert_embeddings(
    model: PreTrainedModel, cache: WorkingContextCache, start: int, embeddings: Tensor, *, remove: int = 0
) -> Any:
    """Replace the `remove` entries from rank `start` on, of every row, by vectors that are run through the model there.

    embeddings: [B, M, E] in the model's dtype, M >= 1. Returns the model's output over them. Raises ValueError and
    TypeError before anything changes; if the forward itself fails, the new entries are zeros. The vectors are what
    transformers calls `inputs_embeds`: of the kind that `model.get_input_embeddings()(ids)` gives.
    """
    attachment_of(model)  # first of all: a splice without the forward would leave zeros
    weight = embedding_weight(model)
    _check_vectors("embeddings", embeddings, (cache.batch_size, "M", weight.shape[1]), weight)
    count = embeddings.shape[1]
    if not count:
        raise ValueError("embeddings: expected M >= 1, got M=0")
    layers, _, _, heads, _, dim = cache.data.shape
    nothing_yet = cache.data.new_zeros(layers, heads, count, dim)
    cache.splice([Edit(start, remove, count)], nothing_yet, nothing_yet)
    return recompute(model, cache, range(start, start + count), embeddings)


def _check_vectors(name: str, given: Tensor, shape: tuple[int | str, ...], weight: Tensor) -> None:
    check_tensor(name, given, (weight.dtype,))
    check_shape(name, given, shape, {})
    check_same_device(("the model", weight), **{name: given})
