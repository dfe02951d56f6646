"""Extra losses of gists, the cheap objective, and the precision that each part runs in."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_gist_makers import MAKERS, SMALL, K, maker_of, text
from tiny import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_kinds import LevelGists
from mc_runtime.train.gist_options import GistTaskOptions
from mc_runtime.train.gist_task import GistTask
from mc_runtime.train.losses import hidden_loss
from mc_runtime.train.reconstruction import BagReader
from mc_runtime.train.trainer import BETAS, Trainer, TrainOptions

Corpora = Callable[..., Corpus]


def task_of(model: LoadedModel, corpus: Corpus, name: str = "pooled", **options: object) -> GistTask:
    return GistTask(model.decoder, [corpus], maker_of(name, model), GistTaskOptions(**SMALL | options))


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_can_be_read_back(name: str, tmp_path: Path, model: LoadedModel, corpus: Corpora) -> None:
    """The reader starts at the uniform guess and learns; the gists get a gradient from it once it has."""
    task = task_of(model, corpus(), name, reconstruct=1.0)
    assert task.reader is not None
    aux = [n for n in task.parameters if n.startswith("aux/")]
    assert len(aux) == 3

    def read() -> float:
        with torch.no_grad():
            return sum(task.loss(random.Random(i))[1]["reconstruction"] for i in range(5)) / 5

    before = read()
    assert before == pytest.approx(torch.tensor(float(model.config.vocab_size)).log().item(), rel=1e-3)
    Trainer(task, tmp_path, TrainOptions(steps=12, lr=3e-2, accumulate=1)).run()
    assert read() < 0.9 * before
    ids = text(corpus, 5 * K)
    k, v, _ = task.read(ids)
    for p in task.parameters.values():
        p.grad = None
    task.reader.loss(task.maker.make(model.decoder, ids, k, v, 1), ids, random.Random(0)).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in task.maker.parameters.values())
    net = task.maker.install(GistNet.untrained(model.decoder, K), task.parameters)
    net.save(tmp_path / "net.safetensors")
    assert b"aux/" not in (tmp_path / "net.safetensors").read_bytes()


def test_the_reader_learns_of_many_features(model: LoadedModel) -> None:
    """At the learning rate of pooled gists it never falls behind the uniform guess, also of as many features as a gist
    of 30 layers has: there each step of Adam once moved the code by more than its own size."""
    draw = torch.Generator().manual_seed(0)
    n, heads, dim = 64, 90, 64
    common = torch.randn(2, 1, 1, heads, 1, dim, generator=draw)  # what all gists share, as they do
    reader = BagReader(model.decoder, 2 * heads * dim, 64, n)
    uniform = torch.tensor(float(model.config.vocab_size)).log().item()
    optimizer = torch.optim.AdamW(reader.parameters.values(), lr=3e-3, betas=BETAS)
    losses = []
    for _ in range(30):
        # Each text has a few words of its own, which its gists know nothing of.
        kv = common + 0.5 * torch.randn(2, 1, 1, heads, n, dim, generator=draw)
        words = torch.randint(model.config.vocab_size, (10,), generator=draw)
        ids = words[torch.randint(10, (1, n * K), generator=draw)]
        optimizer.zero_grad()
        loss = reader.loss([LevelGists(K, kv=(kv[0], kv[1]))], ids, random.Random(0))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses) < 1.1 * uniform, losses


def test_a_gist_is_read_as_its_own_tokens(model: LoadedModel, corpus: Corpora) -> None:
    """A reader that is right about each gist's tokens loses only their entropy; the next block's cost more."""
    task = task_of(model, corpus(), "four", reconstruct=1.0)
    reader = task.reader
    assert reader is not None
    ids = torch.arange(2 * K)[None] // 2  # a quarter of a block holds one token, twice
    k, v, _ = task.read(ids)
    levels = task.maker.make(model.decoder, ids, k, v, 1)
    seen: list[Tensor] = []
    features = levels[0].features()
    p = reader.parameters
    p["aux/down"].data, p["aux/up"].data = torch.zeros_like(p["aux/down"]), torch.zeros_like(p["aux/up"])
    for g in range(8):
        # Aim every gist at token g: only gist g gains by it.
        p["aux/bias"].data = 50.0 * model.decoder.head[g].float()
        logits = torch.log_softmax(p["aux/bias"].data @ model.decoder.head.T, -1)
        want = -logits[:8].mean()
        seen.append(reader.loss(levels, ids, random.Random(0)).detach() - want)
    assert features.shape[1] == 8
    assert torch.stack(seen).abs().max() < 1e-3


def test_contrast_moves_neighbours_apart(tmp_path: Path, model: LoadedModel, corpus: Corpora) -> None:
    task = task_of(model, corpus(), "embedding", contrast=3.0, margin=1.0)

    def contrast() -> float:
        with torch.no_grad():
            return sum(task.loss(random.Random(i))[1]["contrast"] for i in range(5))

    before = contrast()
    assert before > 0
    Trainer(task, tmp_path, TrainOptions(steps=12, lr=2e-2, accumulate=1)).run()
    assert contrast() < 0.9 * before


@pytest.mark.parametrize("name", MAKERS)
def test_hidden_objective(name: str, tmp_path: Path, model: LoadedModel, corpus: Corpora) -> None:
    """It is the distance of the stream after N layers, and trains the layers before N alone."""
    task = task_of(model, corpus(), name, objective="hidden:2")
    whole = task_of(model, corpus(), name)
    ids = text(corpus, 40)
    k, v, teacher = task.read(ids)
    if k is not None:
        assert len(k) == 2
    samples, layout = [(0, 4 * K)], [[]]
    layout = [[*task_layout(task)]]
    levels = task.maker.make(model.decoder, ids, k, v, 1)
    hidden = task.run(ids, k, v, levels, samples, layout, [True], 8)
    k3, v3, _ = whole.read(ids)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            hidden, whole.run(ids, k3, v3, whole.maker.make(model.decoder, ids, k3, v3, 1), samples, layout, [True], 8)
        )
    assert float(hidden_loss(hidden[0], teacher[0, 32:]).detach()) > 0

    def fixed() -> float:
        with torch.no_grad():
            return sum(float(task.loss(random.Random(i))[0]) for i in range(5))

    before = fixed()
    Trainer(task, tmp_path, TrainOptions(steps=12, lr=2e-2, accumulate=1)).run()
    assert fixed() < 0.97 * before
    if name == "pooled":
        moved = task.parameters["pool1/m"].detach().flatten(1).abs().amax(1) > 0
        # The second layer's gists are read by the stream after two layers, the third's are not.
        assert moved.tolist() == [True, True, False]


def task_layout(task: GistTask) -> list:
    from mc_runtime.train.layouts import Entry

    return [Entry(0, 0)] + [Entry(1, i) for i in range(4 * task.maker.gists[0])]


def test_bad_options(model: LoadedModel, corpus: Corpora) -> None:
    for options in (
        {"objective": "hidden"}, {"objective": "hidden:0"}, {"objective": "hidden:4"}, {"objective": "nll"},
        {"curriculum": (0.6, 0.6)}, {"curriculum": (-0.1, 0.0)}, {"contrast": -1.0}, {"reconstruct": -1.0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            task_of(model, corpus(), **options)
    with pytest.raises(InputError, match="one gist per block"):
        task_of(model, corpus(), "four", curriculum=(0.1, 0.1))


class Precisions(TorchDispatchMode):
    """Notes the dtypes of matmuls that read a model's weights, and copies of these in another dtype."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.decoder.parameters() if p.numel() > 1000}
        self.matmuls: set[torch.dtype] = set()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, Tensor)]
        if any(x.untyped_storage().data_ptr() in self.weights for x in tensors):
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "bmm", "linear", "matmul"):
                self.matmuls |= {x.dtype for x in tensors}
            elif name == "_to_copy":
                self.copies.append(str(func))
        return out


@pytest.mark.parametrize("name", MAKERS)
def test_the_model_runs_in_its_own_precision(name: str, tmp_path: Path, corpus: Corpora) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    task = task_of(model, corpus(), name, reconstruct=0.1, contrast=0.1)
    trainer = Trainer(task, tmp_path, TrainOptions(steps=1, accumulate=1))
    with Precisions(model) as seen:
        trainer.run()
    assert seen.matmuls == {torch.bfloat16}
    assert seen.copies == []
    assert {p.dtype for p in task.parameters.values()} == {torch.float32}
