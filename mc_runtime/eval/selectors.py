"""Ways to say which gists should be opened: LensNet, its rivals, and the oracle that has measured them all."""

from __future__ import annotations

import random
from typing import Protocol

import numpy as np
import torch

from mc_runtime.focus.leaves import Leaves
from mc_runtime.focus.view import Floats
from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.lens_samples import LensSample, example_of
from mc_runtime.train.lens_task import score


class Selector(Protocol):
    """name: as the tables show it."""

    @property
    def name(self) -> str: ...

    def scores(self, sample: LensSample, leaves: Leaves) -> Floats:
        """[leaves]: the larger, the sooner a leaf is opened."""
        ...


class ByLensNet:
    name = "LensNet"

    def __init__(self, net: LensNet, model: LoadedModel, gistnet: GistNet) -> None:
        self.net, self.model, self.gistnet = net, model, gistnet

    def scores(self, sample: LensSample, leaves: Leaves) -> Floats:
        example = example_of(sample, self.model, self.gistnet, self.net.mu)
        with torch.no_grad():
            return score(example, self.net.weights)[:, 0].double().cpu().numpy()


class ByAttention:
    """Attention mass that the recent tokens pay to a leaf, all layers alike (SnapKV and H2O, applied to blocks)."""

    name = "attention mass"

    def scores(self, sample: LensSample, leaves: Leaves) -> Floats:
        edges = np.concatenate(([0.0], np.cumsum(sample.mass.astype(np.float64).mean(axis=0))))
        return np.asarray((edges[leaves.rank + leaves.slots] - edges[leaves.rank]) / leaves.slots)


class ByBM25:
    """BM25 of a leaf's best block against the recent text, or the question."""

    name = "BM25"

    def scores(self, sample: LensSample, leaves: Leaves) -> Floats:
        padded = np.concatenate((sample.scores.astype(np.float64), np.zeros(len(sample.ids) // leaves.block_size + 1)))
        first, stop = leaves.starts // leaves.block_size, (leaves.starts + leaves.spans) // leaves.block_size
        return np.asarray(np.maximum.reduceat(padded, np.stack((first, stop), axis=1).ravel())[::2])


class ByRecency:
    name = "recency"

    def scores(self, sample: LensSample, leaves: Leaves) -> Floats:
        return leaves.starts.astype(np.float64)


class AtRandom:
    """Drawn from the seed and the text alone."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, sample: LensSample, leaves: Leaves) -> Floats:
        rng = random.Random(f"{self.seed} {sample.ids.tobytes().hex()}")
        return np.array([rng.random() for _ in range(len(leaves))])
