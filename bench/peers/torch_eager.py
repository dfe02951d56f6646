"""Plain PyTorch, eager: what one writes without any library."""

from __future__ import annotations

import torch

from ..workloads import Candidate, Workload

NAME = "torch"


def missing(device: torch.device) -> str | None:
    return None


def offers(workload: Workload) -> list[Candidate]:
    return [Candidate(NAME, workload.plain, result=workload.result)]
