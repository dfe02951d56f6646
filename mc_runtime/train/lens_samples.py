"""Labelled contexts for LensNet: drawn, measured, kept in files, and turned into the net's inputs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mc_runtime.errors import InputError
from mc_runtime.focus.features import feature_rows
from mc_runtime.focus.leaves import Leaves, find_leaves
from mc_runtime.focus.lens_queries import query_rows
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.retrieval import score_blocks
from mc_runtime.timeline import Entries

from .corpus import Corpus
from .lens_contexts import Scene, attention_mass, draw_groups, draw_opened, layout_of, read_scene
from .lens_labels import gate_labels
from .lens_questions import Article, Asked, draw_questions

# Newest tokens that a continuation is retrieved with, as while decoding.
QUERY_TOKENS = 64
# Share of continuations whose first block is in full; the others keep its first token alone.
FIRST_OPEN = 0.5
# Share of questions whose answer stands in full already: keeping it is worth much then, opening more is worth little.
ANSWER_OPEN = 0.35


@dataclass(frozen=True)
class LensSample:
    """One labelled context.

    ids: [N] int32, the far tokens and the recent ones. levels, index: the layout's entries, recent tokens included.
    mass: [L, entries] fp16, as shares of an even one. scores: [far blocks] BM25. asked: [n] int32, the query's tokens.
    labels: [leaves, 2] fp32, nats of expanding and collapsing, NaN where unknown. answer: [1] the block that holds the
    answer to a question, -1 for a continuation.
    """

    ids: NDArray[np.int32]
    far: NDArray[np.int32]
    levels: NDArray[np.int8]
    index: NDArray[np.int32]
    mass: NDArray[np.float16]
    scores: NDArray[np.float32]
    asked: NDArray[np.int32]
    labels: NDArray[np.float32]
    answer: NDArray[np.int32]

    def leaves(self, size: int) -> Leaves:
        entries = Entries(self.levels, self.index.astype(np.int64), size)
        return find_leaves(entries, len(self.ids) // size, len(self.ids))


FIELDS = tuple(LensSample.__dataclass_fields__)


@dataclass(frozen=True)
class SampleOptions:
    """lengths: far tokens of a scene. tokens: of one scene's continuations, about. questions: share of scenes that ask;
    asked: questions of such a scene at most, fewer where their histories would be longer than `asked_tokens` together.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    recent: int = 64
    targets: int = 64
    tokens: int = 4096
    questions: float = 0.4
    asked: int = 16
    asked_tokens: int = 32768


