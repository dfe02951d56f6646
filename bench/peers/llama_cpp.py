"""llama.cpp's K-shift: what it has where entries leave or enter the middle of a cache of rotated keys.

`llama_memory_seq_rm` and `llama_memory_seq_add` mark cells; the next `llama_decode` rotates the keys of every cell of
every layer by the cell's shift, 0 too. Values, order and holes stay as they are, and nothing inserts given keys.

A synthetic model has the case's layers, KV heads and head dimension and is tiny otherwise; `llama_state_seq_set_data`
fills its cache with the case's own entries. `llama_decode` applies what is pending before it looks for free cells, so a
batch for which there is no room returns having done the shift and nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import math
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mc_kernels.rope import RopeSpec, apply_rope

from ..machine import instruction_sets
from ..workloads import Candidate, Check, Workload
from ..workloads.base import error_rule
from ..workloads.kv_splice import plain_rotate

NAME = "llama.cpp"
CELL_PADDING = 256  # llama.cpp rounds a context up to a multiple
NO_ROOM = 1  # llama_decode's status
LOG_ERROR = 4
ARCHITECTURE = "llama"  # Llama and SmolLM2; rotates interleaved pairs, which ggml does faster than split halves
EMBEDDING, VOCABULARY = 32, 32

# A saved sequence: magic, sequence id, streams, cells n; for each cell its position, 1, sequence id; whether values are
# transposed, layers; then the keys of each layer, and the values of each (`KeyCache._layer`).
STATE_MAGIC = 0xAF143CD8
PER_CELL = 3


def missing(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "built for the CPU"
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its shared library does not load
        return f"package llama-cpp-python: {error}"
    return None


class _Log:
    """llama.cpp's messages: errors are kept for the exception that follows, all else is dropped."""

    def __init__(self, lib: Any) -> None:
        self.last = ""
        self.callback = lib.llama_log_callback(self.receive)  # llama.cpp holds a pointer to it from here on
        lib.llama_log_set(self.callback, None)

    def receive(self, level: int, text: bytes, _: object) -> None:
        if level == LOG_ERROR:
            self.last = text.decode(errors="replace").strip()


