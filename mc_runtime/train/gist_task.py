"""Training of gists: what follows must be as likely after gists as after the text itself.

A sequence runs once through the frozen model: that gives every token's keys and values (of which gists are pooled) and
the teacher's hidden states. Then several pieces of it run again, each behind a context in which blocks of its past
stand as gists. The loss is the KL divergence from the teacher plus cross-entropy; gradients flow through the model's
attention into the gists, and into the parameters that made them.

Precision: the frozen model, its activations and the cache keep the dtype that the model was loaded in (bf16), so no
matmul over the model runs in fp32 and no autocast is needed. Parameters, their gradients, the optimizer, softmaxes and
losses are fp32; the kernels take fp32 weights beside bf16 data and accumulate in fp32.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from mc_kernels import GistPoolWeights
from mc_runtime.errors import InputError
from mc_runtime.model.decoder import Decoder

from .corpus import Corpus, sample_mixture
from .crowd import Crowd
from .gist_kinds import GistMaker, LevelGists, read_text
from .gist_options import LOGITS, GistTaskOptions
from .gist_questions import QuestionSource, open_answers, passage_alone
from .gist_runs import GistRuns
from .layouts import Entry, LayoutOptions, draw_layout
from .losses import distillation_loss, hidden_loss, neighbour_loss
from .pooled_maker import PooledMaker
from .reconstruction import BagReader


class GistTask(GistRuns):
    """Loss of gists of one or two levels. parameters: those of the maker, and `aux/...` that serve training alone.

    weights: pooled gists' by level, or a maker of any kind. frozen_levels: of pooled gists, used but not trained.
    """

    def __init__(
        self,
        decoder: Decoder,
        corpora: Sequence[Corpus],
        weights: Sequence[GistPoolWeights] | GistMaker,
        options: GistTaskOptions | None = None,
        frozen_levels: Sequence[int] = (),
        questions: QuestionSource | None = None,
    ) -> None:
        maker = weights if isinstance(weights, GistMaker) else PooledMaker(weights, frozen_levels)
        super().__init__(decoder, maker, options or GistTaskOptions())
        self.corpora, self.questions = corpora, questions
        self.parameters = dict(self.maker.parameters)
        self.parts = 1
        o, c = self.options, decoder.config
        if o.stop_layer is not None and o.stop_layer > c.n_layers:
            raise InputError(f"objective: expected at most {c.n_layers} layers, got {o.objective!r}")
        if any(o.curriculum) and (self.maker.gists[0] != 1 or self.size % 4):
            raise InputError("curriculum: expected one gist per block, of a size that four parts divide")
        if o.crowd and (self.maker.kind == "embedding" or o.objective != LOGITS or any(o.curriculum)):
            raise InputError(f"crowd: expected gists that are keys and values, objective {LOGITS} and no curriculum")
        if o.gist_bias and self.maker.kind == "embedding":
            raise InputError("gist_bias: expected gists that are keys and values")
        if o.questions and (questions is None or o.objective != LOGITS):
            raise InputError(f"questions: a share of {o.questions} needs articles and objective {LOGITS}")
        self.reader: BagReader | None = None
        if o.reconstruct:
            of_layer = 2 * c.n_kv_heads * c.head_dim
            features = (o.stop_layer or c.n_layers) * of_layer if self.maker.kind == "pooled" else c.embed_dim
            self.reader = BagReader(decoder, features, o.reader_rank, o.reader_rows)
            self.parameters |= self.reader.parameters

    def begin_step(self, done: float) -> None:
        """Set the parts per block that the curriculum asks for when this share of the schedule is done."""
        quarters, halves = self.options.curriculum
        self.parts = 4 if done < quarters else 2 if done < quarters + halves else 1

    def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """Loss of one micro-batch and figures for the log: loss, nll in nats a token (of objective `logits`), and the
        unweighted extra losses."""
        if self.questions is not None and rng.random() < self.options.questions:
            return self._question_loss(rng, self.questions)
        return self._text_loss(rng)

    def _text_loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """Of a micro-batch of texts that go on."""
        o = self.options
        which = rng.choices(range(len(o.lengths)), o.length_weights)[0]
        far, cuts = o.lengths[which], o.cuts[which]
        length = far + o.near
        batch = max(1, o.tokens // length)
        ids = torch.from_numpy(sample_mixture(self.corpora, rng, batch, length)).to(self.decoder.device)
        k, v, teacher = self.read(ids)
        levels = self.maker.make(self.decoder, ids, k, v, self.parts)
        samples = [
            (row, self.size * rng.randint(max(1, far // self.size // 2), far // self.size) if cuts > 1 else far)
            for row in range(batch)
            for _ in range(cuts)
        ]
        layouts = self._layouts(rng, samples, levels, o.layout)
        packed = [rng.random() >= o.layout.true_positions for _ in samples]
        crowd = None
        if o.crowd and rng.random() < o.crowded:
            crowd, packed = self.crowd.gists(rng), [True] * len(samples)
            layouts = [self._crowded(rng, layout, levels, all_before=True) for layout in layouts]
        hidden = self.run(ids, k, v, levels, samples, layouts, packed, o.near, crowd=crowd)
        loss, figures = self._main_loss(ids, teacher, samples, hidden)
        if o.contrast:
            contrast = torch.stack([neighbour_loss(level.neighbours(), o.margin) for level in levels]).mean()
            loss = loss + o.contrast * contrast
            figures["contrast"] = contrast
        if self.reader is not None:
            reconstruction = self.reader.loss(levels, ids, rng)
            loss = loss + o.reconstruct * reconstruction
            figures["reconstruction"] = reconstruction
        return loss, {"loss": float(loss.detach()), **{name: float(x.detach()) for name, x in figures.items()}}

    def _layouts(
        self,
        rng: random.Random,
        samples: Sequence[tuple[int, int]],
        levels: Sequence[LevelGists],
        options: LayoutOptions,
    ) -> list[list[Entry]]:
        options = options if len(levels) > 1 else replace(options, level2=0.0)
        gists = self.per_block(levels)
        return [draw_layout(rng, cut // self.size, self.size, options, gists) for _, cut in samples]

    def _crowded(
        self, rng: random.Random, layout: Sequence[Entry], levels: Sequence[LevelGists], *, all_before: bool = False
    ) -> list[Entry]:
        """A layout with the crowd's gists behind its first block or token, and before what follows it."""
        entries = self.crowd.draw(rng, self.per_block(levels))
        head = 0
        while head < len(layout) and layout[head] == Entry(0, head) and head < self.size:
            head += 1
        before = len(entries) if all_before else rng.randint(0, len(entries))
        return [*layout[:head], *entries[:before], *layout[head:], *entries[before:]]

    @cached_property
    def crowd(self) -> Crowd:
        """The same texts for the same corpora."""
        return Crowd(self.decoder, self.corpora, self.maker, self.options.crowd)

    def _question_loss(self, rng: random.Random, source: QuestionSource) -> tuple[Tensor, dict[str, float]]:
        """Of a micro-batch of questions: the answers' tokens alone count. The teacher reads nothing but the answer's
        passage: it answers twice as well as from the whole text. nll is not reported: it is not the texts'."""
        o = self.options
        far = rng.choice(o.question_lengths)
        batch = max(1, o.tokens // (far + o.asked * o.question_near))
        drawn = source.draw(rng, batch, o.asked, far, o.question_near)
        ids, near = drawn.ids, drawn.near.flatten(0, 1)
        of_k, of_v = (None, None) if self.maker.kind == "embedding" else read_text(self.decoder, ids)
        levels = self.maker.make(self.decoder, ids, of_k, of_v, self.parts)
        rows = [row for row in range(batch) for _ in range(o.asked)]
        gists, level2 = self.per_block(levels), o.layout.level2 if len(levels) > 1 else 0.0
        layouts = [
            open_answers(rng, far // self.size, self.size, first, last, gists, level2)
            for first, last in drawn.blocks.flatten(0, 1).tolist()
        ]
        packed = [rng.random() >= o.layout.true_positions for _ in rows]
        crowd = None
        if o.crowd:
            crowd, packed = self.crowd.gists(rng), [True] * len(rows)
            layouts = [self._crowded(rng, layout, levels) for layout in layouts]
        hidden = self.run(
            ids, of_k, of_v, levels, [(row, far) for row in rows], layouts, packed, o.question_near, near_ids=near,
            crowd=crowd, fresh=True,
        )  # fmt: skip
        with torch.no_grad():
            alone = [passage_alone(far // self.size, self.size, *at) for at in drawn.blocks.flatten(0, 1).tolist()]
            teacher = self.run(
                ids, of_k, of_v, [], [(row, far) for row in rows], alone, [True] * len(rows), o.question_near,
                near_ids=near, fresh=True,
            )  # fmt: skip
        place = torch.arange(o.question_near - 1, device=ids.device)
        first, stop = drawn.answer.flatten(0, 1)[..., None].unbind(1)
        asked = (place >= first - 1) & (place < stop - 1)
        loss, nll = distillation_loss(
            hidden[:, :-1][asked], teacher[:, :-1][asked], near[:, 1:][asked], self.decoder.head, o.teacher
        )
        return loss, {"loss": float(loss.detach()), "answer_nll": float(nll)}

    def _main_loss(
        self, ids: Tensor, teacher: Tensor, samples: Sequence[tuple[int, int]], hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        near = self.options.near
        rows = torch.tensor([row for row, _ in samples], device=ids.device)[:, None]
        at = torch.tensor([cut for _, cut in samples], device=ids.device)[:, None] + torch.arange(
            near - 1, device=ids.device
        )
        student, taught = hidden[:, :-1].flatten(0, 1), teacher[rows, at].flatten(0, 1)
        if self.options.stop_layer is not None:
            return hidden_loss(student, taught), {}
        targets = ids[rows, at + 1].flatten()
        loss, nll = distillation_loss(student, taught, targets, self.decoder.head, self.options.teacher)
        return loss, {"nll": nll}
