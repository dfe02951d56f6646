"""Training on a GPU gives what the CPU gives: steps of gists, resumed, and labelled scenes that a net learns."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from mc_kernels import GistPoolWeights
from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_options import GistTaskOptions
from mc_runtime.train.gist_questions import QuestionSource
from mc_runtime.train.gist_task import GistTask
from mc_runtime.train.lens_fit import fit_lens, label_scenes
from mc_runtime.train.lens_questions import Article
from mc_runtime.train.lens_samples import LensSample, SampleOptions, load_samples
from mc_runtime.train.lens_task import LensTaskOptions
from mc_runtime.train.trainer import Trainer, TrainOptions

K = 8
Corpora = Callable[..., Corpus]


@pytest.fixture
def on_gpu() -> LoadedModel:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return tiny_model(device="cuda")


def gist_task(model: LoadedModel, corpus: Corpus, articles: list[Article], questions: float) -> GistTask:
    c = model.config
    weights = [
        GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim).to(model.decoder.device) for _ in range(2)
    ]
    options = GistTaskOptions(
        lengths=(128,), length_weights=(1.0,), cuts=(2,), near=16, tokens=512, questions=questions,
        question_lengths=(320,), question_near=64, asked=2, crowd=3, crowded=1.0, reconstruct=0.1,
    )  # fmt: skip
    source = QuestionSource(model, articles, K)
    return GistTask(model.decoder, [corpus], weights, options, questions=source)


@pytest.mark.gpu
@pytest.mark.parametrize("questions", [0.0, 1.0])
def test_a_step_of_gists(
    on_gpu: LoadedModel, model: LoadedModel, corpus: Corpora, articles: list[Article], questions: float
) -> None:
    gradients = []
    for one in (on_gpu, model):
        task = gist_task(one, corpus(), articles, questions)
        loss, figures = task.loss(random.Random(3))
        loss.backward()
        named = {name: p.grad.cpu() for name, p in task.parameters.items() if p.grad is not None}
        gradients.append((figures, named))
    (figures, found), (expected_figures, expected) = gradients
    assert figures == pytest.approx(expected_figures, rel=1e-3)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 0.01 * x.norm() + 1e-7, name


@pytest.mark.gpu
def test_a_run_of_gists_is_resumed_and_saved(
    on_gpu: LoadedModel, model: LoadedModel, corpus: Corpora, articles: list[Article], tmp_path: Path
) -> None:
    for steps in (2, 3):
        task = gist_task(on_gpu, corpus(), articles, 0.5)
        trainer = Trainer(task, tmp_path / "run", TrainOptions(steps=steps, lr=0.01, warmup=1, save_every=1))
        assert trainer.step == (0 if steps == 2 else 2)
        assert np.isfinite(trainer.run()["loss"])
    path = tmp_path / "gists.safetensors"
    task.maker.install(GistNet.untrained(on_gpu.decoder, K), trainer.averaged()).save(path, dtype=torch.bfloat16)
    there, here = (GistNet.load(path, one.decoder, K) for one in (on_gpu, model))
    assert there.fingerprint == here.fingerprint
    for a, b in zip(there.pool_weights, here.pool_weights, strict=True):
        assert all(torch.equal(x.cpu(), y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.gpu
def test_scenes_are_labelled_alike_and_learned(
    on_gpu: LoadedModel, model: LoadedModel, corpus: Corpora, articles: list[Article], tmp_path: Path
) -> None:
    options = SampleOptions(lengths=(192,), recent=64, targets=16, tokens=512, questions=0.5)
    folders = []
    for name, one in (("gpu", on_gpu), ("cpu", model)):
        net = GistNet.untrained(one.decoder, K)
        folders.append(tmp_path / name / "labels")
        label_scenes(folders[-1], one, net, [corpus()], articles, 4, 3, options=options)
    for a, b in zip(*(load_samples(sorted(folder.iterdir())) for folder in folders), strict=True):
        for name in LensSample.__dataclass_fields__:
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0.02, atol=2e-3, err_msg=name)
    lensnet = LensNet.untrained(on_gpu.decoder, width=32, n_heads=2, ffn_dim=32, head_dim=16)
    net = GistNet.untrained(on_gpu.decoder, K)
    fitted, held_out = fit_lens(
        tmp_path / "gpu", on_gpu, net, lensnet, TrainOptions(steps=2, lr=1e-3, warmup=1), LensTaskOptions()
    )
    assert held_out
    fitted.save(tmp_path / "lens.safetensors")
    assert LensNet.load(tmp_path / "lens.safetensors", model.decoder).fingerprint == fitted.fingerprint
