"""Which backend serves an op on a GPU where several can: the one that was measured faster there, op by op and shape by
shape.

`preference.json` beside this file is written by `python bench/gpu_check.py --write-preference` from what it measured.
For each key it has the seconds that the device takes for a call by each backend that gave a right result, and those
that the host takes to issue it:

    seconds[op][dtype][bucket][backend] = {"device": 3.1e-5, "host": 1.2e-5}

A program that issues call after call waits for the slower of the two, which is what counts; a CUDA graph is replayed
without that host code, so under `for_graphs` the device's alone does. Without "host" the device's are all that a call
takes.

dtype is that of the op's first tensor ("bfloat16"). A bucket names the kind of call and its sizes, most of them rounded
down to a power of four (`4096+`: 4,096 to 16,383); `BUCKETS` says what counts for each op. A call whose key is there is
served by the backends in the order of these seconds, any other in the registry's fallback order (its `PREFERENCE`). As
long as nothing has been measured, `measured` is null, there are no seconds, and all calls are of the latter kind.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("preference.json")
# What the file says of itself: JSON has no comments.
ABOUT = (
    "Which backend serves each op on CUDA tensors: seconds of a public call on the device and on the host, by op,"
    " dtype, bucket of shapes and backend; the one whose slower part is fastest serves, in CUDA graphs the one that is"
    " fastest on the device. mc_kernels/preference.py says what the keys mean."
    " Written by `python bench/gpu_check.py --write-preference`. Where `measured` is null nothing has been measured"
    " yet, and every call is served in the registry's fallback order: Triton, CUDA C++, the oracle."
)
BACKENDS = ("triton", "cuda")
Key = tuple[str, str, str]


def at_least(size: int) -> str:
    """The bucket of a size: the power of four at or below it, "0" for none."""
    return "0" if size < 1 else f"{1 << ((size.bit_length() - 1) & ~1)}+"


def _kv_splice(
    k: Any, v: Any, k_new: Any, v_new: Any, table: Any, rows: Any, ordered: bool, segments: Any, stays: Any,
    insert_slots: Any, offsets: Any, positions: Any, new_positions: Any, inv_freq: Any, *_: object,
) -> str:  # fmt: skip
    """Discipline, rotation and paging; vectors: keys that are written, of all rows and heads."""
    entries = insert_slots.shape[0] + int(segments.numpy()[:, 2].sum())
    entries += 0 if inv_freq is None else int(stays.numpy()[:, 2].sum())
    vectors = k_new.shape[0] * k_new.shape[1] * entries // max(1, offsets.shape[0] - 1)
    kind = "ordered" if ordered else "slots"
    kind += ("" if inv_freq is None else " rope") + ("" if table is None else " paged")
    return f"{kind} D={k.shape[-1]} vectors={at_least(vectors)}"


def _context_attention(q: Any, k: Any, *_: object) -> str:
    """Whether the cache is of fp8. groups: sequences times KV heads; rows: queries times heads of a group; slots: S."""
    groups, rows = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1] * q.shape[2]
    kind = "" if k.dtype == q.dtype else "fp8 "
    return f"{kind}D={q.shape[-1]} groups={at_least(groups)} rows={at_least(rows)} slots={at_least(k.shape[2])}"


def _gist_encode(blocks: Any, *_: object) -> str:
    """rows: windows times their entries."""
    return f"E={at_least(blocks.shape[2])} rows={at_least(blocks.shape[0] * blocks.shape[1])}"


def _gist_pool(k: Any, *_: object) -> str:
    """blocks: of all rows and heads."""
    return f"D={k.shape[-1]} K={k.shape[3]} blocks={at_least(math.prod(k.shape[:3]))}"


def _collapse(k: Any, v: Any, w: Any, b: Any, m: Any, c: Any, children: Any, *_: object) -> str:
    """blocks: of all layers, sequences and heads."""
    blocks = math.prod(k.shape[:3]) * children.shape[0]
    return f"D={k.shape[-1]} K={children.shape[1]} blocks={at_least(blocks)}"


def _lens_score(entries: Any, *_: object) -> str:
    """entries: N."""
    return f"E={at_least(entries.shape[1])} entries={at_least(entries.shape[0])}"


# The bucket of a call from its op's flat arguments. An op that is not here has no key, such as the backward passes,
# which CUDA C++ leaves to Triton.
BUCKETS: dict[str, Callable[..., str]] = {
    "kv_splice_": _kv_splice,
    "context_attention": _context_attention,
    "gist_encode": _gist_encode,
    "gist_pool": _gist_pool,
    "collapse_": _collapse,
    "lens_score": _lens_score,
}


def key(op: str, args: Sequence[Any]) -> Key:
    """What a call of an op in `BUCKETS` is looked up by. args: the op's flat arguments, without `backend`."""
    return op, str(args[0].dtype).removeprefix("torch."), BUCKETS[op](*args)


