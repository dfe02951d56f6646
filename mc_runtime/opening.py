"""What a session is opened with: settings, model, nets, and what the tree has to match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import MemoryConfig
from .engines import CacheEngine, make_engine
from .errors import BudgetError, InputError
from .focus import LENSNET_POLICIES, make_policy
from .gistnet import GistNet
from .lensnet import LensNet
from .model import LoadedModel, load_model
from .shipped import gistnet_file, lensnet_file
from .tree import TreeSpec


@dataclass(frozen=True)
class Parts:
    """engine: runs the model. spec: what a tree for this model, net and block size has to say of itself."""

    model: LoadedModel
    engine: CacheEngine
    gistnet: GistNet
    lensnet: LensNet | None
    spec: TreeSpec


def read_settings(config: MemoryConfig | None, settings: Mapping[str, Any], *, has_lensnet: bool) -> MemoryConfig:
    """`config` with `settings` in place of its fields; refuses unknown ones, unknown policies, and weights of LensNet
    (`has_lensnet`) that the policy does not use."""
    if config is not None and not isinstance(config, MemoryConfig):
        raise InputError(f"config: expected a MemoryConfig, got {type(config).__name__}")
    try:
        config = replace(config or MemoryConfig(), **settings)
    except TypeError as error:
        known = ", ".join(MemoryConfig.__dataclass_fields__)
        raise InputError(f"settings: {', '.join(settings)}: expected fields of MemoryConfig ({known})") from error
    if config.policy not in LENSNET_POLICIES:
        make_policy(config.policy)
    if has_lensnet and config.policy not in LENSNET_POLICIES:
        names = " or ".join(f'"{name}"' for name in LENSNET_POLICIES)
        raise InputError(f"lensnet: weights serve policy={names} alone, got policy={config.policy!r}")
    return config


def load_parts(
    model: str | Path | LoadedModel,
    config: MemoryConfig,
    gistnet: Path | str | None,
    lensnet: Path | str | None,
    engine: str | CacheEngine,
) -> Parts:
    """Load what is not loaded yet and check that the settings suit the model. gistnet, lensnet: see `shipped`;
    engine: see `make_engine`."""
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    c, size = loaded.config, config.block_size
    larger = "ingest_window" if config.ingest_window >= config.ingest_chunk else "ingest_chunk"
    for name, needed in (("budget", config.budget), (larger, size + config.ingest_window + config.ingest_chunk)):
        if needed > c.max_positions:
            raise InputError(
                f"{name}: {needed} slots are more than the {c.max_positions} positions that the model was trained "
                f"for; give a smaller {name}"
            )
    decoder = loaded.decoder
    file = gistnet_file(gistnet, loaded.fingerprint, size)
    net = GistNet.untrained(decoder, size) if file is None else GistNet.load(file, decoder, size)
    if any(weights.n_gists > 1 for weights in net.pool_weights):
        raise InputError(f"gistnet: {file} has several gists per block; a memory takes one")
    lens = (
        LensNet.load(lensnet_file(lensnet, loaded.fingerprint), decoder) if config.policy in LENSNET_POLICIES else None
    )
    spec = TreeSpec(
        block_size=size,
        embed_dim=c.embed_dim,
        n_layers=c.n_layers,
        n_kv_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        dtype=str(decoder.dtype).removeprefix("torch."),
        vocab_size=loaded.tokenizer.vocab_size,
        model=loaded.fingerprint,
        tokenizer=loaded.tokenizer.fingerprint,
        gistnet=net.fingerprint,
    )
    return Parts(loaded, make_engine(engine, decoder), net, lens, spec)


def check_policy(policy: object) -> None:
    """Refuse what is no focus policy, a class of policies too, before a memory is opened with it."""
    missing = [name for name in ("needs_mass", "utilities") if not hasattr(policy, name)]
    if isinstance(policy, type) or missing:
        got = f"the class {policy.__name__}" if isinstance(policy, type) else type(policy).__name__
        raise InputError(f"policy: expected a name or an object with `needs_mass` and `utilities`, got {got}")


def check_room(head: int, config: MemoryConfig) -> None:
    """Refuse a system prompt, of `head` tokens, that the budget cannot hold beside what else has to stand in it."""
    blocks = -(-head // config.block_size)
    least = config.recent_tokens + (blocks + 2) * config.block_size
    if config.budget < least:
        raise BudgetError(
            f"system_prompt: its {head} tokens always stay at full detail, beside {config.recent_tokens} recent tokens "
            f"and two blocks, and the budget is {config.budget}; give a shorter one, or a budget of at least {least}"
        )
