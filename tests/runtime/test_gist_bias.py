"""What gists weigh: the log-weight reaches attention for gists alone, survives edits, branches and a restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import SMALL, bring_in, words
from torch import Tensor

from mc_runtime import Session
from mc_runtime.config import GistKind
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.kv_cache import KVCache
from mc_runtime.model import LoadedModel
from mc_runtime.snapshot import STATE, load_snapshot

Memory = Callable[..., Session]
NEVER = -1e4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def bias_by_rank(session: Session) -> Tensor:
    context = session.context
    bias = context.cache.bias
    assert bias is not None
    assert not bias[0, context.used :].any(), "an empty slot weighs nothing"
    return bias[0, context.slots]


def assert_right(session: Session, weight: float) -> None:
    levels = torch.from_numpy(session.context.entries.levels)
    torch.testing.assert_close(bias_by_rank(session), (levels > 0).float() * weight)


def test_follows_edits(memory: Memory) -> None:
    session = memory(budget=256, gist_bias=-2.5)
    session.ingest(words(400))
    bring_in(session)
    assert_right(session, -2.5)
    gists = int((session.context.entries.levels > 0).sum())
    assert gists > 0
    session.focus_on((64, 96))
    assert_right(session, -2.5)
    session.generate("what is said?", max_new_tokens=40)
    assert_right(session, -2.5)


def test_none_by_default(memory: Memory) -> None:
    session = memory()
    assert session.context.cache.bias is None


def test_weights_say_what_they_weigh(memory: Memory, model: LoadedModel, tmp_path: Path) -> None:
    net = replace(GistNet.untrained(model.decoder, SMALL["block_size"]), gist_bias=-1.25)
    net.save(tmp_path / "net.safetensors")
    session = memory(budget=256, gistnet=tmp_path / "net.safetensors")
    assert session.config.gist_bias == -1.25
    session.ingest(words(400))
    bring_in(session)
    assert_right(session, -1.25)
    session.close()
    assert memory(budget=256, gistnet=tmp_path / "net.safetensors", gist_bias=0.0).context.cache.bias is None


@pytest.mark.parametrize(("kind", "weight"), [("projected", -1.25), ("embedding", 0.0)])
def test_they_say_it_of_keys_and_values(
    memory: Memory, model: LoadedModel, tmp_path: Path, kind: GistKind, weight: float
) -> None:
    """Of gists that were trained to be read as keys and values, not of input embeddings."""
    replace(GistNet.untrained(model.decoder, SMALL["block_size"]), gist_bias=-1.25).save(tmp_path / "net.safetensors")
    assert memory(budget=256, gistnet=tmp_path / "net.safetensors", gist_kind=kind).config.gist_bias == weight


def test_gists_of_no_weight_are_not_there(memory: Memory, model: LoadedModel) -> None:
    """At a weight of zero the newest tokens' keys and values are those of a context without the gists."""
    session = memory(budget=256, gist_bias=NEVER)
    session.ingest(words(400))
    bring_in(session)
    context = session.context
    tokens = (context.entries.levels == 0).nonzero()[0]
    assert len(tokens) < context.used
    context.run(tokens)
    found_k, found_v = context.cache.gather(context.slots[torch.from_numpy(tokens)])

    cache = KVCache.allocate(model.config, context.used, dtype=model.decoder.dtype, device=model.decoder.device)
    slots = torch.arange(len(tokens))
    cache.pos[0, slots] = torch.from_numpy(tokens)  # the same ranks, with holes where the gists stood
    x = context.inputs(tokens)[None]
    model.decoder(x, torch.from_numpy(tokens)[None], cache.writer(slots[None], len(tokens)))
    k, v = cache.gather(slots)
    torch.testing.assert_close(found_k, k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_v, v, rtol=1e-4, atol=1e-4)


def test_batch_answers_like_one(memory: Memory) -> None:
    """Branches of a batch weigh gists as the session does."""
    session = memory(budget=256, gist_bias=-3.0)
    session.ingest(words(400))
    alone = [session.generate([text], max_new_tokens=8) for text in ("first one?", "and a second one?")]
    together = session.generate(["first one?", "and a second one?"], max_new_tokens=8)
    assert [x[0] for x in alone] == together


def test_restart(memory: Memory) -> None:
    session = memory(budget=256, gist_bias=-2.0)
    session.ingest(words(400))
    session.generate("what is said?", max_new_tokens=4)
    before = bias_by_rank(session).clone()
    session.close()
    again = memory(budget=256, gist_bias=-2.0)
    assert again.context.used > 0
    torch.testing.assert_close(bias_by_rank(again), before)
    again.close()
    other = memory(budget=256, gist_bias=-1.0)
    assert other.context.used == 0, "tokens that were read behind gists of another weight are read again"


def test_a_snapshot_that_does_not_say_is_rebuilt(memory: Memory) -> None:
    session = memory(budget=256)
    session.ingest(words(400))
    session.generate("what is said?", max_new_tokens=4)
    session.save()
    raw = session.tree.state(STATE)
    assert raw is not None
    state = json.loads(raw)
    del state["gist_bias"]
    with session.tree.begin() as transaction:
        transaction.set_state(STATE, json.dumps(state).encode())
    assert not load_snapshot(session.path, session.tree, session.context, session.focus)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "low", 1e9])
def test_refused(memory: Memory, value: Any) -> None:
    with pytest.raises(InputError, match="gist_bias"):
        memory(gist_bias=value)


def test_weights_need_a_weighted_cache(model: LoadedModel) -> None:
    cache = KVCache.allocate(model.config, 8, dtype=model.decoder.dtype, device=model.decoder.device)
    with pytest.raises(ValueError, match="bias"):
        cache.set_ranks(torch.arange(2), torch.zeros(2))
    assert (cache.pos == -1).all()
