"""What goes wrong around a memory: each a one-line error that says what to do, and a memory that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import check_session, kv_by_rank, refused, words
from safetensors.torch import save_file
from tiny import tiny_model

from mc_runtime import MegaContextError, MemoryConfig, Session
from mc_runtime.config import DEFAULT_SYSTEM_PROMPT
from mc_runtime.errors import BudgetError, InputError, ModelError, TreeError
from mc_runtime.focus import RecencyPolicy
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel

Memory = Callable[..., Session]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bugdet": 512}, "bugdet: expected fields of MemoryConfig .budget, "),
        ({"budget": 5000}, "5000 slots are more than the 4096 positions .* give a smaller budget"),
        ({"budget": 40}, "give at least 48, or fewer recent_tokens"),
        ({"budget": "many"}, "budget: expected an integer of at least 1, got 'many'"),
        ({"budget": True}, "budget: expected an integer"),
        ({"block_size": 12}, "block_size: expected one of"),
        ({"gist_kind": "mean"}, "gist_kind: expected one of pooled, projected, embedding, got 'mean'"),
        ({"ingest": "slow"}, "ingest: expected one of contextual, fast"),
        ({"refresh": "half"}, "refresh: expected one of none, tail, top, text, full"),
        ({"refresh_share": 1.5}, "refresh_share: expected a number from 0 to 1, got 1.5"),
        ({"refresh_share": "all"}, "refresh_share: expected a number"),
        ({"refresh_tail": -1}, "refresh_tail: expected an integer of at least 0"),
        ({"ingest_chunk": 20}, "ingest_chunk: expected a multiple of 8, got 20"),
        ({"ingest_chunk": "x"}, "ingest_chunk: expected an integer"),
        ({"archive_kv": 1.5}, "archive_kv: expected an integer"),
        ({"policy": "best"}, "policy: expected one of .*, got 'best'"),
        ({"policy": 5}, "policy: expected a name or an object with `needs_mass` and `utilities`, got int"),
        ({"policy": RecencyPolicy}, "policy: expected a name or an object .*, got the class RecencyPolicy"),
        ({"config": {"budget": 512}}, "config: expected a MemoryConfig, got dict"),
        ({"ingest_chunk": 8000}, "ingest_chunk: .* more than the 4096 positions .* give a smaller ingest_chunk"),
        ({"system_prompt": None}, "system_prompt: expected text"),
        ({"focus": "sharp"}, "focus: expected FocusParams"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unusable_settings(memory: Memory, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with refused(MegaContextError, message):
        memory(recent_tokens=24, **settings)
    assert not (tmp_path / "memory").exists()


def test_settings_override_a_config(tmp_path: Path, model: LoadedModel) -> None:
    config = MemoryConfig(budget=512, block_size=8, recent_tokens=16)
    with Session.open(tmp_path / "m", model, config=config, budget=256) as session:
        assert (session.config.budget, session.config.block_size) == (256, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.generate(""), "prompt: expected text"),
        (lambda s: s.generate(" \n"), "prompt: expected text"),
        (lambda s: s.generate("hi", max_tokens=3), "sampling: max_tokens: expected max_new_tokens, "),
        (lambda s: s.generate("hi", temperature=-1), "temperature: expected"),
        (lambda s: s.generate("hi", stop="x"), "stop: expected a tuple"),
        (lambda s: s.generate("hi", temperature=10**400), "temperature: expected"),
        (lambda s: s.generate("hi", seed=True), "seed: expected"),
        (lambda s: s.ingest({"title": "a", "text": "b"}), "source: expected a path, text, .* got dict"),
        (lambda s: s.ingest({"one", "two"}), "source: expected a path, text, .* got set"),
        (lambda s: s.ingest(torch.ones(3, dtype=torch.bfloat16)), "source: expected a list of integer token ids"),
        (lambda s: s.ingest(torch.ones(3, requires_grad=True)), "source: expected a list of integer token ids"),
        (lambda s: s.ingest_evidence([{"text": "a", "score": 10**400}]), "hits.0.: expected a finite number"),
        (lambda s: s.ingest_evidence([{"text": "a", "score": np.complex64(1)}]), "hits.0.: expected a finite number"),
        (lambda s: s.ingest("text", mode="slow"), "mode: expected one of contextual, fast, got 'slow'"),
        (lambda s: s.generate(None), "prompt: expected text, or a list of texts, .* got NoneType"),
        (lambda s: s.generate(Path("question.txt")), "prompt: expected text, or a list of texts, .* got PosixPath"),
        (lambda s: s.generate({"role": "user", "content": "hi"}), "prompt: expected text, .* got dict"),
        (lambda s: s.generate([{"role": "user", "content": "hi"}]), "prompt: expected text, or a list of texts"),
        (lambda s: s.search("  "), "text: expected words to search for"),
        (lambda s: s.search(None), "text: expected words to search for, got None"),
        (lambda s: s.search("sea", 0), "top: expected an integer of at least 1, got 0"),
        (lambda s: s.search("sea", "3"), "top: expected an integer of at least 1, got '3'"),
        (lambda s: s.search("sea", kinds="user"), "kinds: expected some of document, evidence, user"),
        (lambda s: s.search("sea", kinds=["book"]), "kinds: expected some of document"),
        (lambda s: s.search("sea", kinds=[]), "kinds: expected some of document"),
        (lambda s: s.pin("the sea"), "span: expected two integers .start, stop., a document or a hit, got 'the sea'"),
        (lambda s: s.pin((1, 2, 3)), "span: expected two integers"),
        (lambda s: s.pin((1.5, 3)), "span: expected two integers"),
        (lambda s: s.pin(None), "span: expected two integers .* got None"),
        (lambda s: s.focus_on(4), "span: expected two integers .* got 4"),
        (lambda s: s.focus_on((5, 3)), "span: expected 0 <= start < stop"),
        (lambda s: s.unpin("sea"), "span: expected two integers"),
        (lambda s: s.ingest_evidence(None), "hits: expected a list of mappings"),
        (lambda s: s.ingest_evidence({"text": "a passage"}), "hits: expected a list of mappings .* got dict"),
        (lambda s: s.ingest_messages(None), "messages: expected a list of mappings, got NoneType"),
        (lambda s: s.focus_map().text(columns=0), "columns: expected at least 1, got 0"),
        (lambda s: s.generate("a\ud800"), "valid Unicode"),
    ],
)  # fmt: skip
def test_unusable_arguments(memory: Memory, call: Callable[[Session], Any], message: str) -> None:
    session = memory()
    length = session.tree.length
    with refused(InputError, message):
        call(session)
    assert session.tree.length == length
    assert not session._streaming
    session.generate("hello", max_new_tokens=1)


def test_places_that_are_no_memory(memory: Memory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    with refused(TreeError, "is a file, and a tree is a directory: choose another path"):
        memory("file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("hello")
    with refused(TreeError, "holds 'notes.txt' and no tree"):
        memory("other")
    with refused(ModelError, "no-such-model"):
        Session.open(tmp_path / "m", tmp_path / "no-such-model")
    assert not (tmp_path / "m").exists()


def broken_gistnets(model: LoadedModel, path: Path) -> dict[str, Callable[[], object]]:
    c = model.config
    up, bias = torch.zeros(c.n_layers, 2, c.n_kv_heads, c.head_dim, 4), torch.zeros(c.n_layers, 2, 2, c.head_dim)
    down = torch.zeros(4, c.embed_dim)

    def saved(**parts: torch.Tensor) -> Callable[[], object]:
        return lambda: save_file({name.replace("__", "/"): x for name, x in parts.items()}, path)

    return {
        "missing": lambda: None,
        "garbage": lambda: path.write_bytes(b"garbage" * 99),
        "empty": lambda: path.write_bytes(b""),
        "directory": path.mkdir,
        "another block size": lambda: GistNet.untrained(model.decoder, 4).save(path),
        "another width": saved(project__down=torch.zeros(4, 31), project__up=up, project__bias=bias),
        "another rank": saved(project__down=torch.zeros(5, 32), project__up=up, project__bias=bias),
        "fewer layers": saved(project__down=down, project__up=up[1:], project__bias=bias[1:].clone()),
        "a part alone": saved(project__down=down),
        "levels with a gap": saved(pool2__w=down),
        "not a level": saved(poolx__w=down),
        "another encoder": saved(encode__w=down),
        "not finite": saved(project__down=down * float("nan"), project__up=up, project__bias=bias),
    }


@pytest.mark.parametrize(
    "how",
    ["missing", "garbage", "empty", "directory", "another block size", "another width", "another rank", "fewer layers",
     "a part alone", "levels with a gap", "not a level", "another encoder", "not finite"],
)  # fmt: skip
def test_broken_gistnet_files(memory: Memory, model: LoadedModel, tmp_path: Path, how: str) -> None:
    path = tmp_path / "net.safetensors"
    broken_gistnets(model, path)[how]()
    with refused(ModelError, "net.safetensors: not "):
        memory(gistnet=path)
    assert not (tmp_path / "memory").exists()


def test_a_system_prompt_that_leaves_no_room(memory: Memory, tmp_path: Path) -> None:
    """Said when the memory is made, and not at every question."""
    with refused(
        BudgetError, "system_prompt: its 1010 tokens always stay .* give a shorter one, or a budget of at least"
    ):
        memory(system_prompt="x" * 1000)
    assert not (tmp_path / "memory").exists()
    session = memory(system_prompt="x" * 100, block_size=16)  # and the folder can still be used, by any settings
    session.generate("hello", max_new_tokens=12)
    check_session(session)


def test_another_system_prompt_is_not_dropped_in_silence(memory: Memory, caplog: pytest.LogCaptureFixture) -> None:
    for given, said in (("be brief", 0), ("be brief", 0), (DEFAULT_SYSTEM_PROMPT, 0), ("be long", 1)):
        caplog.clear()
        session = memory(system_prompt=given)
        assert len([r for r in caplog.records if "the memory keeps the one that it was made with" in r.message]) == said
        assert "be brief" in session.model.tokenizer.decode(session.tree.tokens().tolist())
        session.close()


def test_a_model_that_breaks_while_decoding(memory: Memory) -> None:
    """Embeddings that are not finite: the block is refused by the tree, dropped from the context, and all goes on."""
    model = tiny_model()
    session = memory(model=model)
    session.ingest(words(300))
    session.generate("hello", max_new_tokens=3)
    good = model.decoder.embedding.clone()
    stream = session.generate("go on", stream=True, max_new_tokens=40)
    next(stream)
    model.decoder.embedding.data.fill_(float("nan"))
    with refused(InputError, "is not finite"):
        list(stream)
    model.decoder.embedding.data.copy_(good)
    assert not session.context.pending
    check_session(session)
    session.tree.verify()
    session.generate("go on", max_new_tokens=20)
    assert all(x.isfinite().all() for x in kv_by_rank(session.context))


def test_a_budget_smaller_than_the_pins(memory: Memory) -> None:
    session = memory()
    document = session.ingest(words(500))
    with refused(BudgetError, "raise the budget or pin less"):
        session.pin(document)
    session.close()
    session = memory(budget=256)
    session.pin((document.start, document.start + 100))
    session.close()
    session = memory(budget=96)
    with refused(BudgetError, "raise the budget or pin less .* 1 pins are kept in full"):
        session.generate("hello", max_new_tokens=3)
    session.unpin((document.start, document.start + 100))
    session.generate("hello", max_new_tokens=3)
    check_session(session)
