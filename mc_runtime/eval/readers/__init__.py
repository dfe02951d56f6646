"""Ways to answer questions about a long history within a budget of slots, ours and others', behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mc_runtime.errors import InputError
from mc_runtime.focus import AttentionPolicy, BlendPolicy, RecencyPolicy, RetrievalPolicy, make_policy
from mc_runtime.lensnet import LensNet

from .base import History, Opened, Question, Reader, Reply, Span
from .bm25 import BM25Append
from .infllm import InfLLM
from .memorizing import Memorizing
from .memory import MakePolicy, MemoryReader
from .policies import EvidencePolicy, RandomPolicy
from .retro import Retro
from .store import MemoryStore
from .window import EvidenceAlone, FullContext, NoText, Recency

__all__ = [
    "READERS",
    "History",
    "MemoryStore",
    "Opened",
    "Question",
    "Reader",
    "Reply",
    "Span",
    "make_readers",
]

# Focus policies over our memory that need no weights: what the command line calls them, and what the tables do.
POLICIES: dict[str, tuple[str, MakePolicy]] = {
    "blend": ("memory, blend", lambda spans: BlendPolicy.default()),
    "retrieval": ("memory, retrieval", lambda spans: RetrievalPolicy()),
    "attention": ("memory, attention", lambda spans: AttentionPolicy()),
    "focus-recency": ("memory, recency", lambda spans: RecencyPolicy()),
    "random": ("memory, random", lambda spans: RandomPolicy()),
    "oracle": ("memory, oracle", EvidencePolicy),
}
LENSNET = ("lensnet", "lensnet+retrieval")
RIVALS = ("bm25", "retro", "recency", "infllm", "memorizing", "none", "full", "evidence")
READERS = (*POLICIES, *LENSNET, *RIVALS)
# Slots of the full context: the ceiling, where a history fits.
FULL = 8192


def make_readers(names: Sequence[str], store: MemoryStore, lensnet: Path | None = None) -> list[Reader]:
    """Readers by name, all with the budget, system prompt and recent window of the store's configuration.

    Raises InputError for a name that is not known, or one that needs weights that are not given.
    """
    model, config = store.model, store.config
    system = model.chat.system_ids(config.system_prompt)
    readers: list[Reader] = []
    for name in names:
        if name in POLICIES:
            readers.append(MemoryReader(*_named(name, store)))
        elif name in LENSNET:
            if lensnet is None:
                raise InputError(f"readers: {name} needs trained weights; give --lensnet FILE")
            readers.append(MemoryReader(f"memory, {name}", store, _with_lensnet(name, store, lensnet)))
        elif name == "bm25":
            readers.append(BM25Append(model, system, config.budget))
        elif name == "retro":
            readers.append(Retro(model, system, config.budget))
        elif name == "recency":
            readers.append(Recency(model, system, config.budget))
        elif name == "none":
            readers.append(NoText(model, system, config.budget))
        elif name == "evidence":
            readers.append(EvidenceAlone(model, system, config.budget))
        elif name == "full":
            readers.append(FullContext(model, system, FULL))
        elif name == "infllm":
            readers.append(InfLLM(model, system, config))
        elif name == "memorizing":
            readers.append(Memorizing(model, system, config))
        else:
            raise InputError(f"readers: expected some of {', '.join(READERS)}, got {name!r}")
    return readers


def _named(name: str, store: MemoryStore) -> tuple[str, MemoryStore, MakePolicy]:
    shown, make = POLICIES[name]
    return shown, store, make


def _with_lensnet(name: str, store: MemoryStore, path: Path) -> MakePolicy:
    policy = make_policy(name, LensNet.load(path, store.model.decoder))
    return lambda spans: policy
