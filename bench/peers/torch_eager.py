"""PyTorch, eager: the plain formula as one writes it, and the form of it that is fastest without a compiler."""

from __future__ import annotations

import torch

from ..workloads import Candidate, Workload
from .torch_forms import FORMS, serves

NAME = "torch"
TUNED = "torch, tuned"
# For the others the plain formula is the fastest.
TUNED_OPS = ("context_attention", "gist_pool", "lens_score")


def missing(device: torch.device) -> str | None:
    return None


def offers(workload: Workload) -> list[Candidate]:
    found = [Candidate(NAME, workload.plain, result=workload.result)]
    if workload.op in TUNED_OPS and serves(workload):
        found.append(FORMS[workload.op](workload, TUNED, lambda function: function))
    return found
