"""From settings to a gist task: what is trained, from which start, with which losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from mc_kernels import GistEncodeWeights, GistPoolWeights
from mc_runtime.config import BLOCK_SIZES, GistKind
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet, Projector
from mc_runtime.model.decoder import Decoder

from .block_inputs import EMBEDDINGS, BlockInputs
from .corpus import Corpus
from .gist_kinds import GistMaker
from .gist_options import LOGITS, GistTaskOptions
from .gist_questions import QuestionSource
from .gist_task import GistTask
from .layouts import LayoutOptions
from .level2_task import Level2Task
from .pooled_maker import OUTSIDE, PooledMaker, split_blocks
from .ridge import collect, ridge_projector
from .vector_makers import EmbeddingMaker, ProjectedMaker

HEAD_WIDTH = 64
# Peak learning rates that trained well for 100 steps and more.
DEFAULT_LR: dict[GistKind, float] = {"pooled": 3e-3, "projected": 6e-4, "embedding": 1e-3}
# Settings that only some kinds have.
ONLY = {
    "gists": ("pooled",),
    "train_levels": ("pooled",),
    "gist_bias": ("pooled", "projected"),
    "width": ("projected", "embedding"),
    "layers": ("projected", "embedding"),
    "pool": ("projected", "embedding"),
    "rank": ("projected",),
    "ridge_blocks": ("projected",),
    "keep_vectors": ("projected",),
    "inputs": ("projected",),
    "left_context": ("projected", "embedding"),
}


@dataclass(frozen=True)
class GistSettings:
    """What of a run shapes the gists.

    kind, levels (1 or 2), block_size: as in a memory. gists: per block. train_levels: which levels learn; None: all.
    width, layers, pool: of GistNet. rank: of the projector, which starts from `ridge_blocks` blocks. keep_vectors:
    train the projector alone. inputs, left_context: see `block_inputs`. The others are those of `GistTaskOptions` and
    `LayoutOptions`.
    """

    kind: GistKind = "pooled"
    levels: int = 1
    block_size: int = 32
    gists: int = 1
    train_levels: tuple[int, ...] | None = None
    width: int = 256
    layers: int = 2
    pool: str = "softmax"
    rank: int = 192
    ridge_blocks: int = 4000
    keep_vectors: bool = False
    inputs: str = EMBEDDINGS
    left_context: bool = False
    objective: str = LOGITS
    teacher: float = 0.7
    reconstruct: float = 0.0
    contrast: float = 0.0
    curriculum: tuple[float, float] = (0.0, 0.0)
    true_positions: float = 0.15
    questions: float = 0.0
    crowd: int = 0
    gist_bias: float = 0.0
    tokens: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in get_args(GistKind):
            raise InputError(f"kind: expected one of {', '.join(get_args(GistKind))}, got {self.kind!r}")
        if self.levels not in (1, 2):
            raise InputError(f"levels: expected 1 or 2, got {self.levels}")
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"block size: expected one of {BLOCK_SIZES}, got {self.block_size}")
        if self.gists < 1 or self.block_size % self.gists:
            raise InputError(
                f"gists: expected a number that divides the block size {self.block_size}, got {self.gists}"
            )
        if self.width < HEAD_WIDTH or self.width % HEAD_WIDTH:
            raise InputError(f"width: expected a multiple of {HEAD_WIDTH}, got {self.width}")
        for name, least in (("layers", 0), ("rank", 1), ("ridge_blocks", 1000), ("tokens", 1), ("crowd", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("teacher", "true_positions", "questions"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        BlockInputs.parse(self.inputs)
        if self.left_context and (self.layers == 0 or any(self.curriculum)):
            raise InputError("left_context: expected layers that attend to it, and no curriculum")
        for f in fields(self):
            if getattr(self, f.name) != f.default and self.kind not in ONLY.get(f.name, (self.kind,)):
                raise InputError(f"{f.name}: {self.kind} gists have no such setting")

    def task_options(self) -> GistTaskOptions:
        layout = LayoutOptions(level2=0.5 if self.levels == 2 else 0.0, true_positions=self.true_positions)
        return GistTaskOptions(
            tokens=self.tokens, teacher=self.teacher, objective=self.objective, reconstruct=self.reconstruct,
            contrast=self.contrast, curriculum=self.curriculum, questions=self.questions, crowd=self.crowd,
            gist_bias=self.gist_bias, layout=layout, **self._lengths(),
        )  # fmt: skip

    def _lengths(self) -> dict[str, Any]:
        """A gist of level 2 needs K blocks in front of a cut; a long past that was read serves several pieces."""
        if self.levels == 1:
            return {}
        lengths = {"lengths": (256, 512, 1024, 2048), "length_weights": (1.0,) * 4, "cuts": (1, 2, 6, 6)}
        return lengths | {"question_lengths": (512, 1024, 2048)}


def make_task(
    decoder: Decoder,
    corpora: Sequence[Corpus],
    settings: GistSettings,
    start: GistNet,
    *,
    resumes: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
    questions: QuestionSource | None = None,
) -> GistTask:
    """The task of a run. start: parts that are trained there are gone on with, others begin untrained.

    resumes: all parameters will be read from a checkpoint, so that a start which takes work is left out. seed: of
    untrained weights and of the blocks behind a projector's start. say: hears what that start explains.
    Raises InputError where `start` holds weights of another shape than the settings ask for.
    """
    maker = _maker(decoder, corpora, settings, start, resumes, seed, say)
    if settings.train_levels == (2,) and isinstance(maker, PooledMaker):
        return Level2Task(decoder, corpora, maker, settings.task_options(), questions)
    return GistTask(decoder, corpora, maker, settings.task_options(), questions=questions)


def _maker(
    decoder: Decoder, corpora: Sequence[Corpus], settings: GistSettings, start: GistNet, resumes: bool, seed: int,
    say: Callable[[str], None],
) -> GistMaker:  # fmt: skip
    if settings.kind == "pooled":
        trained = settings.train_levels or range(1, settings.levels + 1)
        frozen = [level for level in range(1, settings.levels + 1) if level not in trained]
        return PooledMaker(_pools(decoder, settings, start), frozen)
    encode = _encoder(decoder, settings, start, seed)
    inputs = BlockInputs.measured(decoder, corpora, BlockInputs.parse(settings.inputs), seed=seed)
    if inputs.layers:
        encode = replace(encode, mu=torch.zeros_like(encode.mu))  # the inputs are centred
    if settings.kind == "embedding":
        return EmbeddingMaker(encode, settings.block_size, settings.levels, left_context=settings.left_context)
    projector = start.projector
    if not isinstance(projector, Projector):
        vectors = EmbeddingMaker(encode, settings.block_size, inputs=inputs, left_context=settings.left_context)
        projector = _fresh_projector(decoder, corpora, settings, start, vectors, resumes, seed, say)
    elif len(projector.down) != settings.rank:
        raise InputError(f"rank: the projector to start from has {len(projector.down)}, got {settings.rank}")
    return ProjectedMaker(
        encode, projector, settings.block_size, settings.levels,
        trained=not settings.keep_vectors, inputs=inputs, left_context=settings.left_context,
    )  # fmt: skip


def _pools(decoder: Decoder, settings: GistSettings, start: GistNet) -> list[GistPoolWeights]:
    """Weights by level. Those of one gist per block start several, each on its part of the block."""
    c, out = decoder.config, list[GistPoolWeights]()
    children = settings.block_size
    for level in range(1, settings.levels + 1):
        if level <= len(start.pool_weights):
            weights = start.pool_weights[level - 1]
        else:
            weights = GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, children, c.head_dim).to(decoder.device)
        if weights.n_gists == 1 and weights.block_size == children and settings.gists > 1:
            weights = split_blocks(weights, settings.gists, OUTSIDE)
        if weights.n_gists != settings.gists:
            raise InputError(f"gists: level {level} to start from has {weights.n_gists}, got {settings.gists}")
        out.append(weights)
        children = settings.block_size * settings.gists
    return out


def _encoder(decoder: Decoder, settings: GistSettings, start: GistNet, seed: int) -> GistEncodeWeights:
    weights = start.encode_weights
    shape = (weights.width, weights.qkv.shape[0], weights.pool)
    asked = (settings.width, settings.layers, settings.pool)
    if bool(weights.w_out.any()):
        if shape != asked:
            raise InputError(f"start: holds a GistNet of width, layers and pooling {shape}, asked for {asked}")
        return weights
    return GistEncodeWeights.init(
        decoder.config.embed_dim,
        settings.width,
        layers=settings.layers,
        n_heads=settings.width // HEAD_WIDTH,
        ffn_dim=3 * settings.width,
        max_block_size=settings.block_size,
        mu=weights.mu.float(),
        target_rms=weights.target_rms,
        pool=settings.pool,
        generator=torch.Generator().manual_seed(seed),
        device=decoder.device,
    )


def _fresh_projector(
    decoder: Decoder, corpora: Sequence[Corpus], settings: GistSettings, start: GistNet, vectors: EmbeddingMaker,
    resumes: bool, seed: int, say: Callable[[str], None],
) -> Projector:  # fmt: skip
    c = decoder.config
    if resumes:
        heads = (c.n_layers, 2, c.n_kv_heads, c.head_dim)
        rank = min(settings.rank, c.embed_dim)
        zeros = (torch.zeros(shape, device=decoder.device) for shape in ((rank, c.embed_dim), (*heads, rank), heads))
        return Projector(*zeros)
    pool = start.pool_weights[0]
    if pool.n_gists != 1:
        raise InputError(f"start: a projector needs pooled gists of one per block to aim at, got {pool.n_gists}")

    @torch.no_grad()
    def encode(ids: Tensor) -> Tensor:
        return vectors.vectors(vectors.inputs.rows(decoder, ids))[0]

    fit, held_out = collect(decoder, corpora, encode, pool, blocks=settings.ridge_blocks, seed=seed)
    projector, share, full = ridge_projector(decoder, fit, held_out, settings.rank)
    say(
        f"ridge on {fit.n} blocks: rank {len(projector.down)} explains {share:.1%} of the variance of {held_out.n} "
        f"others' keys and values, full rank {full:.1%}"
    )
    return projector