_here = threading.local()


@contextmanager
def for_graphs() -> Iterator[None]:
    """Calls of this thread in here are served by the backend that is fastest on the device, however long the host takes
    to issue them: for the calls that a CUDA graph records, and those that warm up for it (`mc_kernels.for_graphs`).
    A backend that is named, by argument or by `MC_BACKEND`, serves in here as elsewhere."""
    before = getattr(_here, "graphs", False)
    _here.graphs = True
    try:
        yield
    finally:
        _here.graphs = before


class Orders(NamedTuple):
    """Backends, fastest first: of calls that are issued one by one, and of those that a graph replays."""

    issued: tuple[str, ...]
    replayed: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """measured: on what and when ("gpu", "date", ...), None: nothing was measured. orders: by key."""

    measured: Mapping[str, str] | None
    orders: Mapping[Key, Orders]

    @functools.cached_property
    def ops(self) -> frozenset[str]:
        return frozenset(op for op, _, _ in self.orders)

    def order(self, op: str, args: Sequence[Any], fallback: Sequence[str]) -> Sequence[str]:
        """The backends to ask for a call, best first: what was measured, then the others in their fallback order."""
        if op not in self.ops:
            return fallback
        orders = self.orders.get(key(op, args))
        if orders is None:
            return fallback
        found = orders.replayed if getattr(_here, "graphs", False) else orders.issued
        return (*found, *(name for name in fallback if name not in found))


def _object(where: str, value: object, keys: Collection[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {json.dumps(value)[:80]}")
    if keys is not None and (unknown := [k for k in value if k not in keys]):
        raise ValueError(f"{where}: expected some of {', '.join(keys)}, got {', '.join(unknown)}")
    return value


def _orders(where: str, backends: object) -> Orders:
    given = _object(where, backends, BACKENDS)
    if not given:
        raise ValueError(f"{where}: expected the seconds of at least one backend, got none")
    device, issued = dict[str, float](), dict[str, float]()
    for name, parts in given.items():
        for part, x in _object(f"{where}.{name}", parts, ("device", "host")).items():
            if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < math.inf:
                raise ValueError(f"{where}.{name}.{part}: expected seconds above 0, got {json.dumps(x)}")
        if "device" not in parts:
            raise ValueError(f"{where}.{name}.device: expected seconds above 0, got none")
        device[name], issued[name] = parts["device"], max(parts.values())
    return Orders(*(tuple(sorted(by, key=by.__getitem__)) for by in (issued, device)))


def load(path: Path) -> Table:
    """Read a table. Raises ValueError that names the file, the place in it, what was expected and what came."""
    try:
        page = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a JSON table of measured backends ({error})") from error
    page = _object(f"{path}", page, ("about", "measured", "seconds"))
    orders: dict[Key, Orders] = {}
    for op, dtypes in _object(f"{path}: seconds", page.get("seconds"), BUCKETS).items():
        for dtype, buckets in _object(f"{path}: seconds.{op}", dtypes).items():
            for bucket, seconds in _object(f"{path}: seconds.{op}.{dtype}", buckets).items():
                orders[op, dtype, bucket] = _orders(f"{path}: seconds.{op}.{dtype}.{bucket}", seconds)
    measured = page.get("measured")
    if measured is not None:
        for name, x in _object(f"{path}: measured", measured).items():
            if not isinstance(x, str):
                raise ValueError(f"{path}: measured.{name}: expected a text, got {json.dumps(x)}")
    elif orders:
        raise ValueError(f"{path}: measured: expected what the seconds were measured on, got null")
    return Table(measured, orders)


@functools.cache
def table() -> Table:
    """The table that comes with the package, read when a call on a GPU first asks for it."""
    return load(FILE)
