"""How a memory is kept: the settings of a `Session`, checked once, when it is opened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from .errors import BudgetError, InputError
from .focus.allocator import FocusParams

GistKind = Literal["pooled", "projected", "embedding"]
IngestMode = Literal["contextual", "fast"]
RefreshMode = Literal["none", "tail", "top", "text", "full"]

BLOCK_SIZES = (8, 16, 32, 64, 128)
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant. Answer questions about the text briefly and exactly."


def _check_choice(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise InputError(f"{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of a memory. Lengths are in tokens, which are cache slots at full detail.

    budget: slots of the Working Context, W.
    block_size: children per gist, K.
    gist_kind: how a gist is put in front of the model (see `mc_runtime.gists`).
    gist_bias: what a gist weighs in attention beside a token, as a logarithm (0: alike): hundreds of gists together
        draw attention from the passages that are open. None: what the gists' weights ask for of keys and values, 0 of
        embeddings and of untrained gists.
    ingest: `contextual` runs the text through the model, `fast` only through GistNet.
    refresh: what is recomputed after the edits of a user turn (see `mc_runtime.refresh`); refresh_decode: after those
        of a refocus while decoding, or between the parts of a prompt that is longer than the free slots.
    refresh_tail: entries recomputed by `tail`; share of later entries recomputed by `top`: `refresh_share`.
    recent_tokens: newest tokens, always at full detail.
    ingest_chunk, ingest_window: tokens per forward of contextual ingest, and how many it sees before them.
    archive_kv: collapsed token blocks whose exact K/V are kept in memory for the way back (0: recompute).
    policy: name of the focus policy: retrieval, blend, attention, recency, retrieval+recency or hindsight, or, with
        weights, lensnet or lensnet+retrieval (see `mc_runtime.focus`).
    system_prompt: opens a memory that is new, and always stays at full detail; one that exists keeps its own.
    focus: how the allocator decides (see `mc_runtime.focus.allocator`).
    """

    budget: int = 2048
    block_size: int = 32
    gist_kind: GistKind = "pooled"
    gist_bias: float | None = None
    ingest: IngestMode = "contextual"
    refresh: RefreshMode = "text"
    refresh_decode: RefreshMode = "none"
    refresh_tail: int = 64
    refresh_share: float = 0.15
    recent_tokens: int = 256
    ingest_chunk: int = 512
    ingest_window: int = 512
    archive_kv: int = 0
    policy: str = "retrieval"
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    focus: FocusParams = field(default_factory=FocusParams)

    def __post_init__(self) -> None:
        _check_choice("gist_kind", self.gist_kind, GistKind)
        _check_choice("ingest", self.ingest, IngestMode)
        _check_choice("refresh", self.refresh, RefreshMode)
        _check_choice("refresh_decode", self.refresh_decode, RefreshMode)
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"block_size: expected one of {BLOCK_SIZES}, got {self.block_size!r}")
        for name, least in (
            ("budget", 1),
            ("refresh_tail", 0),
            ("recent_tokens", 0),
            ("ingest_chunk", self.block_size),
            ("ingest_window", 0),
            ("archive_kv", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if self.ingest_chunk % self.block_size:
            raise InputError(f"ingest_chunk: expected a multiple of {self.block_size}, got {self.ingest_chunk!r}")
        if not isinstance(self.refresh_share, int | float) or not 0.0 <= self.refresh_share <= 1.0:
            raise InputError(f"refresh_share: expected a number from 0 to 1, got {self.refresh_share!r}")
        if self.gist_bias is not None and not (
            isinstance(self.gist_bias, int | float) and -1e4 <= self.gist_bias <= 1e4
        ):
            raise InputError(f"gist_bias: expected a finite number, a log-weight, got {self.gist_bias!r}")
        if not isinstance(self.system_prompt, str):
            raise InputError(f"system_prompt: expected text, got {type(self.system_prompt).__name__}")
        if not isinstance(self.focus, FocusParams):
            raise InputError(f"focus: expected FocusParams, got {type(self.focus).__name__}")
        # Two blocks beyond what is pinned: one that is being filled, one to expand.
        least = self.recent_tokens + 3 * self.block_size
        if self.budget < least:
            raise BudgetError(
                f"budget: {self.budget} slots cannot hold {self.recent_tokens} recent tokens and three blocks; "
                f"give at least {least}, or fewer recent_tokens"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
