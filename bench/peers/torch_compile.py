"""The formulas of `torch_forms.py` through `torch.compile`: its default mode, and everything its compiler can tune.

Shapes are static and every function is one graph; what cannot be compiled so raises and shows as an error, nothing runs
eagerly instead.
"""

from __future__ import annotations

import inspect
import os
import shutil
from typing import Any

import torch
import torch._inductor.cudagraph_trees  # importing it compiles; left to `reset`, that breaks the loop it runs in
from torch import Tensor, nn
from torch._inductor import config as inductor

from ..workloads import Candidate, Workload
from ..workloads.gist_encode import plain_encode
from .torch_forms import FORMS, Function, Weights, serves, start

NAME = "torch.compile"
SLOW_TO_START = True
TUNED = f"{NAME} max-autotune"


def missing(device: torch.device) -> str | None:
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler"
    return None


def _compile(function: Function) -> Function:
    return _compiled(function, "default")


def _compile_tuned(function: Function) -> Function:
    return _compiled(function, "max-autotune")


def _compiled(function: Function, mode: str) -> Function:
    compile_: Any = torch.compile  # its overloads lack the last arguments
    # With `fullgraph` a second compilation of the function is an error and no fallback. (Before torch 2.13 there are up
    # to `torch._dynamo.config.recompile_limit` of them.)
    once = {"isolate_recompiles": True, "recompile_limit": 1}
    known = inspect.signature(torch.compile).parameters
    options = {name: value for name, value in once.items() if name in known}
    compiled: Function = compile_(function, fullgraph=True, dynamic=False, mode=mode, **options)
    return compiled


def offers(workload: Workload) -> list[Candidate]:
    torch.compiler.reset()
    if not serves(workload):
        return []
    op, cpu = workload.op, workload.device.type == "cpu"
    found = [FORMS[op](workload, NAME, _compile)]
    if op == "kv_splice_" and cpu:  # there is no product to tune
        return found
    if op == "gist_encode" and cpu:
        return [*found, _encode_frozen(workload)]
    return [*found, FORMS[op](workload, TUNED, _compile_tuned)]


class Encoder(nn.Module):
    """`plain_encode` with weights of its own."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights: Any = Weights(weights)

    def forward(self, blocks: Tensor) -> Tensor:
        return plain_encode(blocks, self.weights)


def _encode_frozen(workload: Workload) -> Candidate:
    """Tuned and frozen: with weights that are constants they are packed at compile time, once for each set of them."""

    def prepare(inputs: tuple[Tensor, Any]) -> tuple[Function, Tensor]:
        # Freezing is decided while the function is traced, so it is no option of `torch.compile`.
        with torch.no_grad(), inductor.patch(freezing=True):
            compiled = _compile_tuned(Encoder(inputs[1]).eval())
            start(compiled, [inputs[0]])
        return compiled, inputs[0]

    def run(state: tuple[Function, Tensor]) -> Tensor:
        with torch.no_grad():
            gists: Tensor = state[0](state[1])
        return gists

    return Candidate(TUNED, run, prepare, note="weights packed beforehand")
