"""What each kind of gist brings into the cache, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import SMALL, bring_in, counted_forwards, kv_by_rank, relative_error, words

from mc_runtime import Session
from mc_runtime.gistnet import GistNet, Projector
from mc_runtime.gists import gist_reader
from mc_runtime.model import LoadedModel
from mc_runtime.model.stores import SelfStore
from mc_runtime.tree import NodeFlag

Memory = Callable[..., Session]


def mixed(memory: Memory, **settings: object) -> Session:
    session = memory(**settings)
    session.ingest(words(300, seed=1))
    session.ingest(words(300, seed=2), mode="fast")
    return session


def nodes_of(session: Session) -> tuple[np.ndarray, np.ndarray]:
    counts = session.context.counts
    levels = np.concatenate([np.full(count, level, np.int8) for level, count in enumerate(counts) if level])
    return levels, np.concatenate([np.arange(count) for count in counts[1:]])


def test_pooled_runs_what_an_untrained_projector_cannot_serve(memory: Memory) -> None:
    session = mixed(memory)
    tree, reader = session.tree, session.context.reader
    levels, index = nodes_of(session)
    read = reader.read(tree, levels, index)
    fast = np.array([not tree.flags(int(a))[b] & NodeFlag.KV for a, b in zip(levels, index, strict=True)])
    assert fast.any()
    assert not fast.all()
    assert np.array_equal(read.needs_forward, fast)
    assert np.array_equal(reader.runs(tree, levels, index), fast)
    for i in fast.nonzero()[0]:
        assert torch.equal(read.embeddings[i], tree.summaries(int(levels[i]))[int(index[i])])


def test_pooled_reads_what_is_stored_and_projects_the_rest(memory: Memory) -> None:
    session = mixed(memory)
    tree, decoder = session.tree, session.model.decoder
    c = decoder.config
    kv = (c.n_layers, 2, c.n_kv_heads, c.head_dim)
    trained = Projector(torch.randn(4, c.embed_dim), torch.randn(*kv, 4), torch.randn(kv))
    net = replace(session.builder.net, projector=trained)
    levels, index = nodes_of(session)
    order = np.random.default_rng(0).permutation(len(levels))
    levels, index = levels[order], index[order]
    read = gist_reader("pooled", decoder, net).read(tree, levels, index)
    projected = gist_reader("projected", decoder, net).read(tree, levels, index)
    seen = set()
    for i, (level, node) in enumerate(zip(levels.tolist(), index.tolist(), strict=True)):
        stored = bool(tree.flags(level)[node] & NodeFlag.KV)
        seen.add((level, stored))
        if stored:
            k, v = (x[0] for x in tree.kv(level, [node]))
            assert torch.equal(read.k[:, :, i], k)
            assert torch.equal(read.v[:, :, i], v)
            assert not torch.equal(read.k[:, :, i], projected.k[:, :, i])
        else:
            assert relative_error(read.k[:, :, i], projected.k[:, :, i]) < 1e-6
            assert relative_error(read.v[:, :, i], projected.v[:, :, i]) < 1e-6
    assert {(1, True), (1, False), (2, True), (2, False)} <= seen
    assert not read.needs_forward.any()
    assert not projected.needs_forward.any()


def test_untrained_projection_is_exact_for_the_first_layer(memory: Memory, model: LoadedModel) -> None:
    """The first layer's keys and values of a vector are what the model makes of it as an input."""
    session = mixed(memory, gist_kind="projected")
    rows = session.tree.summaries(1)[:5].clone()
    k, v = session.builder.net.project(rows)

    class First(SelfStore):
        def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor):
            if layer == 0:
                self.first = keys, values
            return super().update(layer, keys, values)

    store = First()
    model.decoder(rows[None], torch.arange(5)[None], store)
    assert relative_error(k[0], store.first[0][0]) < 1e-6
    assert relative_error(v[0], store.first[1][0]) < 1e-6


