"""Distillation and cross-entropy over a large vocabulary, in chunks of rows: [rows, vocab] never exists whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# 512 rows of 49,152 logits in fp32 are 100 MB.
ROWS = 512


class _SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor | None, targets: Tensor, head: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        nll = torch.zeros_like(total)
        for i in range(0, len(hidden), ROWS):
            rows = slice(i, i + ROWS)
            log_p = F.log_softmax((hidden[rows] @ head.T).float(), dim=-1)
            at_target = log_p.gather(1, targets[rows, None])[:, 0]
            nll -= at_target.sum()
            residual = log_p.exp()
            if teacher is not None and share > 0:
                log_t = F.log_softmax((teacher[rows] @ head.T).float(), dim=-1)
                t = log_t.exp()
                total += (t * (log_t - log_p)).sum()
                residual.sub_(t, alpha=share)
            hard = torch.full((len(at_target), 1), 1.0 - share, device=hidden.device)
            residual.scatter_add_(1, targets[rows, None], -hard)
            gradient[rows] = residual.to(head.dtype) @ head
        gradient /= len(hidden)
        total, nll = total / len(hidden), nll / len(hidden)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(nll)
        return share * total + (1.0 - share) * nll, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient), None, None, None, None


def distillation_loss(
    hidden: Tensor, teacher: Tensor | None, targets: Tensor, head: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """share * KL(teacher || student) + (1 - share) * cross-entropy, and the cross-entropy alone (nats a token).

    hidden, teacher: [rows, E] final hidden states of student and teacher at the same places; targets [rows] int64; head
    [vocab, E]. The gradient flows to `hidden` only. teacher=None needs share 0.
    """
    if teacher is None and share:
        raise ValueError(f"share: expected 0 without a teacher, got {share}")
    loss, nll = _SoftTargetLoss.apply(hidden, teacher, targets, head, share)
    return loss, nll


@torch.no_grad()
def nll_rows(hidden: Tensor, targets: Tensor, head: Tensor) -> Tensor:
    """Cross-entropy of every row, [rows] fp32."""
    parts = [
        F.cross_entropy((hidden[i : i + ROWS] @ head.T).float(), targets[i : i + ROWS], reduction="none")
        for i in range(0, len(hidden), ROWS)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
