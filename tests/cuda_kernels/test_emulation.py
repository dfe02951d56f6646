"""The emulation notices what it is for: a wrong index, a write to a wrong place, a missing barrier. Kernels carry these
errors for the emulated build alone (`MC_FAULT`), and a test switches them on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from mc_kernels import Edit, RopeSpec, SplicePlan, cuda_backend, kv_splice_

ROPE = RopeSpec.from_theta(1e4, 8)
# Of a cache of 40 slots: the tail moves left by 5, right by 5, and both at once. Segments of several tiles, which
# overlap their destinations; they begin or end where the cache does.
LEFT, RIGHT = [Edit(0, 5, 0)], [Edit(0, 0, 5)]
BOTH = [Edit(0, 7, 2), Edit(20, 1, 12), Edit(34, 6, 0)]


@pytest.fixture(autouse=True)
def _emulated(emulation: Path) -> Iterator[None]:
    with cuda_backend.emulate(emulation) as library:
        yield
        library.emulate(0, 0, 1, 0)


def splice(edits: Sequence[Edit], rope: RopeSpec | None, seed: int = 0, fault: int = 0) -> torch.Tensor:
    p = SplicePlan.from_edits(35 if edits is RIGHT else 40, edits, capacity=40)
    k, v = (torch.arange(4.0 * 40 * 8).view(2, 2, 40, 8) for _ in range(2))
    new = torch.zeros(2, 2, p.n_insert, 8)
    cuda_backend.library().emulate(seed, 4, 2, fault)
    kv_splice_(k, v, new, new.clone(), p, rope, backend="cuda")
    return torch.stack((k, v))


@pytest.mark.parametrize("rope", [None, ROPE], ids=["plain", "rope"])
@pytest.mark.parametrize("edits", [LEFT, RIGHT, BOTH], ids=["left", "right", "both"])
def test_every_order_gives_the_same(edits: Sequence[Edit], rope: RopeSpec | None) -> None:
    want = splice(edits, rope)
    assert all(torch.equal(splice(edits, rope, seed), want) for seed in range(1, 6))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("fault", "edits", "rope", "words"),
    [
        (1, LEFT, ROPE, "(races with thread|outside every view)"),
        (3, RIGHT, None, "(races with thread|outside every view)"),
        (2, LEFT, None, "races with thread . of block"),
        (2, RIGHT, None, "races with thread . of block"),
        (2, LEFT, ROPE, "races with thread . of block"),
    ],
    ids=["wrong-read", "wrong-write", "no-barrier-left", "no-barrier-right", "no-barrier-turning"],
)
def test_a_deliberate_error_is_noticed(
    fault: int, edits: Sequence[Edit], rope: RopeSpec | None, words: str, seed: int
) -> None:
    with pytest.raises(
        RuntimeError, match=rf"kv_splice \(ordered\): block \d, thread \d: (read|write) of 16 bytes .*{words}"
    ):
        splice(edits, rope, seed, fault)


def test_where_an_access_was_outside_is_said() -> None:
    """One block, so that nothing else can be wrong: the last entry is written a slot too far."""
    p = SplicePlan.from_edits(35, RIGHT, capacity=40)
    k = torch.zeros(1, 1, 40, 8)
    new = torch.zeros(1, 1, 5, 8)
    cuda_backend.library().emulate(0, 256, 1, 3)
    with pytest.raises(
        RuntimeError, match=r"write of 16 bytes outside every view; nearest: byte 12.. from the start of v"
    ):
        kv_splice_(k, torch.zeros(1, 1, 40, 8), new, new.clone(), p, RopeSpec.from_theta(1e4, 8), backend="cuda")