@pytest.mark.parametrize("kind", ["pooled", "projected", "embedding"])
def test_what_a_kind_costs(memory: Memory, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Only gists of kind `embedding` go through the model, one entry each."""
    session = mixed(memory, gist_kind=kind)
    context = bring_in(session)
    opened = context.expanded
    node = int(context.entries.index[context.entries.levels == 2][1])
    more = {**opened, 2: np.union1d(opened[2], [node])}
    with counted_forwards(monkeypatch) as forwards, torch.inference_mode():
        context.relayout(more, mode="none")
        context.relayout(opened, mode="none")
    assert forwards == ([8, 1] if kind == "embedding" else [])


def test_an_embedding_gist_is_the_vector_read_in_place(memory: Memory, model: LoadedModel) -> None:
    """The whole context is one plain forward over rows of tokens and vectors."""
    session = mixed(memory, gist_kind="embedding")
    context = bring_in(session)
    with torch.inference_mode():
        context.assemble(context.expanded)
        rows = []
        for level, index in zip(context.entries.levels.tolist(), context.entries.index.tolist(), strict=True):
            if level:
                rows.append(session.tree.summaries(level)[index])
            else:
                rows.append(model.decoder.embedding[int(session.tree.tokens()[index])])

        class Keep(SelfStore):
            def update(self, layer: int, k: torch.Tensor, v: torch.Tensor):
                keys.append(k[0])
                return super().update(layer, k, v)

        keys: list[torch.Tensor] = []
        model.decoder(torch.stack(rows)[None], torch.arange(len(rows))[None], Keep())
    assert (context.entries.levels > 0).sum() > 10
    assert relative_error(kv_by_rank(context)[0], torch.stack(keys)) < 1e-5


def trained(model: LoadedModel) -> GistNet:
    """A net whose every part differs from the untrained one."""
    base = GistNet.untrained(model.decoder, SMALL["block_size"])
    generator = torch.Generator().manual_seed(0)
    c = model.config

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    first = base.pool_weights[0]
    parts = ("w", "b", "m", "c")
    pool = tuple(replace(first, **{p: noise(*getattr(first, p).shape) for p in parts}) for _ in range(2))
    heads = (c.n_layers, 2, c.n_kv_heads, c.head_dim)
    projector = Projector(noise(4, c.embed_dim), noise(*heads, 4), noise(*heads))
    encode = replace(base.encode_weights, w_out=noise(*base.encode_weights.w_out.shape))
    return GistNet(encode, pool, projector, "")


def test_trained_weights_are_read_back_and_used(memory: Memory, model: LoadedModel, tmp_path: Path) -> None:
    net, path = trained(model), tmp_path / "net.safetensors"
    net.save(path)
    loaded = GistNet.load(path, model.decoder, SMALL["block_size"])
    assert loaded.fingerprint == GistNet.load(path, model.decoder, SMALL["block_size"]).fingerprint
    assert loaded.fingerprint != GistNet.untrained(model.decoder, SMALL["block_size"]).fingerprint
    assert torch.equal(loaded.projector.up, net.projector.up)

    plain = memory("plain")
    session = memory("trained", gistnet=path)
    for s in (plain, session):
        s.ingest(words(600))
        s.generate("who?", max_new_tokens=20)
    one, two = plain.tree, session.tree
    assert not torch.allclose(one.summaries(1)[:9], two.summaries(1)[:9])
    assert not torch.allclose(one.kv(1, [5])[0], two.kv(1, [5])[0])
    # Each level pools with its own weights; above the trained ones (two here) is the mean.
    assert len(net.pool_weights) == 2
    for level in (2, 3):
        k, v = two.kv(level - 1, np.arange(8))
        got = net.pool(*(x.permute(1, 2, 0, 3).unsqueeze(2) for x in (k, v)), level=level)
        assert relative_error(two.kv(level, [0])[0][0], got[0][:, :, 0]) < 1e-5
    session.close()
    again = memory("trained", gistnet=path)
    again.generate("who?", max_new_tokens=3)


def test_a_file_with_one_part_leaves_the_others_untrained(model: LoadedModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "net.safetensors"
    trained(model).save(path)
    save_file({k: v for k, v in load_file(path).items() if k.startswith("project/")}, path)
    net, base = GistNet.load(path, model.decoder, 8), GistNet.untrained(model.decoder, 8)
    assert isinstance(net.projector, Projector)
    blocks = torch.randn(3, 8, model.config.embed_dim)
    assert torch.equal(net.encode(blocks), base.encode(blocks))
