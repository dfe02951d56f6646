"""Live llama.cpp without flash attention, which stores V transposed: K and V of a saved state are spliced where they
lie, as docs/engines/llama_cpp.md says, and llama.cpp goes on from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from test_llama_cpp_state import (
    LENGTH,
    MISSING,
    ROPE,
    SAME,
    START,
    THETA,
    Halves,
    K,
    Sequence0,
    by_head,
    distance,
    divergence,
    model_file,
)

from bench.peers import llama_cpp as peer
from mc_kernels import array
from mc_kernels.rope import apply_rope

pytestmark = [pytest.mark.llama_cpp, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@dataclass
class Columns:
    """A saved sequence: positions [n], keys (rotated there) [L, n, H, D] and values [L, H * D, n]."""

    positions: npt.NDArray[np.int32]
    k: Halves
    v: Halves


class Transposed(Sequence0):
    """A sequence of a context without flash attention."""

    def __init__(self, model: peer.Model) -> None:
        super().__init__(model, flash_attention=False)

    def _columns(self, n: int) -> np.dtype[np.void]:
        columns = ("columns", np.float16, (self.heads * self.dim, n))
        return np.dtype([("type", np.int32), ("element_bytes", np.uint32), ("height", np.uint32), columns])

    def columns(self) -> Columns:
        raw = np.empty(self.lib.llama_state_seq_get_size(self.pointer, 0), np.uint8)
        assert self.lib.llama_state_seq_get_data(self.pointer, peer._pointer(raw), raw.size, 0) == raw.size
        n = int(raw[12:16].view(np.uint32)[0])
        end = 16 + 4 * peer.PER_CELL * n
        positions = raw[16:end].view(np.int32)[:: peer.PER_CELL].copy()
        assert raw[end : end + 8].view(np.uint32).tolist() == [1, self.layers]
        middle = end + 8 + self.layers * self._rows(n).itemsize
        k, v = raw[end + 8 : middle].view(self._rows(n)), raw[middle:].view(self._columns(n))
        assert set(v["element_bytes"]) == {2}
        assert set(v["height"]) == {self.heads * self.dim}
        return Columns(positions, k["rows"].copy(), v["columns"].copy())

    def put_columns(self, state: Columns) -> None:
        n, layers = len(state.positions), self.layers
        cells = np.zeros((n, peer.PER_CELL), np.int32)
        cells[:, 0], cells[:, 1] = state.positions, 1
        k, v = np.zeros(layers, self._rows(n)), np.zeros(layers, self._columns(n))
        k["type"], k["row_bytes"], k["rows"] = self.cell_type, 2 * self.heads * self.dim, state.k
        v["type"], v["element_bytes"], v["height"] = self.cell_type, 2, self.heads * self.dim
        v["columns"] = state.v
        head = np.array([peer.STATE_MAGIC, 0, 1, n], np.uint32), cells, np.array([1, layers], np.uint32), k, v
        raw = np.frombuffer(b"".join(x.tobytes() for x in head), np.uint8).copy()
        assert self.lib.llama_state_seq_set_data(self.pointer, peer._pointer(raw), raw.size, 0) == raw.size, (
            self.log.last
        )


def spliced(state: Columns, edit: array.Edit, k_new: Halves, v_new: Halves) -> Columns:
    """The state after an edit; k_new [L, H, M, D], keys unrotated, v_new [L, H * D, M]."""
    before = len(state.positions)
    capacity = before + max(edit.insert - edit.remove, 0)
    plan = array.SplicePlan.from_edits(before, [edit], capacity=capacity)
    k = np.pad(state.k, ((0, 0), (0, capacity - before), (0, 0), (0, 0)))
    v = np.pad(state.v, ((0, 0), (0, 0), (0, capacity - before)))
    rope = array.RopeSpec.from_theta(THETA, k.shape[3], interleaved=True)
    array.kv_splice_(by_head(k), by_head(np.empty_like(k)), k_new, k_new, plan, rope)
    half = v.shape[1] // 2
    array.kv_splice_(*(x[:, part, :, None] for x in (v, v_new) for part in (slice(half), slice(half, None))), plan)
    after = plan.new_length
    return Columns(np.arange(after, dtype=np.int32), k[:, :after].copy(), v[:, :, :after].copy())


@pytest.fixture(scope="module")
def model() -> peer.Model:
    path = model_file()
    assert path is not None
    return peer.Model(path)


@pytest.fixture(scope="module")
def state(model: peer.Model) -> Columns:
    context = Transposed(model)
    context.read()
    return context.columns()


def test_a_removal_is_what_llama_cpp_does_itself(model: peer.Model, state: Columns) -> None:
    ours, own = Transposed(model), Transposed(model)
    no_k = np.zeros((ours.layers, ours.heads, 0, ours.dim), np.float16)
    no_v = np.zeros((ours.layers, ours.heads * ours.dim, 0), np.float16)
    ours.put_columns(spliced(state, array.Edit(START, K, 0), no_k, no_v))
    got, logits = ours.columns(), ours.next(42)
    own.put_columns(state)
    assert own.lib.llama_memory_seq_rm(own.memory, 0, START, START + K)
    own.lib.llama_memory_seq_add(own.memory, 0, START + K, -1, -K)
    own_logits = own.next(42)  # applies the shift
    theirs = own.columns()
    order = np.argsort(theirs.positions)[: LENGTH - K]  # a freed cell takes the new token
    assert got.positions.tolist() == theirs.positions[order].tolist() == list(range(LENGTH - K))
    assert np.array_equal(theirs.v[:, :, order], got.v)
    largest = float(np.abs(got.k.astype(np.float32)).max())
    assert distance(theirs.k[:, order], got.k) <= 2 * 2**-11 * largest  # one rounding to f16 each
    assert divergence(own_logits, logits) < SAME


def test_a_collapse_and_back(model: peer.Model, state: Columns) -> None:
    context, block = Transposed(model), slice(START, START + K)
    at = torch.arange(START, START + K)
    raw = apply_rope(torch.from_numpy(by_head(state.k[:, block]).astype(np.float64)), -at, ROPE)
    k_raw, v_raw = raw.numpy().astype(np.float16), state.v[:, :, block].copy()
    gists = raw.mean(2, keepdim=True).numpy().astype(np.float16), v_raw.mean(2, keepdims=True)
    small = spliced(state, array.Edit(START, K, 1), *gists)
    assert np.array_equal(small.v, np.concatenate((state.v[..., :START], gists[1], state.v[..., START + K :]), 2))
    context.put_columns(state)
    logits = context.next(42)
    context.put_columns(small)
    shorter = context.next(42)
    assert context.columns().positions.tolist() == list(range(LENGTH - K + 2))
    assert divergence(logits, shorter) > SAME  # something was compressed
    back = spliced(small, array.Edit(START, 1, K), k_raw, v_raw)
    assert np.array_equal(back.v, state.v)
    assert distance(back.k, state.k) <= 3 * 2**-11 * float(np.abs(state.k.astype(np.float32)).max())
    context.put_columns(back)
    assert divergence(logits, context.next(42)) < SAME
