"""Both ways into the tree: what the nodes hold, against one plain forward of the model and plain means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import check_session, counted_forwards, relative_error, words
from torch import Tensor

from mc_runtime import Session
from mc_runtime.model import Decoder, LoadedModel
from mc_runtime.model.stores import SelfStore
from mc_runtime.tree import NodeFlag, Tree

Memory = Callable[..., Session]
CONTEXTUAL = NodeFlag.KV | NodeFlag.CONTEXTUAL | NodeFlag.HIDDEN


class Recorder(SelfStore):
    """Keys and values of a plain forward."""

    def __init__(self) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []
        super().__init__()

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.kv.append((k[0], v[0]))
        return super().update(layer, k, v)


@torch.inference_mode()
def plain_blocks(model: LoadedModel, ids: list[int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means over blocks of one plain forward: k, v [N, L, Hkv, D] and the middle layer's stream [N, E]."""
    store, decoder = Recorder(), model.decoder
    output = decoder(
        decoder.embed(torch.tensor([ids])),
        torch.arange(len(ids))[None],
        store,
        hidden_layer=decoder.config.n_layers // 2,
    )
    blocks = len(ids) // size

    def mean(x: Tensor) -> Tensor:  # [..., T, D] -> [..., N, D]
        return x[..., : blocks * size, :].unflatten(-2, (blocks, size)).mean(-2)

    k, v = (mean(torch.stack([pair[i] for pair in store.kv])).permute(2, 0, 1, 3) for i in (0, 1))
    assert output.tapped is not None
    return k, v, mean(output.tapped[0])


def all_kv(tree: Tree, level: int = 1) -> tuple[Tensor, Tensor]:
    return tree.kv(level, np.arange(tree.count(level)))


@pytest.mark.parametrize("lengths", [[300], [3, 1, 2, 5, 1, 1, 1, 100, 7, 150]], ids=["one text", "many small texts"])
def test_pooled_nodes_are_means_of_a_plain_forward(memory: Memory, model: LoadedModel, lengths: list[int]) -> None:
    """Chunks, documents that begin inside a block, and texts shorter than one change nothing."""
    session = memory(ingest_window=512)
    for seed, length in enumerate(lengths):
        document = session.ingest(list(words(length + 1, seed).encode())[:length])
        assert document.stop - document.start == length
    tree = session.tree
    assert tree.count(1) == tree.length // 8
    k, v, hidden = plain_blocks(model, tree.tokens().tolist(), 8)
    for got, expected in zip((*all_kv(tree), tree.hidden(1)), (k, v, hidden), strict=True):
        assert relative_error(got, expected) < 1e-5
    assert (tree.flags(1) == CONTEXTUAL).all()
    ids = torch.from_numpy(tree.tokens()[: tree.count(1) * 8].astype(np.int64)).view(-1, 8)
    centred = model.decoder.embed(ids).mean(1) - model.decoder.embedding.mean(0)
    cosine = torch.cosine_similarity(tree.summaries(1), centred, dim=-1)
    assert cosine.min() > 0.9999


def test_a_text_after_a_turn_sees_the_turn(memory: Memory, model: LoadedModel) -> None:
    """The turn's own blocks are pooled from the context, which here holds every token."""
    session = memory(budget=512, ingest_window=512)
    session.pin(session.ingest(words(100)))
    session.generate("who?", max_new_tokens=29)
    before = session.tree.count(1)
    assert session.tree.length % 8
    session.ingest(words(90, seed=1))
    tree = session.tree
    k, v, _ = plain_blocks(model, tree.tokens().tolist(), 8)
    got_k, got_v = all_kv(tree)
    assert relative_error(got_k, k) < 1e-5
    assert relative_error(got_v, v) < 1e-5
    turn = tree.documents()[2].start // 8 + 1
    assert (tree.flags(1, turn, before) == NodeFlag.KV | NodeFlag.CONTEXTUAL).all()  # no hidden state
    tree.verify()


def test_the_window_bounds_what_a_text_sees(memory: Memory, model: LoadedModel) -> None:
    """Beyond sink and window, early text cannot matter; within, it must."""
    texts = [words(200, seed=1), words(200, seed=2)]
    rest = words(400, seed=3)
    nodes = []
    for name, text in zip("ab", texts, strict=True):
        session = memory(name, ingest_window=64, ingest_chunk=32)
        session.ingest(text + rest)
        nodes.append(all_kv(session.tree)[1])
    # Layers look back one after the other: three layers reach three windows (and a chunk) back.
    far = (18 + 200 + 3 * (64 + 32)) // 8 + 1
    assert torch.equal(nodes[0][far:], nodes[1][far:])
    near = (18 + 200) // 8 + 1
    assert not torch.equal(nodes[0][near], nodes[1][near])


