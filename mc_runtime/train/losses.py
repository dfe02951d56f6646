"""Losses of gists: distillation and cross-entropy, reconstruction, hidden states, contrast of neighbours.

What goes over the vocabulary runs in chunks of rows: [rows, vocab] never exists whole. Logits are computed in the
model's dtype and reduced in fp32.
"""

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


class _BagLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, head: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows, share = len(hidden), 1.0 / tokens.shape[1]
        for i in range(0, rows, ROWS):
            log_p = F.log_softmax((hidden[i : i + ROWS].to(head.dtype) @ head.T).float(), dim=-1)
            bag = tokens[i : i + ROWS]
            total -= log_p.gather(1, bag).sum()
            residual = log_p.exp_().scatter_add_(1, bag, torch.full_like(bag, -share, dtype=torch.float32))
            gradient[i : i + ROWS] = residual.to(head.dtype) @ head
        ctx.save_for_backward(gradient / rows)
        return total * share / rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient), None, None


def bag_loss(hidden: Tensor, tokens: Tensor, head: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(head . hidden) against the bag of each row's tokens (nats a token).

    hidden: [rows, E]; tokens: [rows, n] int64; head: [vocab, E]. The gradient flows to `hidden` only.
    """
    loss: Tensor = _BagLoss.apply(hidden, tokens, head)
    return loss


def neighbour_loss(features: Tensor, margin: float) -> Tensor:
    """Hinge that keeps neighbouring gists apart: mean of max(0, margin - cosine distance), 0 for fewer than two gists.

    features: [..., M, F], gists in the order of the text.
    """
    if features.shape[-2] < 2:
        return features.sum() * 0.0
    x = features.float()
    distance = 1.0 - F.cosine_similarity(x[..., 1:, :], x[..., :-1, :], dim=-1)
    return F.relu(margin - distance).mean()


def hidden_loss(hidden: Tensor, teacher: Tensor) -> Tensor:
    """Share of the teacher's variance that the student misses, averaged over the dimensions: 0 for the same states.

    hidden, teacher: [rows, E], residual streams after the same layers. A dimension counts by its spread over the rows,
    not by its size: a few dimensions of a residual stream are hundreds of times as large as the rest.
    """
    t = teacher.float()
    spread = (t - t.mean(0)).square().mean(0)
    missed = (hidden.float() - t).square().mean(0)
    return (missed / (spread + 1e-6 * spread.median())).mean()


@torch.no_grad()
def nll_rows(hidden: Tensor, targets: Tensor, head: Tensor) -> Tensor:
    """Cross-entropy of every row, [rows] fp32."""
    parts = [
        F.cross_entropy((hidden[i : i + ROWS] @ head.T).float(), targets[i : i + ROWS], reduction="none")
        for i in range(0, len(hidden), ROWS)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
