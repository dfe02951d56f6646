"""LensNet's training: samples, what the net is given, and that it learns what a label says."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.focus.features import FEATURES, lens_inputs
from mc_runtime.focus.view import FocusView
from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.ranks import spearman
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.lens_augment import hide_mass, mix_up, put_far
from mc_runtime.train.lens_fit import fit_lens, label_scenes, report_fit
from mc_runtime.train.lens_questions import draw_question, draw_questions, read_articles
from mc_runtime.train.lens_samples import LensExample, LensSample, SampleOptions, example_of, load_samples, save_samples
from mc_runtime.train.lens_start import fit_head
from mc_runtime.train.lens_task import LensTask, LensTaskOptions, score
from mc_runtime.train.trainer import Trainer, TrainOptions

K = 8
OPTIONS = SampleOptions(lengths=(192, 256), recent=64, targets=16, tokens=512, questions=0.5)
SMALL = {"width": 32, "n_heads": 2, "ffn_dim": 32, "head_dim": 16}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Articles of six paragraphs in SQuAD's format."""
    names = ["Ada", "Bob", "Cleo", "Dan", "Eve", "Fay"]
    articles = []
    for name in names:
        paragraphs = []
        for number in range(6):
            context = f"{name} keeps lamp {number}. It is the {number + 3}th lamp that {name} has had in the house."
            start = context.index(f"{number + 3}th")
            answer = {"text": f"{number + 3}th", "answer_start": start}
            paragraphs.append({"context": context, "qas": [{"question": "Which?", "answers": [answer], "id": "0"}]})
        articles.append({"title": name, "paragraphs": paragraphs})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": articles}))
    return path


@pytest.fixture
def labelled(tmp_path: Path, model: LoadedModel, corpus: Callable[[str], Corpus], questions: Path) -> Path:
    net = GistNet.untrained(model.decoder, K)
    label_scenes(
        tmp_path / "labels", model, net, [corpus("a"), corpus("b")], read_articles(questions), 6, 3, options=OPTIONS
    )
    return tmp_path


def test_samples_come_back_from_their_files(labelled: Path, tmp_path: Path) -> None:
    paths = sorted((labelled / "labels").iterdir())
    assert len(paths) == 6
    samples = list(load_samples(paths))
    assert {len(one.ids) for one in samples} <= {256, 320}
    assert {int(one.answer[0]) >= 0 for one in samples} == {True, False}
    save_samples(samples, tmp_path / "again.safetensors")
    for a, b in zip(samples, load_samples([tmp_path / "again.safetensors"]), strict=True):
        for name in LensSample.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    with pytest.raises(InputError, match="not a readable file of samples"):
        list(load_samples([tmp_path / "questions.json"]))


