"""Gists of all kinds in training: what they start as, where gradients go, and that they learn."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import GistEncodeWeights, GistPoolWeights
from mc_runtime.errors import InputError, ModelError
from mc_runtime.gistnet import GistNet, Projector
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_kinds import GistMaker
from mc_runtime.train.gist_options import GistTaskOptions
from mc_runtime.train.gist_task import GistTask
from mc_runtime.train.layouts import Entry, LayoutOptions, draw_layout, gather_layouts
from mc_runtime.train.pooled_maker import OUTSIDE, PooledMaker, pool_levels, split_blocks
from mc_runtime.train.trainer import Trainer, TrainOptions
from mc_runtime.train.vector_makers import EmbeddingMaker, ProjectedMaker

K = 8
SMALL: dict[str, Any] = {"lengths": (32,), "length_weights": (1,), "cuts": (2,), "near": 8, "tokens": 160}
MAKERS = ["pooled", "four", "projected", "embedding"]


def maker_of(name: str, model: LoadedModel, levels: int = 1, noise: float = 0.0) -> GistMaker:
    """An untrained maker; with noise, one whose every trained parameter is moved."""
    c = model.config
    made: GistMaker
    if name in ("pooled", "four"):
        weights, children = [], K
        for _ in range(levels):
            w = GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, children, c.head_dim)
            weights.append(split_blocks(w, 4, OUTSIDE) if name == "four" else w)
            children = K * weights[-1].n_gists
        made = PooledMaker(weights)
    else:
        untrained = GistNet.untrained(model.decoder, K).encode_weights
        encode = GistEncodeWeights.init(
            c.embed_dim, 16, layers=1, n_heads=2, ffn_dim=16, max_block_size=K, mu=untrained.mu,
            target_rms=untrained.target_rms, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        heads = (c.n_layers, 2, c.n_kv_heads, c.head_dim)
        draw = torch.Generator().manual_seed(1)
        projector = Projector(
            torch.randn(6, c.embed_dim, generator=draw) * 0.3,
            torch.randn(*heads, 6, generator=draw) * 0.1,
            torch.zeros(heads),
        )
        made = (
            EmbeddingMaker(encode, K, levels) if name == "embedding" else ProjectedMaker(encode, projector, K, levels)
        )
    generator = torch.Generator().manual_seed(2)
    for p in made.parameters.values():
        if p.requires_grad:
            p.data += noise * torch.randn(p.shape, generator=generator)
    return made


def text(corpus: Callable[..., Corpus], length: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(corpus().sample(random.Random(seed), length))[None]


def test_four_gists_stand_in_order() -> None:
    options = LayoutOptions(whole=1.0, sink_block=0.0)
    layout = draw_layout(random.Random(0), 2, K, options, (4,))
    assert layout == [Entry(0, 0)] + [Entry(1, i) for i in range(8)]
    two = draw_layout(random.Random(0), 9, K, replace(options, level2=1.0), (4, 2))
    assert two == [Entry(0, 0), Entry(2, 0), Entry(2, 1)] + [Entry(1, 32 + g) for g in range(4)]
    where = gather_layouts([two, two], [72, 72], 80, K, [True, False], (4, 2))
    first, second = 80, 80 + 10 * 4
    assert where.index[0].tolist() == [0, second, second + 1, *range(first + 32, first + 36)]
    assert where.position[0].tolist() == list(range(7))
    # Spans: half of 64 tokens, a quarter of 8.
    assert where.position[1].tolist() == [0, 15, 47, 64, 66, 68, 70]
    assert where.start.tolist() == [7, 72]


def test_four_gists_start_as_means_of_quarters(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    t = GistTask(model.decoder, [corpus()], maker_of("four", model, levels=2), GistTaskOptions(**SMALL))
    ids = text(corpus, 3 * K + 3)
    k, v, _ = t.read(ids)
    (one, two) = t.maker.make(model.decoder, ids, k, v, 1)
    assert (one.span, two.span) == (K // 4, K * K // 4)
    assert one.kv is not None
    for x, source in zip(one.kv, (k, v), strict=True):
        assert source is not None
        want = source[:, :, :, : 3 * K].unflatten(3, (-1, K // 4)).mean(4)
        assert x.shape == want.shape
        assert (x - want).abs().max() < 5e-3 * source.abs().max()


def test_levels_above_several_gists(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    """A level pools all gists of K blocks below: the mean of all gives the mean of all tokens."""
    t = GistTask(model.decoder, [corpus()], maker_of("four", model), GistTaskOptions(**SMALL))
    k, v, _ = t.read(text(corpus, K * K))
    assert k is not None
    assert v is not None
    c = model.config
    first = split_blocks(GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim), 4)
    second = GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 2, 4 * K, c.head_dim)
    (one, _), (two, _) = pool_levels(k, v, [first, second], K)
    assert one.shape[3] == 4 * K
    torch.testing.assert_close(one[:, :, :, 5], k[:, :, :, 10:12].mean(3))
    torch.testing.assert_close(two, k.mean(3, keepdim=True).expand(-1, -1, -1, 2, -1))
    with pytest.raises(InputError, match="level 2"):
        PooledMaker([first, GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim)])


def test_vectors_start_as_centred_means(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    maker = maker_of("embedding", model, levels=2)
    ids = text(corpus, K * K)
    one, two = maker.make(model.decoder, ids, None, None, 1)
    net = GistNet.untrained(model.decoder, K)
    rows = model.decoder.embed(ids)
    want = net.encode(rows.unflatten(1, (-1, K)).flatten(0, 1))
    assert one.vectors is not None
    assert two.vectors is not None
    torch.testing.assert_close(one.vectors[0], want)
    torch.testing.assert_close(two.vectors[0], net.encode(want[None], level=2))


def test_embedding_gists_run_where_they_stand(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    """One plain forward over the rows of the layout and the piece, whatever shares the batch."""
    t = GistTask(model.decoder, [corpus()], maker_of("embedding", model), GistTaskOptions(**SMALL))
    ids = text(corpus, 40)
    k, v, _ = t.read(ids)
    levels = t.maker.make(model.decoder, ids, k, v, 1)
    layouts = [[Entry(0, 0), Entry(1, 0), Entry(1, 1)], [Entry(0, i) for i in range(24)]]
    hidden = t.run(ids, k, v, levels, [(0, 16), (0, 24)], layouts, [True, True], 8)
    vectors = levels[0].vectors
    assert vectors is not None
    rows = model.decoder.embed(ids)
    x = torch.cat((rows[:, :1], vectors[:, :2], rows[:, 16:24]), dim=1)
    want = model.decoder(x, torch.arange(11)[None]).hidden[:, -8:]
    torch.testing.assert_close(hidden[:1], want, rtol=1e-4, atol=1e-4)
    full = model.decoder(rows, torch.arange(40)[None]).hidden[:, 24:32]
    torch.testing.assert_close(hidden[1:], full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_reach_every_trained_parameter(
    model: LoadedModel, corpus: Callable[..., Corpus], name: str, levels: int
) -> None:
    layout = LayoutOptions(whole=1.0, level2=0.5 if levels == 2 else 0.0)
    options = GistTaskOptions(**SMALL | {"lengths": (K * K * 2,), "tokens": 300, "layout": layout})
    t = GistTask(model.decoder, [corpus()], maker_of(name, model, levels, noise=0.1), options)
    loss, _ = t.loss(random.Random(5))
    loss.backward()
    generator = torch.Generator().manual_seed(3)
    for parameter, p in t.parameters.items():
        if not p.requires_grad:
            assert parameter == "encode/mu"
            continue
        assert p.grad is not None, parameter
        assert p.grad.abs().max() > 0, parameter
    trained = {n: p for n, p in t.parameters.items() if p.requires_grad}
    direction = {n: torch.randn(p.shape, generator=generator) * p.abs().mean() for n, p in trained.items()}
    slope = sum(float((p.grad * direction[n]).sum().detach()) for n, p in trained.items() if p.grad is not None)
    ends = []
    for step in (1e-3, -1e-3):
        for n, p in trained.items():
            p.data += step * direction[n]
        ends.append(float(t.loss(random.Random(5))[0].detach()))
        for n, p in trained.items():
            p.data -= step * direction[n]
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.05, abs=2e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_learns(name: str, tmp_path: Path, model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    options = GistTaskOptions(**SMALL | {"teacher": 1.0})
    task = GistTask(model.decoder, [corpus()], maker_of(name, model), options)

    def fixed() -> float:
        with torch.no_grad():
            return sum(float(task.loss(random.Random(i))[0]) for i in range(5))

    before = fixed()
    Trainer(task, tmp_path, TrainOptions(steps=12, lr=2e-2, accumulate=1)).run()
    assert fixed() < 0.97 * before


def test_frozen_levels_stay(tmp_path: Path, model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    options = GistTaskOptions(**SMALL | {"lengths": (K * K * 2,), "tokens": 300, "layout": LayoutOptions(level2=1.0)})
    maker = maker_of("pooled", model, 2)
    assert isinstance(maker, PooledMaker)
    weights = maker.weights()
    task = GistTask(model.decoder, [corpus()], weights, options, frozen_levels=(1,))
    Trainer(task, tmp_path, TrainOptions(steps=2, accumulate=1)).run()
    for name, p in task.parameters.items():
        moved = float(p.detach().abs().max()) > 0
        assert moved == name.startswith("pool2/"), name


@pytest.mark.parametrize("name", ["pooled", "projected", "embedding"])
def test_curriculum(name: str, model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    """Quarters, halves, whole blocks by the shares of the steps; gists of a part see that part alone."""
    options = GistTaskOptions(**SMALL | {"curriculum": (0.25, 0.25)})
    t = GistTask(model.decoder, [corpus()], maker_of(name, model, noise=0.1), options)
    parts = []
    for step in range(8):
        t.begin_step(step / 8)
        parts.append(t.parts)
    assert parts == [4, 4, 2, 2, 1, 1, 1, 1]
    ids = text(corpus, 2 * K)
    for count in (4, 2):
        k, v, _ = t.read(ids)
        (made,) = t.maker.make(model.decoder, ids, k, v, count)
        assert made.span == K // count
        assert made.features().shape[:2] == (1, 2 * count)
        other = ids.clone()
        other[0, made.span : 2 * made.span] = (other[0, made.span : 2 * made.span] + 1) % 200
        k2, v2 = (None, None) if k is None or v is None else (k.clone(), v.clone())
        if k2 is not None and v2 is not None:
            k2[:, :, :, made.span : 2 * made.span] += 1.0
        (moved,) = t.maker.make(model.decoder, other, k2, v2, count)
        same = [torch.equal(a, b) for a, b in zip(made.features()[0], moved.features()[0], strict=True)]
        assert same == [i != 1 for i in range(2 * count)]
        t.parts = count
        loss, _ = t.loss(random.Random(0))
        assert loss.isfinite()


def test_makers_fill_a_net(tmp_path: Path, model: LoadedModel) -> None:
    """What a run does not train stays; training heads are in no file; fp32 and bf16 files are both read."""
    net = GistNet.untrained(model.decoder, K)
    for name in ("pooled", "projected"):
        maker = maker_of(name, model, noise=0.1)
        net = maker.install(net, maker.parameters | {"aux/down": torch.zeros(2, 2)})
    pooled, projected = maker_of("pooled", model, noise=0.1), maker_of("projected", model, noise=0.1)
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        net.save(path, dtype=dtype)
        sizes[dtype] = path.stat().st_size
        loaded = GistNet.load(path, model.decoder, K)
        assert loaded.pool_weights[0].w.dtype == dtype
        assert isinstance(loaded.projector, Projector)
        tight = {"rtol": 0.0, "atol": 0.0} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 0.0}
        got = (loaded.pool_weights[0].m, loaded.projector.up, loaded.encode_weights.w_in)
        want = (pooled.parameters["pool1/m"], projected.parameters["project/up"], projected.parameters["encode/w_in"])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.float(), b.detach(), **tight)
    assert sizes[torch.bfloat16] < 0.6 * sizes[torch.float32]


def test_a_memory_takes_one_gist_per_block(tmp_path: Path, model: LoadedModel) -> None:
    """Files of several are read, for training and evaluation; pooling a node with them is refused."""
    maker = maker_of("four", model)
    maker.install(GistNet.untrained(model.decoder, K), maker.parameters).save(tmp_path / "four.safetensors")
    net = GistNet.load(tmp_path / "four.safetensors", model.decoder, K)
    assert net.pool_weights[0].n_gists == 4
    c = model.config
    x = torch.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim)
    with pytest.raises(ModelError, match="one gist per block"):
        net.pool(x, x)