def test_parents_pool_their_stored_children(memory: Memory) -> None:
    session = memory(ingest_chunk=512)  # several parents are completed at once
    session.ingest(words(300))
    session.generate("who?", max_new_tokens=33)
    session.ingest(words(900, seed=1))
    tree = session.tree
    assert tree.n_levels == 3
    for level in (2, 3):
        count = tree.count(level)
        assert count == tree.count(level - 1) // 8
        for got, children in zip(all_kv(tree, level), all_kv(tree, level - 1), strict=True):
            assert relative_error(got, children[: count * 8].unflatten(0, (count, 8)).mean(1)) < 1e-6
        summaries = tree.summaries(level - 1)[: count * 8].unflatten(0, (count, 8))
        expected = session.builder.net.encode(summaries, level=level)
        assert relative_error(tree.summaries(level), expected) < 1e-6
        # A parent has a hidden state where all its children have one, however they were pushed.
        has = (tree.flags(level) & NodeFlag.HIDDEN) != 0
        child_has = (tree.flags(level - 1)[: count * 8] & NodeFlag.HIDDEN) != 0
        assert (has == child_has.reshape(count, 8).all(1)).all()
        assert has.any()
        for index in has.nonzero()[0]:
            hidden = tree.hidden(level - 1, index * 8, index * 8 + 8).mean(0)
            assert relative_error(tree.hidden(level, index, index + 1)[0], hidden) < 1e-6
    assert not (tree.flags(2) & NodeFlag.HIDDEN).all()  # of the turn's blocks


def test_levels_grow_the_same_in_one_piece_and_in_many(memory: Memory) -> None:
    ids = list(words(700).encode())
    one, many = memory("one"), memory("many")
    one.ingest(ids, mode="fast")
    rng = np.random.default_rng(0)
    for part in np.split(np.array(ids), np.sort(rng.choice(700, 12, replace=False))):
        if len(part):
            many.ingest(part, mode="fast")
    for level in (1, 2, 3):
        assert one.tree.count(level) == many.tree.count(level) > 0
        assert relative_error(one.tree.summaries(level), many.tree.summaries(level)) < 1e-6


def test_fast_ingest_never_runs_the_model(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory(ingest="fast")

    def forward(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model ran")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", forward)
        document = session.ingest(words(700))
        with pytest.raises(AssertionError, match="the model ran"):
            session.ingest(words(50), mode="contextual")
    assert document.ingest == "fast"
    head = session.tree.documents()[0].stop // 8
    assert (session.tree.flags(1)[head:] == 0).all()
    session.generate("who?", max_new_tokens=4)
    check_session(session)


def test_what_completes_no_block_costs_no_forward(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before it is read for the blocks' sake alone."""
    session = memory()
    session.ingest([65] * (8 - session.tree.length % 8 + 400))
    with counted_forwards(monkeypatch) as runs:
        session.ingest([66] * 3)
        session.ingest([66] * 4)
    assert runs == []
    assert session.tree.length % 8 == 7
    with counted_forwards(monkeypatch) as runs:
        session.ingest([66])
    assert runs
    check_session(session)


def test_passages_are_read_in_one_go(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on its own would read the window before it once more."""
    session = memory()
    session.ingest(words(400))
    passages = [words(20, seed=i) for i in range(10)]
    with counted_forwards(monkeypatch) as runs:
        session.ingest_evidence([{"text": text, "score": i} for i, text in enumerate(passages)])
    assert sum(runs) <= session.config.ingest_window + 8 + 10 * 24 + 8
    assert [d.score for d in session.tree.documents()[-10:]] == list(range(10))
    check_session(session)


def test_a_mixed_tree_says_which_is_which(memory: Memory) -> None:
    session = memory()
    spans = [(mode, session.ingest(words(n, seed=n), mode=mode)) for mode, n in
             (("fast", 203), ("contextual", 190), ("fast", 130), ("contextual", 300))]  # fmt: skip
    tree = session.tree
    flags = tree.flags(1)
    for mode, document in spans:
        assert document.ingest == mode
        inside = flags[-(-document.start // 8) : document.stop // 8]
        assert (inside == (0 if mode == "fast" else CONTEXTUAL)).all()
    # A parent has keys and values only if all its children have.
    has = (flags[: tree.count(2) * 8] & NodeFlag.KV) != 0
    assert (((tree.flags(2) & NodeFlag.KV) != 0) == has.reshape(-1, 8).all(1)).all()
    assert 0 < np.count_nonzero(tree.flags(2)) < tree.count(2)
    tree.verify()
    session.close()
    again = memory()  # open groups are read back
    again.ingest(words(300, seed=9))
    assert again.tree.count(2) == again.tree.count(1) // 8
    again.generate("who?", max_new_tokens=4)