def observe(scene: Scene, model: LoadedModel, queries: Sequence[str], answers: Sequence[int]) -> list[LensSample]:
    """What the rows of a scene show, not labelled. queries: the text that each row retrieves with."""
    mass, size, length = attention_mass(scene), scene.block_size, scene.far + scene.recent
    out = []
    for row, query in enumerate(queries):
        ids = scene.ids[row, :length].cpu().numpy().astype(np.int32)
        entries = scene.entries[row].with_tokens(scene.recent)
        even = np.maximum(mass[row].sum(axis=1, keepdims=True) / len(entries), 1e-9)
        out.append(
            LensSample(
                ids=ids,
                far=np.array([scene.far], np.int32),
                levels=entries.levels,
                index=entries.index.astype(np.int32),
                mass=(mass[row] / even).clip(0, 6e4).astype(np.float16),
                scores=score_blocks(model.tokenizer, ids, size, query)[: scene.far // size].astype(np.float32),
                asked=np.array(model.tokenizer.encode(query), np.int32),
                labels=np.full((len(scene.leaves(row)), 2), np.nan, np.float32),
                answer=np.array([answers[row]], np.int32),
            )
        )
    return out


def label(scene: Scene, samples: Sequence[LensSample]) -> list[LensSample]:
    """The samples with gate labels."""
    labels = gate_labels(scene, [scene.leaves(row) for row in range(len(samples))])
    return [replace(one, labels=x.astype(np.float32)) for one, x in zip(samples, labels, strict=True)]


def draw_scene(
    rng: random.Random,
    model: LoadedModel,
    net: GistNet,
    corpora: Sequence[Corpus],
    articles: list[Article],
    options: SampleOptions,
) -> list[LensSample]:
    """Labelled samples of one scene: continuations of the corpora's texts, or questions about articles."""
    size = net.pool_weights[0].b.shape[-1]
    far = rng.choice(options.lengths)
    length = far + options.recent
    asked: list[Asked] = []
    if articles and rng.random() < options.questions:
        most = max(1, min(options.asked, options.asked_tokens // length))
        asked = draw_questions(rng, model, articles, far, options.recent, options.targets, size, most)
        rows = [one.ids for one in asked]
        queries = [one.question for one in asked]
    else:
        count, weights = max(1, options.tokens // length), [c.weight for c in corpora]
        rows = [rng.choices(corpora, weights)[0].sample(rng, length + options.targets) for _ in range(count)]
        queries = [model.tokenizer.decode(row[length - QUERY_TOKENS : length].tolist()) for row in rows]
    opened = [draw_opened(rng, far // size) for _ in rows]
    for one in opened:
        one[0] = rng.random() < FIRST_OPEN
    for one, question in zip(opened, asked, strict=False):
        one[0] = True  # the system prompt
        one[question.answer_block] = rng.random() < ANSWER_OPEN
    layouts = [layout_of(one, size, draw_groups(rng, one, size)) for one in opened]
    ids = torch.from_numpy(np.stack(rows)).to(model.decoder.device)
    scene = read_scene(model.decoder, net.pool_weights, ids, layouts, far, options.recent)
    known = tuple(one.known for one in asked) if asked else None
    scene = replace(scene, known=known, gist_bias=net.gist_bias)
    return label(scene, observe(scene, model, queries, [one.answer_block for one in asked] or [-1] * len(rows)))


def save_samples(samples: Sequence[LensSample], path: Path) -> None:
    """One safetensors file; complete or not there."""
    tensors = {
        f"{i}/{name}": np.ascontiguousarray(getattr(one, name)) for i, one in enumerate(samples) for name in FIELDS
    }
    partial = path.with_suffix(".part")
    save_file(tensors, partial)
    partial.replace(path)


def load_samples(paths: Sequence[Path]) -> Iterator[LensSample]:
    """Raises InputError for a file that cannot be read."""
    for path in paths:
        try:
            tensors = load_file(path)
            count = len(tensors) // len(FIELDS)
            yield from (LensSample(**{name: tensors[f"{i}/{name}"] for name in FIELDS}) for i in range(count))
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path}: not a readable file of samples ({error})") from error


@dataclass(frozen=True)
class LensExample:
    """What `lens_score` takes, and what it should give: entries [n, E] model dtype, features [n, F] fp32, queries
    [Q, E], labels [n, 2] fp32 (NaN where unknown). asks: a question decides, not a continuation."""

    entries: Tensor
    features: Tensor
    queries: Tensor
    labels: Tensor
    asks: bool


@torch.no_grad()
def example_of(sample: LensSample, model: LoadedModel, net: GistNet, mu: Tensor) -> LensExample:
    """The inputs that the runtime would give the net in the sample's place."""
    decoder, size = model.decoder, net.pool_weights[0].b.shape[-1]
    leaves, asks = sample.leaves(size), int(sample.answer[0]) >= 0
    whole = len(sample.ids) // size * size
    embeddings = decoder.embed(torch.from_numpy(sample.ids[None].astype(np.int64)).to(decoder.device))[0]
    summaries = [net.encode(embeddings[:whole].unflatten(0, (-1, size))).to(decoder.dtype)]
    if len(summaries[0]) >= size:
        groups = len(summaries[0]) // size
        summaries.append(
            net.encode(summaries[0][: groups * size].unflatten(0, (groups, size)), level=2).to(decoder.dtype)
        )
    rows = torch.stack(
        [
            summaries[max(int(level), 1) - 1][int(index)]
            for level, index in zip(leaves.levels, leaves.index, strict=True)
        ]
    )
    asked = decoder.embed(torch.from_numpy(sample.asked[None].astype(np.int64)).to(decoder.device))[0].float()
    gists = [*summaries[0][-2:].float(), *(x for level in summaries[1:] for x in level[-1:].float())]
    queries = query_rows(embeddings[-256:].float(), asked, gists, mu).to(rows)
    features = torch.from_numpy(
        feature_rows(leaves, sample.mass.astype(np.float64), sample.scores.astype(np.float64), asks)
    ).to(decoder.device)
    labels = torch.from_numpy(sample.labels).to(decoder.device)
    return LensExample(rows, features, queries, labels, asks)
