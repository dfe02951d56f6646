"""A Working Context in Hugging Face Transformers: a cache whose entries can be replaced between calls.

    attach(model)                                        # any RoPE decoder of transformers
    cache = WorkingContextCache(model, capacity=2048)    # unrotated keys in slots, a position for each
    model.generate(ids, cache=cache)                     # new tokens only, always; past_key_values= before 5.24
    k, v = cache.read(0, 32)
    cache.splice([Edit(0, 32, 1)], k_gist, v_gist)       # in place; and back again
    model.generate(more_ids, cache=cache)

An attached model hands its queries and keys over unrotated, `context_attention` rotates both from explicit positions
while it reads the cache, and an entry's position is its rank. So a splice moves nothing and renumbers for free.
What an attached model computes without a splice is what it computed before, within rounding.

Raises ImportError, on import, where transformers is missing or too old.
"""

from __future__ import annotations

from . import requirement as requirement
from .attach import Attachment, attach, attachment_of, detach
from .cache import WorkingContextCache
from .embeddings import insert_embeddings, recompute
from .positioned import PositionedCache

__all__ = [
    "Attachment",
    "PositionedCache",
    "WorkingContextCache",
    "attach",
    "attachment_of",
    "detach",
    "insert_embeddings",
    "recompute",
]
