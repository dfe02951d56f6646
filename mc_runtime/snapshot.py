"""The Working Context on disk, so that a reopened memory continues exactly where it stopped.

`context.safetensors` holds the used slots of the cache; the tree's state holds the layout and the name of the snapshot
that belongs to it. A snapshot whose name or length does not match is ignored, and the context is rebuilt from the tree:
no text can be lost, only the numerics of how it was read.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .context import WorkingContext
from .errors import StorageFullError
from .focus.allocator import layout_entries
from .focus.controller import FocusController
from .timeline import Entries
from .tree import Tree

logger = logging.getLogger("mc_runtime")
FILE = "context.safetensors"
STATE = "session"


def save_snapshot(directory: Path, tree: Tree, context: WorkingContext, focus: FocusController) -> None:
    """Write cache and layout. Pending tokens must have been committed."""
    if context.pending:
        raise ValueError(f"context: expected no pending tokens, got {len(context.pending)}")
    name = uuid.uuid4().hex
    slots = torch.arange(context.used, device=context.slots.device)
    k, v = context.cache.gather(slots)
    tensors = {"k": k, "v": v, "slots": context.slots}
    for block, (kept_k, kept_v) in context.archive.items():
        tensors |= {f"archive/{block}/k": kept_k, f"archive/{block}/v": kept_v}
    temporary = directory / f"{FILE}.{os.getpid()}.tmp"
    try:
        save_file({key: x.cpu().contiguous() for key, x in tensors.items()}, str(temporary), {"name": name})
        os.replace(temporary, directory / FILE)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageFullError(
            f"{directory / FILE}: the context could not be saved ({error}); free some space and close again, "
            "the text is safe"
        ) from error
    state = {
        "snapshot": name,
        "length": tree.length,
        "counts": list(context.counts_seen),
        "gist_kind": context.config.gist_kind,
        "gist_bias": context.config.gist_bias,
        "archive": [block for block, _ in context.archive.items()],
        "expanded": {str(level): nodes.tolist() for level, nodes in context.expanded.items()},
        "focus": focus.state(),
    }
    with tree.begin() as transaction:
        transaction.set_state(STATE, json.dumps(state).encode())


def load_snapshot(directory: Path, tree: Tree, context: WorkingContext, focus: FocusController) -> bool:
    """Restore what `save_snapshot` wrote. False (and a log line) if there is nothing that fits the tree."""
    raw = tree.state(STATE)
    if raw is None:
        return False
    state: dict[str, Any] = json.loads(raw)
    focus.load_state(state["focus"])
    if state["length"] != tree.length:
        logger.info("the memory has grown since its context was saved; the context is rebuilt")
        return False
    if not state["counts"]:  # saved before anything was asked
        return False
    if state["gist_kind"] != context.config.gist_kind:
        logger.info("gists of another kind were saved; the context is rebuilt")
        return False
    if state.get("gist_bias") != context.config.gist_bias:
        logger.info("tokens were read behind gists of another weight; the context is rebuilt")
        return False
    try:
        with safe_open(str(directory / FILE), "pt") as file:
            if (file.metadata() or {}).get("name") != state["snapshot"]:
                raise ValueError("it belongs to another state")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        logger.warning("the saved context cannot be used (%s); it is rebuilt", error)
        return False
    expanded = {int(level): np.asarray(nodes, np.int64) for level, nodes in state["expanded"].items()}
    size = context.config.block_size
    entries = Entries(*layout_entries(size, state["counts"], expanded), size)
    if len(entries) > context.cache.capacity or tensors["k"].shape[2] != len(entries):
        logger.info("the budget has changed since the context was saved; it is rebuilt")
        return False
    device = context.decoder.device
    context.cache.k[:, 0, :, : len(entries)] = tensors["k"].to(device)
    context.cache.v[:, 0, :, : len(entries)] = tensors["v"].to(device)
    context.slots = tensors["slots"].to(device)
    context.cache.set_ranks(context.slots, context.bias_of(entries))
    context.entries, context.expanded, context.counts_seen = entries, expanded, tuple(state["counts"])
    for block in state["archive"]:
        context.archive.put(block, tensors[f"archive/{block}/k"].to(device), tensors[f"archive/{block}/v"].to(device))
    return True
