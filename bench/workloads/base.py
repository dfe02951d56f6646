"""A workload: one case of one op at one dtype on one device, with inputs, candidates and the check of their results.

A *candidate* is anything that does the work: a backend of ours or a peer. `run` is what is timed; what a candidate
needs in a form of its own (another layout, a compiled function) it makes in `prepare`, once per input, untimed.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc_kernels.registry import IMPLS, PREFERENCE
from mc_kernels.testing import max_error

# A peer may err this many times more than the error rule allows us: libraries rotate in the storage dtype, twice.
PEER_ALLOWANCE = 8.0


def _same(inputs: Any) -> Any:
    return inputs


def _returned(_state: Any, out: Any) -> Any:
    return out


@dataclass(frozen=True)
class Candidate:
    """One way to do a workload.

    run: state -> anything; timed.
    prepare: inputs (an element of `Workload.inputs`) -> state; once per input, untimed. It may alias the inputs.
    result: (state, what `run` returned) -> the op's results in the op's own form; untimed, for the check.
    note: what a reader must know about the comparison.
    same_work: False for a rival that does less (or other) work: it is shown, and never the best peer.
    verify: state -> verdict; runs once and judges itself, in place of `result`, where the result has another form.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = _same
    result: Callable[[Any, Any], Any] = _returned
    note: str = ""
    same_work: bool = True
    peer: bool = True
    verify: Callable[[Any], Check] | None = None


@dataclass(frozen=True)
class Check:
    """error: largest absolute difference from the oracle; allowed: what the error rule lets pass."""

    error: float
    allowed: float

    def reason(self, slack: float = 1.0) -> str | None:
        """Why the result is rejected, or None."""
        if self.error <= self.allowed * slack:
            return None
        return f"wrong: error {self.error:.2e}, allowed {self.allowed * slack:.2e}"


class Workload(ABC):
    """`inputs` holds one or more sets of arguments; a candidate is called on them in turn."""

    op: str
    limit: str = "read"  # which bandwidth bounds its traffic

    def __init__(self, case: Any, dtype: torch.dtype, device: torch.device, copies: int = 1) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.inputs = [case.make(dtype, device, seed) for seed in range(copies)]

    @property
    def bytes(self) -> int:
        return int(self.case.bytes(self.dtype))

    @property
    def flops(self) -> int:
        return int(self.case.flops())

    @property
    def rows(self) -> int | None:
        """Rows of the op's typical matrix product, at which its matrix rate is also measured; None: it has none."""
        return None

    @property
    def rivals(self) -> tuple[str, ...] | None:
        """The peers that can take the inputs; None: all of them may be asked."""
        return None

    @staticmethod
    def touched(case: Any, dtype: torch.dtype) -> int:
        """Bytes of one set of inputs."""
        return int(case.bytes(dtype))

    @abstractmethod
    def ours(self, inputs: Any, backend: str) -> Any:
        """Call the op."""

    def result(self, inputs: Any, out: Any) -> Any:
        """The op's results, given its inputs and what it returned (an op that works in place returns nothing)."""
        return out

    @abstractmethod
    def plain(self, inputs: Any) -> Any:
        """The op as plain PyTorch code in the storage dtype: the error rule's yardstick and the peer `torch`."""

    @abstractmethod
    def expect(self, inputs: Any) -> Callable[[Any], Check]:
        """Called before a candidate runs (which may overwrite the inputs); the returned function judges its results."""

    def check(self, candidate: Candidate) -> Check:
        """Run a candidate once on the first inputs and compare with the oracle."""
        if candidate.verify is not None:
            return candidate.verify(candidate.prepare(self.inputs[0]))
        judge = self.expect(self.inputs[0])
        state = candidate.prepare(self.inputs[0])
        return judge(candidate.result(state, candidate.run(state)))

    def backends(self, only: Sequence[str] = ()) -> Iterator[tuple[str, Candidate | str]]:
        """Our backends that serve the device, or those of `only`: a candidate each, or why it cannot run here."""
        serving = PREFERENCE.get(self.device.type, ())
        for name in only or [name for name in IMPLS[self.op] if name in serving]:
            impl = IMPLS[self.op].get(name)
            reason = "not implemented for this op" if impl is None else impl.available()
            yield name, reason if reason is not None else self.backend(name)

    def backend(self, name: str) -> Candidate:
        return Candidate(name, lambda x: self.ours(x, name), result=self.result, peer=False)


def error_rule(out: Sequence[Tensor], oracle: Sequence[Tensor], plain: Sequence[Tensor]) -> Check:
    """The error rule of `mc_kernels.testing` over several outputs: of the one that comes nearest to its bound."""
    checks: list[Check] = []
    for x, exact, yardstick in zip(out, oracle, plain, strict=True):
        if x.shape != exact.shape:
            return Check(math.inf, 0.0)
        rival = max_error(yardstick, exact)
        if not math.isfinite(rival):
            raise RuntimeError("plain PyTorch gives no finite result on these inputs: nothing can be checked")
        scale = float(exact.abs().max()) if exact.numel() else 0.0
        allowed = 2 * rival + torch.finfo(x.dtype).eps * scale
        checks.append(Check(max_error(x, exact), allowed))
    return max(checks, key=lambda check: check.error / max(check.allowed, sys.float_info.min))
