"""Ways to answer from a long history: within their budget, without a trace, and from what they say they saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reader_cases import CONFIG, FACT, fact_question, small_history, system, text

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.eval.readers import READERS, History, MemoryStore, Question, Reader, Span, make_readers
from mc_runtime.eval.readers.base import share_covered
from mc_runtime.eval.readers.decoding import prompt_ids
from mc_runtime.eval.readers.memory import MemoryReader, OpenedMemory
from mc_runtime.eval.readers.policies import EvidencePolicy
from mc_runtime.eval.readers.window import FullContext
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel


@pytest.fixture
def history(model: LoadedModel) -> History:
    return small_history(model)


@pytest.fixture
def question() -> Question:
    return fact_question()


@pytest.fixture
def store(model: LoadedModel, tmp_path: Path) -> Iterator[MemoryStore]:
    made = MemoryStore(tmp_path / "work", model, CONFIG)
    yield made
    made.close()


def make(name: str, store: MemoryStore, tmp_path: Path) -> Reader:
    weights = tmp_path / "lens.safetensors"
    LensNet.untrained(store.model.decoder).save(weights)
    return make_readers([name], store, weights)[0]


@pytest.mark.parametrize("name", READERS)
def test_budget_and_no_trace(
    name: str, store: MemoryStore, history: History, question: Question, tmp_path: Path
) -> None:
    """Asking again, and asking something else in between, changes nothing; nor does the order."""
    reader = make(name, store, tmp_path)
    other = replace(question, prompt="Which house has rain?", opening="It is", evidence=(Span(30, 50),))
    opened = reader.open(history)
    first, second = opened.ask(question), opened.ask(other)
    again = opened.ask(question)
    opened.close()
    if name in ("oracle", "full", "bm25", "evidence"):
        assert first.seen == 1.0
    elif name in ("retrieval", "blend"):
        assert first.seen > 0.5  # a passage is a few blocks of 8, and the fact lies across more
    elif name in ("none", "recency"):
        assert first.seen == 0.0
    assert again.logprobs == pytest.approx(first.logprobs, abs=1e-4)
    assert (again.text, again.seen, again.slots) == (first.text, first.seen, first.slots)
    for reply in (first, second):
        assert 0 < reply.slots <= (8192 if name == "full" else CONFIG.budget)
        assert len(reply.logprobs) == 3
        assert all(np.isfinite(reply.logprobs))
        assert "\n" not in reply.text
    with pytest.raises(InputError, match="tell"):
        opened.tell(history.ids)
    fresh = reader.open(history)
    assert fresh.ask(other).logprobs == pytest.approx(second.logprobs, abs=1e-4)
    fresh.close()


def test_a_memory_that_shows_all_is_the_full_context(
    model: LoadedModel, tmp_path: Path, history: History, question: Question
) -> None:
    store = MemoryStore(tmp_path / "work", model, replace(CONFIG, budget=1400, refresh="full"))
    ours = MemoryReader("all", store, lambda spans: EvidencePolicy([(0, 2000)])).open(history).ask(question)
    full = FullContext(model, system(model), 2000).open(history).ask(question)
    assert ours.seen == full.seen == 1.0
    assert ours.logprobs == pytest.approx(full.logprobs, rel=1e-3)
    assert ours.text == full.text
    store.close()


def test_logprobs_are_the_models(model: LoadedModel, history: History, question: Question) -> None:
    """Ranking a batch of candidates of unlike lengths gives what one forward over each gives."""
    reply = FullContext(model, system(model), 2000).open(history).ask(question)
    start = [*system(model), *history.ids.tolist(), *prompt_ids(model, question)]
    for candidate, logprob in zip(question.candidates, reply.logprobs, strict=True):
        ids = torch.tensor([[*start, *model.tokenizer.encode(candidate)]])
        positions = torch.arange(ids.shape[1])[None]
        with torch.inference_mode():
            hidden = model.decoder(model.decoder.embed(ids), positions).hidden
            logs = model.decoder.logits(hidden)[0].log_softmax(-1)
        expected = sum(float(logs[at - 1, ids[0, at]]) for at in range(len(start), ids.shape[1]))
        assert logprob == pytest.approx(expected, rel=1e-3)


def test_oracle_opens_the_evidence_and_nothing_else(store: MemoryStore, history: History, question: Question) -> None:
    opened = MemoryReader("oracle", store, EvidencePolicy).open(history)
    assert isinstance(opened, OpenedMemory)
    turn = opened.turn(question)
    turn.read(prompt_ids(store.model, question), question.prompt)
    (span,) = opened.spans(question)
    assert store.model.tokenizer.decode(opened.session.tree.tokens(*span).tolist()) == FACT
    entries, size = turn.context.entries, CONFIG.block_size
    far = (entries.levels == 0) & (entries.starts >= opened.session.focus.head + size)
    far &= entries.starts < len(history.ids) - CONFIG.recent_tokens - size
    blocks = set((entries.index[far] // size).tolist())
    assert blocks == set(range(span[0] // size, -(-span[1] // size)))


def test_questions_leave_the_memory_as_it_was(store: MemoryStore, history: History, question: Question) -> None:
    reader = MemoryReader("oracle", store, EvidencePolicy)
    opened = reader.open(history)
    session = store.shared(history)
    before = session.tree.length, session.tree.count_documents(), session.focus.state()
    layout = session.context.entries
    opened.ask(question)
    assert (session.tree.length, session.tree.count_documents(), session.focus.state()) == before
    assert session.context.entries is layout
    assert not session.context.pending


def test_memories_are_kept_by_content(
    store: MemoryStore, history: History, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.prepare(history)
    reply = MemoryReader("oracle", store, EvidencePolicy).open(history).ask(question)
    store.close()
    # read once: nothing may be ingested from here on
    monkeypatch.setattr(Session, "ingest", lambda *_, **__: pytest.fail("read again"))
    assert store.prepare(history) == path
    again = MemoryReader("oracle", store, EvidencePolicy).open(history).ask(question)
    assert again.logprobs == pytest.approx(reply.logprobs, rel=1e-4)
    changed = history.ids.copy()
    changed[7] += 1
    keys = {store.key(history), store.key(History(changed)), store.key(History(history.ids, ((0, 64),)))}
    longer = MemoryStore(store.folder, store.model, replace(CONFIG, ingest_window=64))
    assert len(keys | {longer.key(history)}) == 4
    wider = MemoryStore(store.folder, store.model, replace(CONFIG, budget=500, recent_tokens=8))
    assert wider.key(history) == store.key(history)


def test_an_interrupted_reading_is_not_kept(store: MemoryStore, history: History) -> None:
    def stop(done: int) -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.prepare(history, stop)
    assert list(store.folder.iterdir()) == []


def test_unread_text_has_its_own_tokens_and_copied_keys(model: LoadedModel, tmp_path: Path, history: History) -> None:
    """Blocks that are read are as in a history that is read in whole."""
    store = MemoryStore(tmp_path / "work", model, replace(CONFIG, ingest_window=1024))
    part = History(history.ids, ((400, 520),))
    with store.copy(part) as session, store.copy(history) as whole:
        head, size = session.focus.head, CONFIG.block_size
        assert np.array_equal(session.tree.tokens(), whole.tree.tokens())
        assert np.array_equal(session.tree.tokens(head, session.tree.length), history.ids)
        assert session.tree.count(1) == whole.tree.count(1)
        read = np.arange(-(-(head + 400) // size), (head + 520) // size)
        mine, true = session.tree.kv(1, read)[0], whole.tree.kv(1, read)[0]
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)
        unread = np.arange(70, 80)
        assert not torch.allclose(session.tree.kv(1, unread)[0], whole.tree.kv(1, unread)[0], atol=1e-2)
        torch.testing.assert_close(session.tree.summaries(1, 70, 80), whole.tree.summaries(1, 70, 80))
        session.tree.verify()
    with pytest.raises(InputError, match="disjoint"):
        store.prepare(History(history.ids, ((100, 200), (150, 300))))


def test_a_memorys_conversation_is_a_session(store: MemoryStore, history: History, question: Question) -> None:
    reader = MemoryReader("oracle", store, EvidencePolicy)
    opened = reader.open(history, remember=True)
    assert isinstance(opened, OpenedMemory)
    tree = opened.session.tree
    replies = [opened.ask(question)]
    number = opened.tell(np.asarray(store.model.tokenizer.encode(" Zorblat keeps 777 now. " + text(60)), np.int64))
    replies.append(opened.ask(replace(question, evidence=(Span(0, 20, number),))))
    kinds = [document.kind for document in tree.documents()]
    assert kinds == ["system", "document", "user", "assistant", "document", "user", "assistant"]
    assert [d.title for d in tree.documents() if d.kind == "user"] == ["user, turn 1", "user, turn 2"]
    said = store.model.tokenizer.decode(tree.tokens().tolist(), special=True)
    assert said.count(question.prompt) == 2
    assert replies[1].seen == 1.0
    assert all(reply.slots <= CONFIG.budget for reply in replies)
    tree.verify()
    opened.close()
    # the memory that it was copied from knows nothing of it
    assert store.shared(history).tree.length == store.shared(history).focus.head + len(history.ids)


def test_names(store: MemoryStore, history: History) -> None:
    with pytest.raises(InputError, match="expected some of"):
        make_readers(["bm52"], store)
    with pytest.raises(InputError, match="needs trained weights"):
        make_readers(["lensnet"], store)
    for name in ("infllm", "memorizing", "retro"):
        with pytest.raises(InputError, match="remember"):
            make_readers([name], store)[0].open(history, remember=True)


def test_share_covered() -> None:
    assert share_covered([(0, 10)], [(0, 5), (8, 20)]) == pytest.approx(0.7)
    assert share_covered([(0, 4), (10, 14)], [(2, 12)]) == pytest.approx(0.5)
    assert np.isnan(share_covered([], [(0, 3)]))


def test_token_spans_are_runs_of_level_0(store: MemoryStore, history: History) -> None:
    session = store.shared(history)
    with torch.inference_mode():
        session.focus.make_room(session.context, 0)
    entries = session.context.entries
    runs = entries.token_spans()
    assert sum(b - a for a, b in runs) == int((entries.levels == 0).sum())
    assert runs[0][0] == 0
    assert runs[-1][1] == session.tree.length
