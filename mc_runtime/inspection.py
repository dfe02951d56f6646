"""What the command line shows of a memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .focus.forest import layout_entries
from .focus_map import FocusFrame, FocusMap
from .printable import printable
from .stats import SessionStats
from .timeline import Entries
from .tree import NodeFlag, Tree

if TYPE_CHECKING:
    from rich.console import Console

    from .retrieval import Hit

# The key of the tree's state under which `snapshot` keeps the layout.
STATE = "session"


def overview(tree: Tree) -> str:
    """One line on what the memory is made for."""
    spec = tree.spec
    return printable(
        f"{tree.length:,} tokens in blocks of {spec.block_size}, {tree.count_documents():,} documents; "
        f"model {spec.model}, tokenizer {spec.tokenizer}, GistNet {spec.gistnet}, stored as {spec.dtype}"
    )


def level_rows(tree: Tree) -> Iterator[tuple[str, ...]]:
    """Level, nodes, tokens covered by one, nodes with pooled keys and values, nodes without."""
    yield "0", f"{tree.length:,}", "1", "", ""
    for level in range(1, tree.n_levels + 1):
        pooled = int(np.count_nonzero(tree.flags(level) & NodeFlag.KV))
        count = tree.count(level)
        yield str(level), f"{count:,}", f"{tree.spec.block_size**level:,}", f"{pooled:,}", f"{count - pooled:,}"


def document_rows(tree: Tree, last: int | None) -> Iterator[tuple[str, ...]]:
    """Id, kind, title, tokens, span, and how it was ingested, of the newest `last` documents or of all."""
    documents = tree.documents()
    for d in documents if last is None else documents[-last:]:
        tokens, start, stop = (f"{n:,}" for n in (d.stop - d.start, d.start, d.stop))
        yield str(d.id), printable(d.kind), printable(d.title), tokens, start, stop, printable(d.ingest)


def left_out(shown: int, total: int, what: str, how: str) -> str | None:
    """The line that says that the newest `shown` of `total` are all there is to see, and how to see them all."""
    return f"the newest {shown:,} of {total:,} {what}; {how} shows all" if shown < total else None


def newest_frames(focus_map: FocusMap, last: int | None) -> str:
    """A focus map of the newest `last` turns, or of all."""
    frames = focus_map.frames if last is None else focus_map.frames[-last:]
    more = left_out(len(frames), len(focus_map.frames), "turns", "/map all")
    return "\n".join([*([more] if more else []), FocusMap(frames).text()])


def saved_focus_map(tree: Tree, columns: int) -> str:
    """The layout that was saved last, as text."""
    raw = tree.state(STATE)
    if raw is None:
        return "no focus yet: nothing has been asked"
    state = json.loads(raw)
    expanded = {int(level): np.asarray(nodes, np.int64) for level, nodes in state["expanded"].items()}
    size = tree.spec.block_size
    counts = [int(n) for n in state["counts"]]
    if not counts:
        return "no focus yet: nothing has been asked"
    entries = Entries(*layout_entries(size, counts, expanded), size)
    per_level = ", ".join(f"{count:,} at level {level}" for level, count in entries.per_level().items())
    frame = FocusFrame(f"{len(entries):,} slots: {per_level}", entries, counts[0])
    return FocusMap([frame]).text(columns)


def turn_line(stats: SessionStats) -> str:
    """What the last turn took."""
    turn = stats.turns[-1]
    slots = ", ".join(f"{count:,} at level {level}" for level, count in stats.slots.items())
    return (
        f"{stats.tokens:,} tokens in {stats.used:,} slots ({slots}); {turn.edits} edits; "
        f"{turn.seconds_per_refocus * 1e3:.0f} ms per refocus, {turn.seconds_per_token * 1e3:.1f} ms per token, "
        f"first token after {turn.time_to_first_token:.2f} s"
    )


def print_hits(console: Console, hits: Sequence[Hit]) -> None:
    """Search hits, best first."""
    for hit in hits:
        text = printable(" ".join(hit.text.split()))
        console.print(f"{hit.score:6.2f}  {hit.start:,}  {printable(hit.source or '')}: {text}", soft_wrap=True)