@functools.cache
def library() -> tuple[Any, _Log]:
    """llama-cpp-python, its C functions ready to be called."""
    import llama_cpp

    log = _Log(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp, log


class Model:
    """A loaded GGUF file. Freed with the last reference to it, as is a `Context`."""

    def __init__(self, path: Path) -> None:
        lib, log = library()
        params = lib.llama_model_default_params()
        # Weights in its own order for matrix tiles: its products with them end in a segmentation fault (0.3.36, Q4_1).
        params.use_extra_bufts = "amx_bf16" not in instruction_sets()
        self.pointer = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp cannot load {path}: {log.last}")
        weakref.finalize(self, lib.llama_model_free, self.pointer)


class Context:
    """A cache of `n_ctx` cells, rounded up, and the buffers to decode with; sequence 0 is the only one."""

    def __init__(
        self, model: Model, n_ctx: int, *, n_threads: int, n_batch: int = 512, dtype: torch.dtype = torch.float16,
        flash_attention: bool = True,
    ) -> None:  # fmt: skip
        self.lib, self.log = library()
        self.model, self.dtype = model, dtype  # the model must outlive its context
        self.cell_type = self.lib.GGML_TYPE_F32 if dtype == torch.float32 else self.lib.GGML_TYPE_F16
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, 1
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = self.cell_type
        params.flash_attn_type = int(flash_attention)
        self.pointer = self.lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp cannot make a context of {n_ctx} cells: {self.log.last}")
        weakref.finalize(self, self.lib.llama_free, self.pointer)
        self.memory = self.lib.llama_get_memory(self.pointer)

    def decode(self, tokens: Sequence[int]) -> int:
        """Append tokens; the logits of the last are kept. Returns the status, 0 if all went well."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        return int(self.lib.llama_decode(self.pointer, self.lib.llama_batch_get_one(array, len(tokens))))


class KeyCache(Context):
    """A cache that holds given keys and values at positions 0, 1, ..., to be shifted.

    k, v [L, n, H, D], stored in `dtype`. capacity: cells in use at most. removable: how many of the n entries may be
    gone when a shift is applied.
    """

    def __init__(
        self, model: Model, k: Tensor, v: Tensor, dtype: torch.dtype, *, capacity: int, removable: int, n_threads: int
    ) -> None:
        _, n, heads, dim = k.shape
        cells = padded(capacity)  # said in advance: llama.cpp cuts n_batch before it rounds
        too_many = cells - n + removable + 1  # tokens: one more than there will ever be free cells
        if not removable < n <= capacity:
            raise ValueError(f"k: expected {removable + 1} to {capacity} entries, got {n}")  # llama.cpp would abort
        super().__init__(model, cells, n_threads=n_threads, n_batch=too_many, dtype=dtype)
        self.row = heads, dim
        self._fill(k, v)
        self._tokens = (ctypes.c_int32 * too_many)()
        self._no_room = self.lib.llama_batch_get_one(self._tokens, too_many)

    def _layer(self, n: int) -> np.dtype[np.void]:
        """A layer of a saved state: its keys or its values."""
        number = np.float32 if self.dtype == torch.float32 else np.float16
        return np.dtype([("type", np.int32), ("row_bytes", np.uint64), ("rows", number, (n, *self.row))])

    def _fill(self, k: Tensor, v: Tensor) -> None:
        layers, n = k.shape[:2]
        cells = np.zeros((n, PER_CELL), np.int32)
        cells[:, 0], cells[:, 1] = np.arange(n), 1
        head = np.array([STATE_MAGIC, 0, 1, n], np.uint32).tobytes() + cells.tobytes()
        head += np.array([0, layers], np.uint32).tobytes()
        layer = self._layer(n)
        state = np.empty(len(head) + 2 * layers * layer.itemsize, np.uint8)
        state[: len(head)] = np.frombuffer(head, np.uint8)
        body = state[len(head) :].view(layer)
        body["type"], body["row_bytes"] = self.cell_type, math.prod(self.row) * self.dtype.itemsize
        for rows, x in zip(body["rows"], (*k, *v), strict=True):
            torch.from_numpy(rows).copy_(x)
        if self.lib.llama_state_seq_set_data(self.pointer, _pointer(state), state.size, 0) != state.size:
            raise RuntimeError(f"llama.cpp does not take the cache's content: {self.log.last}")

    def keys(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Positions [n] and keys [len(layers), n, H, D] of the cells in use, in the cells' order."""
        state = np.empty(self.lib.llama_state_seq_get_size(self.pointer, 0), np.uint8)
        if self.lib.llama_state_seq_get_data(self.pointer, _pointer(state), state.size, 0) != state.size:
            raise RuntimeError(f"llama.cpp does not give the cache's content: {self.log.last}")
        n = int(state[12:16].view(np.uint32)[0])
        end = 16 + 4 * PER_CELL * n
        positions = state[16:end].view(np.int32)[::PER_CELL].astype(np.int64)
        rows = state[end + 8 :].view(self._layer(n))["rows"]
        return torch.from_numpy(positions), torch.from_numpy(rows[list(layers)])

    def remove(self, begin: int, end: int) -> None:
        """Forget the entries at positions [begin, end)."""
        self.lib.llama_memory_seq_rm(self.memory, 0, begin, end)

    def shift(self, begin: int, by: int) -> None:
        """Mark the entries from position `begin` on to be moved by `by` positions."""
        self.lib.llama_memory_seq_add(self.memory, 0, begin, -1, by)

    def apply(self) -> None:
        """Rotate all keys by what is pending."""
        status = self.lib.llama_decode(self.pointer, self._no_room)
        if status != NO_ROOM:
            raise RuntimeError(f"llama_decode: expected status {NO_ROOM} (no room), got {status}: {self.log.last}")


def _pointer(state: npt.NDArray[np.uint8]) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def padded(cells: int) -> int:
    return -(-cells // CELL_PADDING) * CELL_PADDING


def cell_dtype(dtype: torch.dtype) -> torch.dtype:
    """How the cache is stored: ggml's rope on a CPU takes f32 and f16 and aborts the process on bf16. It converts f16
    one number at a time, so an f32 cache, twice as large, would be shifted faster."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def bytes_touched(case: Any, dtype: torch.dtype) -> int:
    """What a K-shift reads and writes: the keys of all cells, whether in use or not."""
    return 2 * int(case.layers * case.kv_heads * case.head_dim * padded(case.capacity) * cell_dtype(dtype).itemsize)


def write_model(path: Path, layers: int, kv_heads: int, head_dim: int, theta: float) -> None:
    """A GGUF file with random weights whose cache has the given shape and whose forward costs next to nothing."""
    from gguf import GGUFWriter

    out = GGUFWriter(path, ARCHITECTURE)
    out.add_tokenizer_model("no_vocab")
    out.add_vocab_size(VOCABULARY)
    out.add_context_length(1 << 20)
    out.add_block_count(layers)
    out.add_embedding_length(EMBEDDING)
    out.add_feed_forward_length(EMBEDDING)
    out.add_head_count(kv_heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_rope_dimension_count(head_dim)
    out.add_rope_freq_base(theta)
    out.add_layer_norm_rms_eps(1e-5)
    width, generator = kv_heads * head_dim, np.random.default_rng(0)
    block = {
        "attn_norm": (EMBEDDING,), "ffn_norm": (EMBEDDING,), "attn_output": (EMBEDDING, width),
        "attn_q": (width, EMBEDDING), "attn_k": (width, EMBEDDING), "attn_v": (width, EMBEDDING),
        "ffn_gate": (EMBEDDING, EMBEDDING), "ffn_up": (EMBEDDING, EMBEDDING), "ffn_down": (EMBEDDING, EMBEDDING),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, EMBEDDING), "output_norm": (EMBEDDING,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    for name, shape in shapes.items():
        out.add_tensor(f"{name}.weight", generator.standard_normal(shape, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def synthetic_model(layers: int, kv_heads: int, head_dim: int, theta: float) -> Model:
    with tempfile.TemporaryDirectory(prefix="kshift-") as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, layers, kv_heads, head_dim, theta)
        return Model(path)


class Shift:
    """A case's edit on a cache that holds the case's entries: the first call removes and shifts, the next shifts back,
    and so on, so that every call rotates as many keys."""

    def __init__(self, model: Model, case: Any, inputs: dict[str, Any]) -> None:
        self.case = case
        self.start, self.removed, self.inserted = (int(x) for x in case.plan.edits[0])
        self.shifted = False
        k, v = (inputs[x][:, 0, :, : case.length].transpose(1, 2) for x in ("k", "v"))
        self.cache = KeyCache(
            model, k, v, cell_dtype(k.dtype), capacity=case.capacity, removable=self.removed,
            n_threads=torch.get_num_threads(),
        )  # fmt: skip

    def run(self) -> None:
        by = self.inserted - self.removed
        if self.shifted:
            self.cache.shift(self.start + self.inserted, -by)
        else:
            self.cache.remove(self.start, self.start + self.removed)
            self.cache.shift(self.start + self.removed, by)
        self.cache.apply()
        self.shifted = not self.shifted

    def verify(self) -> Check:
        """Run once: positions and keys of the first and the last layer must be those of the edit."""
        layers = [0, self.case.layers - 1]
        positions, before = self.cache.keys(layers)
        self.run()
        new_positions, after = self.cache.keys(layers)
        kept = (positions < self.start) | (positions >= self.start + self.removed)
        shifts = torch.where(positions < self.start, 0, self.inserted - self.removed)[kept]
        if not torch.equal(new_positions, positions[kept] + shifts):
            return Check(math.inf, 0.0)
        rope = RopeSpec.from_theta(self.case.theta, self.case.head_dim, interleaved=True)
        return judge(before[:, kept], after, shifts, rope)


def judge(before: Tensor, after: Tensor, shifts: Tensor, rope: RopeSpec) -> Check:
    """Keys [L, n, H, D] that were rotated by shifts [n], against fp64 and by the error rule of their own dtype."""
    x, y = before.transpose(1, 2), after.transpose(1, 2)
    return error_rule([y], [apply_rope(x.double(), shifts, rope)], [plain_rotate(x, shifts, rope)])


def offers(workload: Workload) -> list[Candidate]:
    case = workload.case
    one_edit = workload.op == "kv_splice_" and case.edits == 1 and case.batch == 1
    if not (one_edit and case.rope and case.discipline == "ordered"):
        return []
    model = functools.cache(lambda: synthetic_model(case.layers, case.kv_heads, case.head_dim, case.theta))
    stored = str(cell_dtype(workload.dtype)).removeprefix("torch.")
    note = (
        f"rotates all keys in place ({bytes_touched(case, workload.dtype) / 1e6:.0f} MB of {stored} read and written); "
        "moves nothing, inserts nothing"
    )
    return [
        Candidate(NAME, Shift.run, lambda x: Shift(model(), case, x), note=note, same_work=False, verify=Shift.verify)
    ]