def test_labelling_goes_on_where_it_stopped(
    labelled: Path, model: LoadedModel, corpus: Callable[[str], Corpus]
) -> None:
    folder = labelled / "labels"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "000002.safetensors").unlink()
    net, articles = GistNet.untrained(model.decoder, K), read_articles(labelled / "questions.json")
    label_scenes(folder, model, net, [corpus("a"), corpus("b")], articles, 6, 3, options=OPTIONS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_labels_are_of_legal_edits_only(labelled: Path) -> None:
    seen = 0
    for sample in load_samples(sorted((labelled / "labels").iterdir())):
        leaves = sample.leaves(K)
        assert len(leaves) == len(sample.labels)
        known = np.isfinite(sample.labels)
        assert not known[leaves.levels == 0, 0].any()
        assert not known[leaves.starts >= int(sample.far[0])].any()
        seen += int(known.sum())
    assert seen > 50


def test_inputs_are_those_of_the_runtime(model: LoadedModel, tmp_path: Path) -> None:
    """A memory with a sample's text and layout gives the net the sample's inputs."""
    net = GistNet.untrained(model.decoder, K)
    settings = {"budget": 256, "block_size": K, "recent_tokens": 16, "ingest_chunk": 128, "ingest_window": 128}
    text = " ".join(random.Random(0).choices(["sea", "wind", "lamp", "keeper", "night"], k=40))
    with Session.open(tmp_path / "m", model, **settings) as session:
        session.ingest(text)
        context = session.context
        with torch.inference_mode():
            session.focus.make_room(context, 0)
        query, far = "the keeper of the lamp", context.length // K * K - 16
        mass = np.random.default_rng(0).random((3, len(context.entries)))
        view = FocusView(context, context.expanded, query, mass, session.retrieval, far)
        lens = LensNet.untrained(model.decoder, **SMALL)
        inputs = lens_inputs(view, lens.mu)
        scores = session.retrieval.scores(query)[: far // K]
        sample = LensSample(
            ids=session.tree.tokens().astype(np.int32),
            far=np.array([far], np.int32),
            levels=context.entries.levels,
            index=context.entries.index.astype(np.int32),
            mass=(mass / mass.mean(axis=1, keepdims=True)).astype(np.float16),
            scores=scores.astype(np.float32),
            asked=np.array(model.tokenizer.encode(query), np.int32),
            labels=np.zeros((len(inputs), 2), np.float32),
            answer=np.array([-1], np.int32),
        )
        example = example_of(sample, model, net, lens.mu)
    assert len(inputs) > 4
    torch.testing.assert_close(example.features, inputs.features, atol=2e-3, rtol=2e-3)  # mass is kept in fp16
    torch.testing.assert_close(example.entries, inputs.entries)
    torch.testing.assert_close(example.queries, inputs.queries)


def test_questions_end_where_the_answer_begins(model: LoadedModel, questions: Path) -> None:
    articles, rng = read_articles(questions), random.Random(1)
    for _ in range(5):
        drawn = draw_question(rng, model, articles, 192, 64, 16, K)
        assert drawn.ids.shape == (272,)
        answer = model.tokenizer.decode(drawn.ids[256 : 256 + drawn.known].tolist())
        assert answer.removesuffix("<|im_end|>").endswith("th")
        start = drawn.answer_block * K
        around = model.tokenizer.decode(drawn.ids[start : start + 2 * K].tolist())
        assert answer[:3] in around
        assert model.tokenizer.decode(drawn.ids[:256].tolist()).rstrip().endswith("assistant")


def test_questions_about_one_text_share_its_far_tokens(model: LoadedModel, questions: Path) -> None:
    articles = read_articles(questions)
    drawn = draw_questions(random.Random(2), model, articles, 320, 64, 16, K, 8)
    assert 1 < len(drawn) <= 8
    assert len({one.answer_block for one in drawn}) > 1
    for one in drawn:
        assert (one.ids[:320] == drawn[0].ids[:320]).all()
        answer = model.tokenizer.decode(one.ids[384 : 384 + one.known].tolist())
        start = one.answer_block * K
        assert answer[:3] in model.tokenizer.decode(one.ids[start : start + 2 * K].tolist())
        assert model.tokenizer.decode(one.ids[:384].tolist()).rstrip().endswith("assistant")
    assert len(draw_questions(random.Random(2), model, articles, 320, 64, 16, K, 1)) == 1
    with pytest.raises(InputError, match="1,000 drawn texts"):
        draw_questions(random.Random(2), model, articles, 4096, 64, 16, K, 1)


def test_both_kinds_of_contexts_are_drawn_alike(model: LoadedModel) -> None:
    lens = LensNet.untrained(model.decoder, **SMALL)
    examples = planted(model, lens, 20)
    examples[3] = replace(examples[3], asks=True)
    task, rng = LensTask(lens.weights, examples, LensTaskOptions(questions=0.5)), random.Random(0)
    assert 400 < sum(task._draw(rng).asks for _ in range(1000)) < 600
    task = LensTask(lens.weights, examples[:3], LensTaskOptions(questions=0.5))
    assert not any(task._draw(rng).asks for _ in range(10))


def test_articles_of_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"data": [{"title": "x"}]}')
    with pytest.raises(InputError, match="SQuAD"):
        read_articles(path)


def planted(model: LoadedModel, lens: LensNet, count: int = 44) -> list[LensExample]:
    """What is near gains most: a rule that one feature tells."""
    generator, column = torch.Generator().manual_seed(0), FEATURES.index("log_distance_over_8")
    examples = []
    for _ in range(count):
        n = 12
        features = torch.rand(n, len(FEATURES), generator=generator)
        labels = torch.full((n, 2), float("nan"))
        labels[:, 0] = 0.06 * (0.5 - features[:, column])  # nats, as real ones are
        entries, queries = torch.ones(n, 32), torch.ones(3, 32)  # nothing to learn by heart
        examples.append(LensExample(entries, features, queries, labels, False))
    return examples


def test_the_net_learns_a_planted_rule(model: LoadedModel, tmp_path: Path) -> None:
    lens = LensNet.untrained(model.decoder, **SMALL)
    train, held_out = planted(model, lens)[:40], planted(model, lens)[40:]
    task = LensTask(lens.weights, train, LensTaskOptions(gain=1.0, scale=0.01, rank=0.0, batch=3))
    before = task.loss(random.Random(0))[0].item()
    trainer = Trainer(task, tmp_path / "run", TrainOptions(steps=120, lr=1e-2, accumulate=1, ema=0.9))
    trainer.run()
    assert task.loss(random.Random(0))[0].item() < 0.5 * before
    net = LensNet(task.weights(trainer.averaged()), lens.mu)
    found = [spearman(score(e, net.weights)[:, 0].numpy(), e.labels[:, 0].numpy()) for e in held_out]
    assert np.mean(found) > 0.8


def test_the_head_alone_learns_what_features_tell(model: LoadedModel) -> None:
    lens, options = LensNet.untrained(model.decoder, **SMALL), LensTaskOptions(gain=1.0)
    train, held_out = planted(model, lens)[:40], planted(model, lens)[40:]
    fitted = fit_head(lens.weights, train, options)
    for example in held_out:
        found, wanted = score(example, fitted)[:, 0], example.labels[:, 0]
        assert spearman(found.numpy(), wanted.numpy()) > 0.8
        assert (found - wanted).abs().mean() < 0.3 * wanted.abs().mean(), "nats, not an order alone"
    again = fit_head(lens.weights, train, options)
    assert all(torch.equal(a, b) for a, b in zip(fitted.tensors(), again.tensors(), strict=True))
    assert torch.equal(fitted.read_q, lens.weights.read_q)


def test_answers_promise_no_more_nats_than_there_are() -> None:
    options = LensTaskOptions(gain=0.5, cost=2.0, most=3.0)
    nats = options.nats(torch.tensor([[100.0, -100.0], [1.0, 1.0], [float("nan"), 0.0]]))
    assert nats[:2].tolist() == [[3.0, -3.0], [0.5, 2.0]]
    assert nats[2].isnan().tolist() == [True, False]


def test_unknown_labels_move_nothing(model: LoadedModel) -> None:
    lens = LensNet.untrained(model.decoder, **SMALL)
    example = planted(model, lens, 1)[0]
    nothing = LensExample(example.entries, example.features, example.queries, example.labels * float("nan"), False)
    task = LensTask(lens.weights, [nothing])
    loss, _ = task.loss(random.Random(0))
    assert loss.item() == 0


def test_fit_uses_the_labels_and_reports(labelled: Path, model: LoadedModel) -> None:
    net, lens = GistNet.untrained(model.decoder, K), LensNet.untrained(model.decoder, **SMALL)
    options = TrainOptions(steps=4, lr=1e-3, accumulate=1)
    lines: list[int] = []
    fitted, held_out = fit_lens(
        labelled, model, net, lens, options, LensTaskOptions(batch=2), lambda line: lines.append(line["step"])
    )
    assert lines == [1, 2, 3, 4]
    assert held_out
    assert any(not torch.equal(a, b) for a, b in zip(fitted.weights.tensors(), lens.weights.tensors(), strict=True))
    assert any("rank correlation" in line for line in report_fit(fitted, held_out))
    with pytest.raises(InputError, match="labelled scenes"):
        fit_lens(labelled / "nothing", model, net, lens, options, LensTaskOptions())


def test_hidden_mass_and_far_questions_change_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(40, len(FEATURES), generator=generator) + 0.1
    known, distance, place = (FEATURES.index(n) for n in ("has_mass", "log_distance_over_8", "place"))
    features[:, FEATURES.index("is_first")] = torch.arange(40) == 0
    mass = [i for i, name in enumerate(FEATURES) if "mass" in name]
    others = [i for i in range(len(FEATURES)) if i not in mass]
    shares = []
    for seed in range(30):
        found = hide_mass(features, random.Random(seed))
        assert torch.equal(found[:, others], features[:, others])
        hidden = found[:, known] == 0
        assert (found[hidden][:, mass] == 0).all()
        assert torch.equal(found[~hidden], features[~hidden])
        shares.append(float(hidden.float().mean()))
    assert min(shares) < 0.2
    assert max(shares) > 0.8
    moved = {"log_distance_over_8", "log_rank_distance_over_8", "place"}
    same = [i for i, name in enumerate(FEATURES) if name not in moved]
    for seed in range(30):
        found = put_far(features, random.Random(seed))
        assert torch.equal(found[:, same], features[:, same])
        assert (found[:, distance] >= features[:, distance] - 1e-5).all()
        assert found[:, place].min() >= 0
        assert found[:, place].max() < 1.2
        assert found.isfinite().all()


def test_mixed_entries_are_the_same_in_another_order() -> None:
    entries = torch.arange(40.0).view(20, 2)
    found = mix_up(entries, random.Random(0))
    assert not torch.equal(found, entries)
    assert torch.equal(found[found[:, 0].argsort()], entries)
    assert mix_up(entries[:0], random.Random(0)).shape == (0, 2)
