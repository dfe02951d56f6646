"""Which entries are recomputed after an edit.

Entries behind an edit keep keys and values that were computed under the old content. `none` leaves them; `tail`
recomputes the newest `refresh_tail`; `top` recomputes the share whose keys deviate most in an early layer (CacheBlend,
Yao et al. 2024); `text` recomputes every token behind the earliest edit that is not part of the conversation: questions
and answers keep what they were read with, which later ones profit from (docs/quality.md); `full` recomputes these too,
which makes the context equal to one that is assembled from scratch. Pooled and projected gists have no computation to
repeat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from .config import RefreshMode
from .turn_weights import TURN_KINDS

if TYPE_CHECKING:
    from .context import WorkingContext

# Keys of the first layer depend on the token alone; the second layer's are the first that an edit can change.
PROBE_LAYERS = 2


def entries_to_recompute(
    context: WorkingContext, to_run: NDArray[np.int64], earliest: int | None, mode: RefreshMode, newest: int
) -> NDArray[np.int64]:
    """Sorted ranks to run after an edit: `to_run`, the `newest` last entries, and what the mode adds.

    earliest: rank of the earliest edit, None if there was none.
    """
    levels = context.entries.levels
    runnable = levels == 0
    gists = (~runnable).nonzero()[0]
    runnable[gists] = context.reader.runs(context.tree, levels[gists], context.entries.index[gists])
    always = np.zeros(len(levels), np.bool_)
    always[to_run] = True
    always[max(0, len(levels) - newest) :] = True
    behind = np.zeros(len(levels), np.bool_)
    if earliest is not None:
        behind[earliest:] = True
    if mode == "full":
        always |= behind
    elif mode == "text":
        always |= behind & ~_of_turns(context)
    elif mode == "tail" and context.config.refresh_tail:
        behind[: -context.config.refresh_tail] = False
        always |= behind
    elif mode == "top" and behind.any():
        candidates = (behind & runnable).nonzero()[0]
        always[_most_deviating(context, candidates, context.config.refresh_share)] = True
    return (always & runnable).nonzero()[0]


def _of_turns(context: WorkingContext) -> NDArray[np.bool_]:
    """[N]: which entries are tokens of questions and answers: what is pending is, too."""
    entries = context.entries
    result = (entries.levels == 0) & (entries.index >= context.tree.length)
    tokens = (entries.levels == 0).nonzero()[0]
    index = entries.index[tokens]
    for span in entries.token_spans():
        for document in context.tree.documents_over(*span):
            if document.kind in TURN_KINDS:
                first, stop = np.searchsorted(index, (document.start, document.stop))
                result[tokens[first:stop]] = True
    return result


def _most_deviating(context: WorkingContext, candidates: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The share of `candidates` whose keys change most when the first layers are run again. The early layers' fresh
    keys and values stay in the cache: they are right."""
    count = round(share * len(candidates))
    if count == 0:
        return candidates[:0]
    slots = context.slots[torch.from_numpy(candidates).to(context.slots.device)]
    keys = context.cache.k[PROBE_LAYERS - 1, 0]
    before = keys.index_select(1, slots).float()
    context.run(candidates, stop_layer=PROBE_LAYERS)
    change = (keys.index_select(1, slots).float() - before).square().sum(dim=(0, 2))
    return candidates[change.topk(count).indices.cpu().numpy()]
