"""LensNet in the runtime: its inputs against a slow computation, its files, its policy."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from mc_runtime import Session
from mc_runtime.errors import InputError, ModelError
from mc_runtime.focus import LensNetPolicy, RetrievalPolicy, make_policy
from mc_runtime.focus.allocator import layout_entries
from mc_runtime.focus.features import FEATURES, FEATURES_HASH, lens_inputs
from mc_runtime.focus.lensnet import NEARLY
from mc_runtime.focus.view import FocusView
from mc_runtime.lensnet import LensNet
from mc_runtime.timeline import Entries

K = 8
WORDS = ("sea", "wind", "house", "keeper", "lamp", "night", "rain", "bread", "dog", "hill")
SIZES = {"width": 32, "n_heads": 2, "ffn_dim": 32, "head_dim": 16}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def session(model, tmp_path_factory):
    options = {"budget": 256, "block_size": K, "recent_tokens": 32, "ingest_chunk": 128, "ingest_window": 128}
    with Session.open(tmp_path_factory.mktemp("memory"), model, **options) as session:
        session.ingest(" ".join(np.random.default_rng(0).choice(WORDS, 1100)))
        yield session


def untrained(model, **sizes):
    return LensNet.untrained(model.decoder, **(SIZES | sizes))


def trained(model, seed=0):
    """A net as training might leave it."""
    net, generator = untrained(model), torch.Generator().manual_seed(seed)
    w = net.weights
    w = replace(w, head_out=torch.randn(w.head_out.shape, generator=generator), head_out_bias=torch.tensor([0.1, 0.2]))
    return LensNet(w, net.mu)


def view_of(session, seed=0, *, n_layers=3, query="the keeper of the lamp", mass=True, pending=0):
    """A random layout of the session's tree, with a random mass."""
    rng = np.random.default_rng(seed)
    context = copy.copy(session.context)
    context.pending = rng.integers(0, 200, pending).tolist()
    counts, expanded = context.counts, {}
    share = rng.random()
    for level in range(len(counts) - 1, 0, -1):
        top = level == len(counts) - 1
        parents = expanded.get(level + 1, np.zeros(0, np.int64))
        nodes = np.arange(counts[level])
        free = nodes // K >= counts[level + 1] if not top else np.ones(len(nodes), bool)
        nodes = nodes[(free | np.isin(nodes // K, parents)) & ((rng.random(len(nodes)) < share) | (nodes == 0))]
        expanded[level] = nodes
    context.entries = Entries(*layout_entries(K, counts, expanded), K)
    n = len(context.entries)
    values = rng.random((n_layers, n)) ** 6 * rng.choice([0.0, 1.0], (n_layers, n)) * rng.choice([0.0, 1.0, 1e4])
    return FocusView(context, expanded, query, values if mass else None, session.retrieval, session.context.length)


def slow_rows(view, pinned=()):
    """Per leaf in timeline order: (level, index, features by name, legal), in plain Python."""
    context, entries = view.context, view.context.entries
    tree, n, length = context.tree, len(entries), context.length
    scores = view.retrieval.scores(view.query) if view.query.strip() else np.zeros(1)
    ranges = [(0, tree.documents()[0].stop), (length - context.config.recent_tokens, length), *pinned]
    nodes = [(int(a), int(b)) for a, b in zip(entries.levels, entries.index, strict=True)]
    rows, rank = [], 0
    while rank < n:
        level, index = nodes[rank]
        slots = 1
        if level == 0:
            block = index // K
            slots = sum(1 for a, b in nodes[rank : rank + K] if a == 0 and b // K == block)
            if slots < K or block >= tree.count(1):
                rank += 1
                continue
            index = block
        rows.append((rank, slots, level, index))
        rank += slots

    totals = [math.fsum(layer) for layer in view.mass] if view.mass is not None else []

    def density(row, layer):
        rank, slots, _, _ = row
        own = math.fsum(view.mass[layer][rank : rank + slots])
        return own / slots * n / totals[layer] if totals[layer] > 0 else 0.0

    def log(x):
        return math.log(max(x, 1e-3)) / 2

    for i, row in enumerate(rows):
        rank, slots, level, index = row
        span = K ** max(level, 1)
        start, stop = index * span, (index + 1) * span
        best = max(float(scores[b]) if b < len(scores) else 0.0 for b in range(start // K, stop // K))
        f = dict.fromkeys(FEATURES, 0.0) | {
            "level_to_2_over_2": min(level, 2) / 2,
            "is_tokens": float(level == 0),
            "log_span_to_level_2_over_8": math.log(min(span, K**2)) / 8,
            "log_distance_over_8": math.log(1 + length - stop) / 8,
            "log_rank_distance_over_8": math.log(1 + n - rank - slots) / 8,
            "place": start / length,
            "is_first": float(start == 0),
        }
        if scores.max() > 0:
            f |= {
                "retrieval": best / scores.max(),
                "retrieval_sharp": (best / scores.max()) ** 4,
                "retrieval_sure": best / (best + 2),
                "has_retrieval": 1.0,
            }
        if view.mass is not None:
            layers = len(view.mass)
            own = [density(row, layer) for layer in range(layers)]
            f["has_mass"] = 1.0
            for g in range(6):
                part = own[math.floor(g * layers / 6) : math.ceil((g + 1) * layers / 6)]
                f[f"log_mass_{g + 1}_over_2"] = log(sum(part) / len(part))
            f["log_mass_top_over_2"] = log(max(own))
            near = [rows[max(i - 1, 0)], rows[min(i + 1, len(rows) - 1)]]
            near_mass = [sum(density(r, layer) for layer in range(layers)) / layers for r in near]
            f["log_mass_near_over_2"] = log(sum(near_mass) / 2)
            if level == 0:
                single = [(r, 1, 0, 0) for r in range(rank, rank + K)]
                tokens = [sum(density(t, layer) for layer in range(layers)) / layers for t in single]
                f["mass_peak"] = math.log(max(max(tokens) / max(sum(tokens) / K, 1e-3), 1.0)) / math.log(K)
        parent, above = (1, index) if level == 0 else (level + 1, index // K)
        first, last = above * K**parent, (above + 1) * K**parent
        free = all(last <= a or first >= b for a, b in ranges)
        yield level, index, f, (level > 0, above < tree.count(parent) and free)


@pytest.mark.parametrize("mass", [True, False])
@pytest.mark.parametrize(("seed", "query", "pending"), [(1, "keeper of the lamp", 0), (2, "", 21), (3, "zzz", 3)])
def test_inputs_agree_with_a_slow_computation(session, model, seed, query, pending, mass):
    view = view_of(session, seed, query=query, mass=mass, pending=pending, n_layers=7)
    pinned = [(300, 310)]
    inputs = lens_inputs(view, LensNet.untrained(model.decoder).mu, pinned=pinned)
    rows = list(slow_rows(view, pinned))
    assert len(rows) == len(inputs)
    assert {0, 1, 2} <= set(inputs.levels.tolist())
    for i, (level, index, features, legal) in enumerate(rows):
        assert (inputs.levels[i], inputs.index[i]) == (level, index)
        torch.testing.assert_close(
            inputs.features[i], torch.tensor([*features.values()], dtype=torch.float32), rtol=1e-5, atol=1e-6
        )
        assert tuple(inputs.legal[i].tolist()) == legal
        stored = session.tree.summaries(max(level, 1), index, index + 1)[0]
        assert torch.equal(inputs.entries[i], stored)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n_layers=st.integers(1, 33),
    mass=st.booleans(),
    pending=st.integers(0, 70),
    query=st.sampled_from(["", " ", "keeper", "wind and rain", "nothing of it: qqq"]),
)
def test_inputs_are_finite_and_of_order_one(session, model, seed, n_layers, mass, pending, query):
    view = view_of(session, seed, n_layers=n_layers, mass=mass, pending=pending, query=query)
    net = trained(model)
    inputs = lens_inputs(view, net.mu)
    n, width = len(inputs), model.config.embed_dim
    assert inputs.entries.shape == (n, width)
    assert inputs.features.shape == (n, len(FEATURES))
    assert inputs.features.dtype == torch.float32
    assert inputs.legal.shape == (n, 2)
    assert inputs.legal.dtype == torch.bool
    assert 1 <= inputs.queries.shape[0] <= 16
    assert inputs.queries.dtype == inputs.entries.dtype
    assert inputs.features.isfinite().all()
    assert inputs.queries.isfinite().all()
    assert inputs.features.abs().max() < 6
    assert not inputs.legal[inputs.levels == 0, 0].any()
    scores = net.score(*inputs.tensors())
    assert scores.shape == (n, 2)
    assert (scores[~inputs.legal] == 0).all()
    counts = view.context.counts
    utilities = LensNetPolicy(net).utilities(view)
    for level, (nodes, nats) in utilities.items():
        assert 1 <= level < len(counts)
        assert (np.diff(nodes) > 0).all()
        assert nodes.min() >= 0
        assert nodes.max() < counts[level]
        assert np.isfinite(nats).all()


def test_mass_counts_as_shares(session, model):
    """Neither the number of queries or heads nor a uniform change of one layer matters."""
    view, mu = view_of(session, 5), untrained(model).mu
    view = replace(view, mass=np.random.default_rng(0).random(view.mass.shape))
    scaled = replace(view, mass=view.mass * [[9.0], [576.0], [1e-3]])
    torch.testing.assert_close(lens_inputs(scaled, mu).features, lens_inputs(view, mu).features)
    even = lens_inputs(replace(view, mass=np.ones_like(view.mass)), mu).features
    columns = [i for i, name in enumerate(FEATURES) if name.startswith("log_mass") or name == "mass_peak"]
    assert even[:, columns].abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 5), (0,), (4,)])
def test_mass_of_another_context_is_refused(session, model, shape):
    view = replace(view_of(session), mass=np.ones(shape))
    with pytest.raises(ValueError, match="mass: expected"):
        lens_inputs(view, untrained(model).mu)


def test_a_context_without_leaves_has_no_utilities(session, model):
    context = copy.copy(session.context)
    context.entries = Entries(np.zeros(0, np.int8), np.zeros(0, np.int64), K)
    view = FocusView(context, {}, "keeper", None, session.retrieval, session.context.length)
    assert lens_inputs(view, untrained(model).mu).features.shape == (0, len(FEATURES))
    assert LensNetPolicy(trained(model)).utilities(view) == {}


def test_untrained_scores_are_zero(session, model):
    inputs = lens_inputs(view_of(session), untrained(model).mu)
    net = LensNet.untrained(model.decoder)
    assert (net.score(*inputs.tensors()) == 0).all()
    assert all((nats == 0).all() for _, nats in LensNetPolicy(net).utilities(view_of(session)).values())


def test_scores_of_a_trained_net_differ_between_leaves(session, model):
    inputs = lens_inputs(view_of(session), untrained(model).mu)
    expand = trained(model).score(*inputs.tensors())[inputs.legal[:, 0], 0]
    assert expand.std() > 1e-3


def test_gradient_flows_from_scores_to_every_weight(session, model):
    inputs = lens_inputs(view_of(session), untrained(model).mu)
    tensors = [x.detach().clone().requires_grad_() for x in trained(model).weights.tensors()]
    net = LensNet(trained(model).weights.with_tensors(*tensors), untrained(model).mu)
    net.score(*inputs.tensors()).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in tensors)


class Fixed(LensNetPolicy):
    """Scores that are known for every node: `gain` of nodes, a tenth of their number to collapse."""

    def __init__(self, gain):
        self.gain, self.seen = gain, []
        self.nearly = NEARLY
        self.net = type("Net", (), {"mu": torch.zeros(32)})

    def _scores(self, inputs):
        self.seen.append(inputs)
        gains = [self.gain(int(a), int(b)) for a, b in zip(inputs.levels, inputs.index, strict=True)]
        both = np.stack((gains, np.arange(1.0, len(inputs) + 1) / 10), axis=1)
        return np.where(inputs.legal.numpy(), both, 0.0)


def test_policy_sums_collapse_costs_of_siblings(session, model):
    view = view_of(session, 11, mass=False)
    utilities = Fixed(lambda level, index: index + 1.0 if level == 1 else 0.0).utilities(view)
    expected: dict[tuple[int, int], float] = {}
    for number, (level, index, _, (_, collapse)) in enumerate(slow_rows(view), start=1):
        if level == 1:
            expected[level, index] = expected.get((level, index), 0.0) + index + 1
        if collapse:
            parent = (1, index) if level == 0 else (level + 1, index // K)
            expected[parent] = expected.get(parent, 0.0) + number / 10
    got = {(level, int(i)): x for level, pair in utilities.items() for i, x in zip(*pair, strict=True)}
    assert got == pytest.approx(expected)
    opened = {(level, int(i)) for level, nodes in view.expanded.items() for i in nodes}
    assert any(node in opened for node in got)
    assert any(node not in opened for node in got)


def coarsest(session):
    context = copy.copy(session.context)
    context.pending = []
    expanded = {level: np.zeros(0, np.int64) for level in range(1, len(context.counts))}
    context.entries = Entries(*layout_entries(K, context.counts, expanded), K)
    mass = np.random.default_rng(3).random((3, len(context.entries)))
    return FocusView(context, expanded, "keeper", mass, session.retrieval, session.context.length)


@pytest.mark.parametrize("block", [0, 3, 71, K**2 + K + 1])
def test_policy_finds_a_block_under_several_levels(session, model, block):
    view = coarsest(session)
    assert view.context.entries.levels[0] >= 3, "the block lies three levels deep"
    policy = Fixed(lambda level, index: 1.0 if index == block // K ** (level - 1) else -0.01)
    utilities = policy.utilities(view)
    level, nats = utilities[1]
    assert nats[level == block] == 1.0
    assert (nats[level != block] < 0.02).all()
    assert set(utilities) == {1}, "a gist above level 1 has no utility of its own"
    assert len(policy.seen) == view.context.entries.levels[0]
    # Along the way the mass of what the model attended to stays known, that of what is thought of is not.
    known = FEATURES.index("has_mass")
    held = set(zip(view.context.entries.levels.tolist(), view.context.entries.index.tolist(), strict=True))
    for inputs in policy.seen:
        of = zip(inputs.levels.tolist(), inputs.index.tolist(), inputs.features[:, known].tolist(), strict=True)
        assert all(((level, index) in held) == bool(has) for level, index, has in of if level > 0)


def test_a_question_opens_what_promises_nearly_as_much_as_the_best(session, model):
    view = coarsest(session)

    def promise(level, index):
        return {0: 1.0, 1: 0.31, 2: 0.29}.get(index // K ** (level - 1) if level > 1 else index, -0.01)

    opened = {}
    for asked in (False, True):
        level, nats = Fixed(promise).utilities(replace(view, asked=asked))[1]
        opened[asked] = level[nats >= 0.02].tolist()
    assert opened == {False: [0, 1, 2], True: [0, 1]}
    strict = Fixed(promise)
    strict.nearly = 0.5
    level, nats = strict.utilities(replace(view, asked=True))[1]
    assert level[nats >= 0.02].tolist() == [0]


def test_a_turn_under_way_is_seen(session, model):
    view, column = view_of(session, 2), FEATURES.index("asked")
    for asked in (False, True):
        inputs = lens_inputs(replace(view, asked=asked), untrained(model).mu)
        assert (inputs.features[:, column] == float(asked)).all()


def test_policy_looks_into_nothing_without_promise(session, model):
    policy = Fixed(lambda level, index: 0.0)
    utilities = policy.utilities(coarsest(session))
    assert len(policy.seen) == 1
    assert set(utilities) <= {1}


class FixedScores(LensNet):
    """A net that says 1, 2, 3, ... per leaf to expand, and a tenth of it to collapse."""

    def score(self, entries, features, queries, legal):
        expand = torch.arange(1.0, len(entries) + 1)
        return torch.where(legal, torch.stack((expand, expand / 10), 1), torch.zeros(1))


def test_scores_of_a_broken_net_stay_finite(session, model):
    class Broken(FixedScores):
        def score(self, *args):
            scores = super().score(*args)
            scores[0], scores[1], scores[2] = math.inf, math.nan, -math.inf
            return scores

    base = untrained(model)
    utilities = LensNetPolicy(Broken(base.weights, base.mu)).utilities(view_of(session))
    assert all(np.isfinite(nats).all() for _, nats in utilities.values())


# -- files


def test_save_and_load_round_trip(session, model, tmp_path):
    net = trained(model)
    net.save(tmp_path / "lens.safetensors")
    again = LensNet.load(tmp_path / "lens.safetensors", model.decoder)
    assert again.fingerprint == net.fingerprint != trained(model, seed=1).fingerprint
    inputs = lens_inputs(view_of(session), net.mu)
    assert torch.equal(again.score(*inputs.tensors()), net.score(*inputs.tensors()))
    assert torch.equal(again.mu, net.mu)


def saved(model, path, metadata=None, **tensors):
    trained(model).save(path)
    state = load_file(path) | {f"lens/{name}": x for name, x in tensors.items()}
    full = {"lens/features": FEATURES_HASH, "lens/n_heads": "2"} | (metadata or {})
    save_file(state, path, {key: value for key, value in full.items() if value})
    return path


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"lens/features": "0123456789abcdef"}, {}, "trained for other features"),
        ({"lens/features": ""}, {}, "does not name the features"),
        ({"lens/n_heads": ""}, {}, "n_heads"),
        ({"lens/n_heads": "two"}, {}, "not LensNet weights"),
        ({"lens/n_heads": "5"}, {}, "n_heads"),
        ({}, {"extra": torch.zeros(1)}, "expected the entries"),
        ({}, {"head_out": torch.zeros(3, 16)}, "head_out"),
        ({}, {"head_bias": torch.full((16,), math.nan)}, "head_bias: expected finite"),
        ({}, {"head_in": torch.zeros(16, 32)}, "features"),
    ],
)
def test_files_that_do_not_fit_are_refused(model, tmp_path, metadata, tensors, message):
    path = saved(model, tmp_path / "lens.safetensors", metadata, **tensors)
    with pytest.raises(ModelError, match=message):
        LensNet.load(path, model.decoder)


def test_weights_of_another_model_are_refused(model, tmp_path):
    path = saved(model, tmp_path / "lens.safetensors")
    wider = type(model.decoder).random(replace(model.config, embed_dim=48))
    with pytest.raises(ModelError, match="embeddings of width 48, the file has 32"):
        LensNet.load(path, wider)


def test_files_that_are_no_safetensors_are_refused(model, tmp_path):
    torch.save({"w_in": torch.zeros(2)}, tmp_path / "lens.pt")
    for path in (tmp_path / "lens.pt", tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(ModelError, match="not a readable safetensors file"):
            LensNet.load(path, model.decoder)
    with pytest.raises(ModelError, match="could not be written"):
        trained(model).save(tmp_path / "no" / "such" / "lens.safetensors")


# -- sessions

OPTIONS = {"budget": 192, "block_size": K, "recent_tokens": 32, "ingest_chunk": 128, "ingest_window": 128}


@pytest.mark.parametrize("policy", ["lensnet", "lensnet+retrieval", LensNetPolicy])
def test_a_session_generates_with_lensnet(model, tmp_path, monkeypatch, policy):
    trained(model).save(tmp_path / "lens.safetensors")
    seen: list[tuple[torch.Tensor, ...]] = []
    score = LensNet.score
    monkeypatch.setattr(LensNet, "score", lambda self, *tensors: seen.append(tensors) or score(self, *tensors))
    how = {"policy": policy, "lensnet": tmp_path / "lens.safetensors"}
    if policy is LensNetPolicy:
        how = {"policy": LensNetPolicy(trained(model))}
    with Session.open(tmp_path / "memory", model, **OPTIONS, **how) as session:
        session.ingest(" ".join(np.random.default_rng(0).choice(WORDS, 500)))
        session.generate("Who keeps the lamp?", max_new_tokens=20)
        turn = session.stats().turns[-1]
        assert session.context.used <= 192
        assert len(seen) >= len(turn.refocus) >= 1
        assert seen[0][1][:, FEATURES.index("has_mass")].all(), "what the model has attended to has a mass"
        assert turn.edits > 0
        assert len(session.generate(["Who?", "And where is the dog?"], max_new_tokens=12)) == 2
        session.focus_on("bread and rain")
        session.pin((200, 216))
        assert not seen[-1][1][:, FEATURES.index("has_mass")].any()


def test_lensnet_with_retrieval_adds_both(session, model):
    net, view = trained(model), view_of(session, 3)
    policy = make_policy("lensnet+retrieval", net)
    assert policy.needs_mass
    words, scores = RetrievalPolicy().utilities(view), LensNetPolicy(net).utilities(view)
    assert len(words[1][0])
    assert len(scores[1][0])
    expected: dict[tuple[int, int], float] = {}
    for part in (words, scores):
        for level, (nodes, nats) in part.items():
            for node, value in zip(nodes.tolist(), nats.tolist(), strict=True):
                expected[level, node] = expected.get((level, node), 0.0) + value
    got = {(level, int(i)): x for level, pair in policy.utilities(view).items() for i, x in zip(*pair, strict=True)}
    assert got == pytest.approx(expected)


def test_half_precision_files_are_read_as_fp32(model, tmp_path):
    net = trained(model)
    net.save(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    net.save(tmp_path / "whole.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "whole.safetensors").stat().st_size
    loaded = LensNet.load(tmp_path / "half.safetensors", model.decoder)
    for a, b in zip(loaded.weights.tensors(), net.weights.tensors(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_lensnet_needs_weights_and_weights_need_lensnet(model, tmp_path):
    with pytest.raises(InputError, match="the package has no weights for this model; give lensnet="):
        Session.open(tmp_path / "memory", model, policy="lensnet", **OPTIONS)
    with pytest.raises(InputError, match="lensnet needs trained weights"):
        make_policy("lensnet")
    with pytest.raises(InputError, match="the package has no weights for this model"):
        Session.open(tmp_path / "memory", model, policy="lensnet+retrieval", **OPTIONS)
    with pytest.raises(InputError, match=r'weights serve policy="lensnet" or "lensnet\+retrieval" alone'):
        Session.open(tmp_path / "memory", model, lensnet=tmp_path / "lens.safetensors", **OPTIONS)
    with pytest.raises(InputError, match=r"lensnet, lensnet\+retrieval, got 'nosuch'"):
        Session.open(tmp_path / "memory", model, policy="nosuch", **OPTIONS)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        Session.open(tmp_path / "memory", model, policy="lensnet", lensnet=tmp_path / "no.safetensors", **OPTIONS)
    assert not (tmp_path / "memory").exists()
