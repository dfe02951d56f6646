"""What a micro-batch of gist training holds, and which losses count."""

from __future__ import annotations

from dataclasses import dataclass, field

from mc_runtime.errors import InputError

from .layouts import LayoutOptions

LOGITS = "logits"


@dataclass(frozen=True)
class GistTaskOptions:
    """lengths: far tokens of a sequence, drawn per step with `length_weights`. near: tokens that run behind the gists.
    tokens: of the sequences of one micro-batch, about. cuts: pieces per sequence. teacher: share of the KL in the loss.

    objective: `logits`, or `hidden:N`: the residual stream of the near tokens after the first N layers against the
        teacher's, at N / L of the cost and without the vocabulary. Layers from N on learn nothing by it.
    reconstruct: weight of reading a gist's tokens back out of it, through a head of rank `reader_rank` from at most
        `reader_rows` gists. contrast: weight of the hinge at cosine distance `margin` between neighbouring gists.
    questions: share of the micro-batches that ask about articles (see `gist_questions`), of `question_lengths` tokens,
        `asked` questions of `question_near` tokens each. Blocks that stand open there are run with the question on the
        gists before them, as the runtime does.
    crowd: texts whose gists surround those of the sample's own past (see `crowd`; 0: none), in all samples that ask and
        in `crowded` of the others.
    gist_bias: log-weight in attention that gists are read with, as a memory will read them (keys and values only).
    curriculum: shares of the steps that train gists of a quarter, then of half a block, before those of whole blocks.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    length_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    near: int = 128
    tokens: int = 4096
    cuts: tuple[int, ...] = (1, 2, 4)
    teacher: float = 0.7
    objective: str = LOGITS
    reconstruct: float = 0.0
    reader_rank: int = 64
    reader_rows: int = 128
    contrast: float = 0.0
    margin: float = 0.2
    questions: float = 0.0
    question_lengths: tuple[int, ...] = (512, 1024, 2048)
    question_near: int = 88
    asked: int = 4
    crowd: int = 0
    crowded: float = 0.3
    gist_bias: float = 0.0
    curriculum: tuple[float, float] = (0.0, 0.0)
    layout: LayoutOptions = field(default_factory=LayoutOptions)

    def __post_init__(self) -> None:
        self.stop_layer  # noqa: B018 (raises for an objective that is none)
        if min(self.curriculum) < 0 or sum(self.curriculum) > 1:
            raise InputError(f"curriculum: expected two shares that add up to at most 1, got {self.curriculum}")
        for name in ("reconstruct", "contrast"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: expected a weight of at least 0, got {getattr(self, name)}")

    @property
    def stop_layer(self) -> int | None:
        """Layers that run; None: all of them, and the head."""
        if self.objective == LOGITS:
            return None
        name, _, number = self.objective.partition(":")
        if name != "hidden" or not number.isdigit() or int(number) < 1:
            raise InputError(f"objective: expected {LOGITS} or hidden:N with N layers, got {self.objective!r}")
        return int(number)
