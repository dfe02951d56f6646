"""Ways to say which gists should be opened: LensNet, its rivals, and the oracle that has measured them all."""

from __future__ import annotations

import random
from typing import Protocol

import numpy as np
import torch

from mc_runtime.focus.hindsight import recency_weights
from mc_runtime.focus.leaves import Leaves
from mc_runtime.focus.view import Floats
from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.lens_contexts import Scene
from mc_runtime.train.lens_labels import expanded_layout, recent_nll
from mc_runtime.train.lens_samples import LensSample, example_of
from mc_runtime.train.lens_task import score


class Selector(Protocol):
    """name: as the tables show it."""

    @property
    def name(self) -> str: ...

    def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
        """[leaves]: the larger, the sooner a leaf is opened."""
        ...


class ByLensNet:
    name = "LensNet"

    def __init__(self, net: LensNet, model: LoadedModel, gistnet: GistNet) -> None:
        self.net, self.model, self.gistnet = net, model, gistnet

    def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
        example = example_of(sample, self.model, self.gistnet, self.net.mu)
        with torch.no_grad():
            return score(example, self.net.weights)[:, 0].double().cpu().numpy()


class ByHindsight:
    """What opening a leaf alone would have saved on the recent tokens, of which the newest count most, as in
    `HindsightPolicy`: measured, one forward of the recent tokens per leaf."""

    name = "hindsight"

    def __init__(self, decay: float = 16.0) -> None:
        self.decay = decay

    def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
        gists = ((leaves.levels > 0) & (leaves.starts < scene.far)).nonzero()[0]
        layout = scene.entries[row]
        nll = recent_nll(scene, row, [layout, *(expanded_layout(layout, int(leaves.rank[i])) for i in gists)])
        scores: Floats = np.full(len(leaves), -np.inf)
        scores[gists] = (nll[0] - nll[1:]) @ recency_weights(nll.shape[1], self.decay)
        return scores


class ByAttention:
    """Attention mass that the recent tokens pay to a leaf, all layers alike (SnapKV and H2O, applied to blocks)."""

    name = "attention mass"

    def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
        edges = np.concatenate(([0.0], np.cumsum(sample.mass.astype(np.float64).mean(axis=0))))
        return np.asarray((edges[leaves.rank + leaves.slots] - edges[leaves.rank]) / leaves.slots)


class ByBM25:
    """BM25 of a leaf's best block against the recent text, or the question."""

    name = "BM25"

    def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
        padded = np.concatenate((sample.scores.astype(np.float64), np.zeros(len(sample.ids) // leaves.block_size + 1)))
        first, stop = leaves.starts // leaves.block_size, (leaves.starts + leaves.spans) // leaves.block_size
        return np.asarray(np.maximum.reduceat(padded, np.stack((first, stop), axis=1).ravel())[::2])


class ByRecency:
    name = "recency"

    def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
        return leaves.starts.astype(np.float64)


class AtRandom:
    """Drawn from the seed and the text alone."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
        rng = random.Random(f"{self.seed} {sample.ids.tobytes().hex()}")
        return np.array([rng.random() for _ in range(len(leaves))])
