"""Focus regret on the tiny model: the oracle is the best of single openings, figures follow from the NLLs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from mc_kernels import GistPoolWeights
from mc_runtime.eval.focus import FULL, GISTS, ORACLE, WINDOW, Asking, FocusResult, FocusSetting, focus_regret
from mc_runtime.eval.focus_plot import draw_focus
from mc_runtime.eval.focus_report import found, gain, markdown, rank, recovery, rows, share, to_dict
from mc_runtime.eval.rivals import Rival
from mc_runtime.eval.rivals.random_tokens import RandomTokens
from mc_runtime.eval.selectors import AtRandom, ByAttention, ByBM25, ByHindsight, ByLensNet, ByRecency, Selector
from mc_runtime.focus.leaves import Leaves
from mc_runtime.focus.view import Floats
from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.ranks import spearman
from mc_runtime.train.lens_contexts import Scene
from mc_runtime.train.lens_labels import measured_labels
from mc_runtime.train.lens_samples import LensSample

K = 8
SETTING = FocusSetting(far=64, recent=16, targets=8, opened=2, n=3, batch=2)


class ByPlace:
    """Always the same blocks."""

    name = "place"

    def __init__(self, *blocks: int) -> None:
        self.blocks = blocks

    def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
        return np.isin(leaves.index, self.blocks).astype(np.float64)


def pools(model: LoadedModel) -> list[GistPoolWeights]:
    c = model.config
    return [GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim)]


def windows(seed: int = 0) -> torch.Tensor:
    return torch.randint(32, 120, (3, 88), generator=torch.Generator().manual_seed(seed))


def measured(
    model: LoadedModel,
    selectors: list[Selector],
    rivals: list[Rival] | None = None,
    setting: FocusSetting = SETTING,
    asking: Asking | None = None,
) -> FocusResult:
    result = FocusResult("noise")
    focus_regret(model, pools(model), result, windows(), selectors, rivals or [], setting, asking)
    return result


@pytest.fixture(scope="module")
def result(model: LoadedModel) -> FocusResult:
    lens = ByLensNet(LensNet.untrained(model.decoder), model, GistNet.untrained(model.decoder, K))
    selectors = [lens, ByRecency(), ByAttention(), ByBM25(), AtRandom(3), ByPlace(2, 5)]
    return measured(model, selectors, [RandomTokens()])


def test_every_arm_has_every_context(result: FocusResult) -> None:
    assert {FULL, WINDOW, GISTS, ORACLE, "LensNet", "recency", "attention mass", "BM25", "random", "place"} < set(
        result.nll
    )
    assert {len(values) for values in result.nll.values()} == {3}
    assert all(np.isfinite(values).all() for values in result.nll.values())
    assert all(result.found[ORACLE]), "the oracle opens the block that is worth most"


def test_opening_everything_is_one_choice(model: LoadedModel) -> None:
    """With room for all blocks every selector opens all of them."""
    setting = FocusSetting(far=64, recent=16, targets=8, opened=8, n=3, batch=3)
    result = measured(model, [ByRecency(), ByPlace(1)], setting=setting)
    np.testing.assert_allclose(result.nll["recency"], result.nll[ORACLE], atol=1e-5)
    np.testing.assert_allclose(result.nll["place"], result.nll[FULL], atol=1e-4)


def test_choices_do_not_depend_on_the_others(model: LoadedModel, result: FocusResult) -> None:
    alone = measured(model, [ByPlace(2, 5)])
    np.testing.assert_allclose(alone.nll["place"], result.nll["place"], atol=1e-5)


def test_a_question_looks_for_its_block(model: LoadedModel) -> None:
    asking = Asking((3, 4, 5), (2, 5, 6), ("a", "b", "c"))
    result = measured(model, [ByPlace(2, 5)], asking=asking)
    assert result.found["place"] == [True, True, False]


def test_recency_opens_the_newest(model: LoadedModel, result: FocusResult) -> None:
    newest = measured(model, [ByPlace(6, 7)])
    np.testing.assert_allclose(newest.nll["place"], result.nll["recency"], atol=1e-5)


def test_an_interruption_leaves_whole_contexts(model: LoadedModel, result: FocusResult) -> None:
    class Interrupting(ByPlace):
        def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
            if len(left.nll) and len(left.nll[GISTS]) == SETTING.batch:
                raise KeyboardInterrupt
            return super().scores(sample, leaves, scene, row)

    left = FocusResult("noise")
    with pytest.raises(KeyboardInterrupt):
        focus_regret(model, pools(model), left, windows(), [Interrupting(2, 5)], [RandomTokens()], SETTING)
    assert {len(values) for values in left.nll.values()} == {SETTING.batch}
    np.testing.assert_allclose(left.nll["place"], result.nll["place"][: SETTING.batch], atol=1e-5)
    assert len(left.rank["place"]) == len(left.found["place"]) == SETTING.batch


def test_figures(result: FocusResult, tmp_path: Path) -> None:
    nll = {name: np.array(values) for name, values in result.nll.items()}
    assert gain(result, "place").value == pytest.approx((nll[GISTS] - nll["place"]).mean())
    assert share(result, ORACLE).value == 1
    assert recovery(result, FULL).value == 1
    assert recovery(result, WINDOW).value == 0
    assert found(result, ORACLE).value == 1
    estimate = rank(result, "recency")
    assert estimate is not None
    assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert rank(result, "LensNet") is None, "an untrained net tells nothing apart"
    table = rows(result, SETTING, K)
    assert len(table) == len(result.nll)
    assert {row[2] for row in table if row[1] == "place"} == {str(8 + 2 * 7)}
    path = tmp_path / "focus.json"
    path.write_text(json.dumps(to_dict(result), allow_nan=False))
    written = json.loads(path.read_text())
    assert written["nll"]["place"] == result.nll["place"]
    table = markdown({"setting": asdict(SETTING), "model": "tiny", "texts": [written]})
    assert "| place | " in table
    assert f"gain {gain(result, 'place').value:.3f}" in table
    picture = draw_focus([result, result], tmp_path / "focus.png", "two texts")
    assert plt.imread(picture).std() > 0.05


def test_rank_correlation() -> None:
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 400])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1)
    # scipy.stats.spearmanr([1, 2, 2, 4], [1, 3, 2, 2]).statistic
    assert spearman(np.array([1.0, 2, 2, 4]), np.array([1.0, 3, 2, 2])) == pytest.approx(0.5, abs=1e-9)
    assert np.isnan(spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])))


def test_gists_are_weighed_as_the_setting_says(model: LoadedModel) -> None:
    plain, muted = (measured(model, [ByRecency()], setting=replace(SETTING, gist_bias=bias)) for bias in (0.0, -5.0))
    assert np.abs(np.subtract(plain.nll["gists alone"], muted.nll["gists alone"])).max() > 1e-4
    assert plain.nll["full context"] == muted.nll["full context"]


def test_hindsight_scores_by_what_would_have_helped_the_recent_tokens(model: LoadedModel) -> None:
    """As what an opening gains where the recent tokens, all but the first, are the ones to be predicted."""
    seen: list[tuple[Floats, Leaves, Scene, int]] = []

    class Spy(ByHindsight):
        def scores(self, sample: LensSample, leaves: Leaves, scene: Scene, row: int) -> Floats:
            seen.append((super().scores(sample, leaves, scene, row), leaves, scene, row))
            return seen[-1][0]

    measured(model, [Spy(decay=1e9)])
    assert len(seen) == SETTING.n
    for scores, leaves, scene, row in seen:
        earlier = replace(scene, ids=scene.ids[:, : scene.far + scene.recent], recent=1)
        gains = measured_labels(earlier, row, earlier.leaves(row))[:, 0]
        far = leaves.starts < scene.far
        legal = np.isfinite(gains[: far.sum()])
        np.testing.assert_allclose(scores[far][legal], gains[: far.sum()][legal], atol=1e-5)
        assert np.isinf(scores[~far]).all()
        assert np.ptp(scores[far][legal]) > 1e-5
